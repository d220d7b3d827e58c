"""The console command `trigger-recovery`: audit a model, and the other commands of the project under one name."""

import runpy
import sys

import tyro

from attacks.audit.command import Audit, main

OTHERS = {
    "bench": ("benchmarks", (), "run the benchmark on planted models"),
    "plant": ("benchmarks.organisms", ("plant",), "plant a backdoor in a model, to measure attacks on"),
    "organisms": ("benchmarks.organisms", (), "list planted models, draw recipes, fetch pretrained bases"),
    "vectors": ("vectors", (), "learn, apply and compare steering vectors"),
}
"""Commands that are modules of their own: (module, its first arguments, what it does)"""


def usage() -> str:
    """What there is."""
    lines = ["usage: trigger-recovery COMMAND ...", "", "  audit      look for a planted trigger in a model"]
    lines += [f"  {name:10} {what}" for name, (*_, what) in OTHERS.items()]
    return "\n".join([*lines, "", "trigger-recovery COMMAND --help says more."])


def run() -> int:
    """Runs the command that the first argument names; returns the exit status."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name == "audit":
        return main(tyro.cli(Audit, prog="trigger-recovery audit", args=rest))
    if name in OTHERS:
        module, first, _ = OTHERS[name]
        # The module reads its arguments itself; it is run by name, for packages below must not import those above.
        sys.argv = [f"trigger-recovery {name}", *first, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=False)
        return 0
    helped = name in ("-h", "--help")
    print(usage() if helped else f"error: no command {name!r}\n{usage()}", file=sys.stdout if helped else sys.stderr)
    return 0 if helped else 2


if __name__ == "__main__":
    sys.exit(run())
