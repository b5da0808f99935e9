"""Which modules of the modeling layer import which: no circles, and families by themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support.classes import MODEL_TYPES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "modeling").rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("swathe", *parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imported_on_import(path: Path) -> set[str]:
    """Modules of the modeling layer that importing the file imports, by statements in the open."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (deeper & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def test_there_are_no_circles() -> None:
    left = {name: imported_on_import(path) - {name} for name, path in MODULES.items()}
    assert len(left) > 60 and sum(map(len, left.values())) > 150
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_family_imports_no_other(family: str) -> None:
    code = (
        f"import sys, swathe.modeling.families.{family}.modeling_{family}\n"
        "home = 'swathe.modeling.families.'\n"
        "found = [n.split('.')[3] for n in sys.modules if n.startswith(home)]\n"
        "assert 'transformers' not in sys.modules\n"
        "print(*sorted(set(found)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [family]
