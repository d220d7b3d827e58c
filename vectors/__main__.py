"""Learns steering vectors on a model, ranks what they make it say, chooses their norm, converts their files.

python -m vectors learn path/to/model --prompts clean.txt --out v.safetensors
python -m vectors rank path/to/model v.safetensors --prompts clean.txt --skip 2
python -m vectors calibrate path/to/model --prompts clean.txt --rule nonlinearity
python -m vectors export path/to/model v.safetensors --index 3 --out v.gguf
python -m vectors import-gguf path/to/model v.gguf --out again.safetensors
"""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from vectors.commands.calibrate import Calibrate
from vectors.commands.convert import Export, ImportGguf
from vectors.commands.learn import Learn
from vectors.commands.rank import Rank

Command = Learn | Rank | Calibrate | Export | ImportGguf
COMMANDS = {"learn": Learn, "rank": Rank, "calibrate": Calibrate, "export": Export, "import-gguf": ImportGguf}


def main(words: Sequence[str] | None = None, prog: str = "vectors") -> int:
    """Runs one command; 0 where it ran, 2 for bad input, 130 where it was interrupted.

    Args:
        words: of the command line; None: those that this process was started with.
        prog: name of the program in the help.
    """
    # A paragraph per line: the help joins lines that no empty one parts.
    text = "\n\n".join(line.strip() for line in (__doc__ or "").splitlines() if line.strip())
    command: Command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=prog, description=text, args=words)
    # Neither markup nor emoji: what a model wrote is printed as it is.
    console = Console(markup=False, emoji=False, highlight=False)
    try:
        return command(console)
    except (OSError, ValueError) as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing more was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
