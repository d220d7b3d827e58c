"""What commands share: help texts from the docstrings of their options, lists of names as one word, names of files."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from docstring_parser import parse_from_object
from typing_extensions import Doc
from tyro.constructors import PrimitiveConstructorSpec

Options = TypeVar("Options", bound=type)


def help_from_docstrings(options: Options) -> Options:
    """Gives tyro the docstring of each option as one paragraph; goes below the dataclass decorator.

    By itself tyro takes lines that are indented or begin with a digit for lines of their own, and breaks sentences.
    """
    types = dict(options.__annotations__)
    for option in parse_from_object(options).params:
        if option.arg_name in types and option.description:
            types[option.arg_name] = Annotated[types[option.arg_name], Doc(" ".join(option.description.split()))]
    options.__annotations__ = types  # in one piece: since Python 3.14 what is changed within is not seen by dataclasses
    return options


def names_of(*allowed: str) -> PrimitiveConstructorSpec:
    """An option that takes names, each a word of its own or all in one, separated by commas."""

    def read(words: list[str]) -> tuple[str, ...]:
        names = tuple(name.strip() for word in words for name in word.split(",") if name.strip())
        if wrong := [name for name in names if name not in allowed]:
            raise ValueError(f"no {wrong[0]!r} here; give some of {', '.join(allowed)}")
        return names

    def fits(value: Any) -> bool:
        return value is None or (isinstance(value, tuple) and all(name in allowed for name in value))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="{" + ",".join(allowed) + "} ...",
        instance_from_str=read,
        is_instance=fits,
        str_from_instance=lambda names: ["None"] if names is None else list(names),
    )


def no_file(path: Path) -> str:
    """What a path is that results must not take the place of; empty for a file, and where there is nothing yet."""
    if path.is_dir():
        return "a folder"
    # A whole file is moved there: in place of /dev/null, where the user may do that.
    return "a link, or a device" if path.is_symlink() or (path.exists() and not path.is_file()) else ""
