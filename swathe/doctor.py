"""The doctor: what this installation has, what each op would run on here, and what is broken.

    python -m swathe doctor [--json]

Calls are those that a model's layer makes; swathe.explain says it of any other. The exit status
is 0 where everything works that should, else 1, and the last lines say what is wrong and how to
mend it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from swathe import __version__


def main(given: Sequence[str] | None = None) -> int:
    """Look, print; returns the exit status."""
    parser = ArgumentParser("python -m swathe doctor", description=__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    asked = parser.parse_args(given)
    try:
        found = import_module("swathe.kernels.installation").survey()
    except (ImportError, OSError) as error:
        found = {"problems": [f"torch cannot be imported: {error}; install torch 2.11 or later"]}
    found = {"swathe": __version__, **found}
    print(json.dumps(found, indent=1) if asked.json else report(found))
    return 1 if found["problems"] else 0


def report(found: dict[str, Any]) -> str:
    """The facts of `swathe.kernels.installation.survey` as text."""
    parts = []
    if "ops" in found:
        devices = ["cpu", *(f"cuda:{gpu['index']}" for gpu in found["gpus"] if not gpu["problem"])]
        parts += [facts_table(found), auto_table(found["ops"], devices)]
        parts += [backends_table(found["ops"])]
    else:
        parts.append(f"swathe {found['swathe']}")
    parts.append("\n".join(f"PROBLEM: {text}" for text in found["problems"]) or "All is well.")
    return "\n\n".join(parts)


def facts_table(found: dict[str, Any]) -> str:
    """Versions, devices, the C++ library and Triton, a line each."""
    cpu, library, triton = found["cpu"], found["library"], found["triton"]
    versions = {"swathe": found["swathe"], **found["versions"]}
    vectors = f"{cpu['threads']} threads of {cpu['cores']} cores, torch uses {cpu['widest']}"
    lines = [
        ["versions", ", ".join(f"{name} {number}" for name, number in versions.items())],
        ["CPU", f"{cpu['name']}, {vectors}"],
    ]
    for gpu in found["gpus"]:
        said = gpu["problem"] or f"{gpu['name']}, {gpu['arch']}"
        lines.append([f"cuda:{gpu['index']}", said])
    if not found["gpus"]:
        lines.append(["GPU", "none that torch sees"])
    if library["problem"]:
        lines.append(["C++", f"cannot be used: {library['path'] or 'no library'}"])
    else:
        threads = "OpenMP" if library["openmp"] else "no OpenMP: one thread"
        lines.append(["C++", f"{library['isa']}, {threads}, ABI {library['abi']}"])
        lines.append(["", library["path"]])
    how = "interprets (TRITON_INTERPRET is set)" if triton["interpreting"] else "compiles for GPUs"
    lines.append(["Triton", triton["problem"] or f"{how}, cache {triton['cache']}"])
    return aligned(lines)


def auto_table(ops: dict[str, Any], devices: Sequence[str]) -> str:
    """For each op and device the backend that "auto" takes."""
    lines = [["auto takes", *devices]]
    lines += [[op, *(summary(facts["auto"][d]) for d in devices)] for op, facts in ops.items()]
    return aligned(lines)


def summary(auto: dict[str, dict[str, str | None]]) -> str:
    """What "auto" takes: one name, one a mode, one a type, or one and its exceptions."""
    names = {
        (dtype, mode): auto[dtype][mode] or "nothing" for dtype in auto for mode in auto[dtype]
    }
    usual = next(iter(names.values()))
    if set(names.values()) == {usual}:
        return usual
    for side in (1, 0):
        one = {(case[side], name) for case, name in names.items()}
        if len(one) == len({case[side] for case in names}):
            said = dict.fromkeys((case[side], name) for case, name in names.items())
            return ", ".join(f"{where} {name}" for where, name in said)
    others = [f"{' '.join(case)} {name}" for case, name in names.items() if name != usual]
    return ", ".join([usual, *others])


def backends_table(ops: dict[str, Any]) -> str:
    """Op by backend: ok, none, or the number of the reason below."""
    columns = list(dict.fromkeys(name for facts in ops.values() for name in facts["backends"]))
    reasons: dict[str, int] = {}
    lines = [["backends", *columns]]
    for op, facts in ops.items():
        line = [op]
        for name in columns:
            status = facts["backends"].get(name, "")
            if status not in ("", "ok"):
                status = f"no ({reasons.setdefault(status, len(reasons) + 1)})"
            line.append(status)
        lines.append(line)
    notes = [f"({number}) {reason}" for reason, number in reasons.items()]
    return "\n".join([aligned(lines), *notes])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
