"""The hub where it cannot be reached: libraries ask six times, for half a minute in all, and say so each time.

A name that is a typing error in the path of a folder would wait that long as well.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from vectors.loading.folders import is_local

PATIENCE = 5.0
"""Seconds in which the hub must accept a connection"""


@contextmanager
def without_waiting(*names: str | Path | None) -> Iterator[None]:
    """Inside, only what was fetched before is used, if one of the names is on the hub and the hub does not answer."""
    asked = not all(name is None or is_local(name) for name in names)
    if not asked or constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(endpoint: str) -> bool:
    """Whether the host takes connections; what stands behind a proxy is taken to."""
    if getproxies():
        return True
    place = urlsplit(endpoint)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
