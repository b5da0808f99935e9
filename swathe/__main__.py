"""Commands: `python -m swathe doctor` says what works here and what each op runs on, `tune` times
block sizes on this GPU and writes their table, `run` patches the models that a script makes,
`warmup` compiles kernels for a GPU that is not here."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "doctor": "swathe.doctor",
    "run": "swathe.run",
    "tune": "swathe.kernels.tuner",
    "warmup": "swathe.kernels.ahead",
}


def main(given: list[str]) -> int:
    """Run one command; returns its exit status."""
    if given and given[0] in COMMANDS:
        return import_module(COMMANDS[given[0]]).main(given[1:])
    asked_for_help = given and given[0] in ("-h", "--help")
    lines = [f"  python -m swathe {name} --help" for name in COMMANDS]
    print("usage:", *lines, sep="\n", file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
