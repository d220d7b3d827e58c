"""Help texts of commands from the docstrings of their options, wrapped to the terminal and not as the source is."""

from typing import Annotated, TypeVar

from docstring_parser import parse_from_object
from typing_extensions import Doc

Options = TypeVar("Options", bound=type)


def help_from_docstrings(options: Options) -> Options:
    """Gives tyro the docstring of each option as one paragraph; goes below the dataclass decorator.

    By itself tyro takes the indented lines of such a docstring for lines of their own, and breaks within sentences.
    """
    types = dict(options.__annotations__)
    for option in parse_from_object(options).params:
        if option.arg_name in types and option.description:
            types[option.arg_name] = Annotated[types[option.arg_name], Doc(" ".join(option.description.split()))]
    options.__annotations__ = types  # in one piece: since Python 3.14 what is changed within is not seen by dataclasses
    return options
