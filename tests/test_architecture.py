"""The structure as machine-checked rules: imports go down only, files and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [
    path
    for folder in ("swathe", "kernels", "modeling", "csrc")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h")
    and not path.is_relative_to(ROOT / "swathe" / "kernels")
    and not path.is_relative_to(ROOT / "swathe" / "modeling")
]
ALL_PYTHON = [
    path
    for folder in ("swathe", "kernels", "modeling", "tests", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "swathe/kernels" not in path.as_posix() and "swathe/modeling" not in path.as_posix()
]
FLOORS = {"kernels": 2, "modeling": 3, "swathe": 4}


def modules_imported_by(path: Path) -> set[str]:
    """Every module named in an import statement of the file, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int:
    """The floor that an import lands on; 0 for anything that is not ours."""
    for name in ("kernels", "modeling"):
        if module == f"swathe.{name}" or module.startswith(f"swathe.{name}."):
            return FLOORS[name]
    return FLOORS["swathe"] if module == "swathe" or module.startswith("swathe.") else 0


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.suffix == ".py"], ids=relative)
def test_imports_only_go_down(path: Path) -> None:
    own = FLOORS[path.relative_to(ROOT).parts[0]]
    modules = modules_imported_by(path)
    up = {m for m in modules if floor(m) > own}
    assert not up, f"{relative(path)} imports upwards: {sorted(up)}"
    bare = {m for m in modules if m.split(".")[0] in ("kernels", "modeling", "tests", "bench")}
    assert not bare, f"{relative(path)}: import swathe.{sorted(bare)[0]}, not {sorted(bare)[0]}"


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.suffix == ".py"], ids=relative)
def test_rooms_keep_to_themselves(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    modules = modules_imported_by(path)
    if parts[0] == "kernels" and len(parts) > 2:
        others = {
            m
            for m in modules
            if m.startswith("swathe.kernels.") and m.split(".")[2] not in (parts[1], "core")
        }
        assert not others, f"{relative(path)} reaches into another op: {sorted(others)}"
    if parts[:2] == ("kernels", "core"):
        assert not {m for m in modules if m == "transformers"}
    if parts[0] == "modeling" and parts[1:2] != ("hf",):
        assert not {m for m in modules if m.split(".")[0] == "transformers"}
        private = {
            m
            for m in modules
            if m.startswith("swathe.kernels.") and any(p.startswith("_") for p in m.split("."))
        }
        assert not private, f"{relative(path)} opens a backend file: {sorted(private)}"
    if parts[:2] == ("modeling", "families") and len(parts) > 3:
        siblings = {
            m
            for m in modules
            if m.startswith("swathe.modeling.families.") and m.split(".")[3] != parts[2]
        }
        assert not siblings, f"{relative(path)} imports a sibling family: {sorted(siblings)}"


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.suffix == ".py"], ids=relative)
def test_gluon_is_spoken_in_one_vocabulary(path: Path) -> None:
    """Triton renames Gluon's words: core/gluon.py translates, and an emulator stands in for it."""
    words, modules = "swathe.kernels.core.gluon", modules_imported_by(path)
    if relative(path) == "kernels/core/gluon.py":
        return
    direct = {m for m in modules if m.startswith("triton.experimental")}
    assert not direct, f"{relative(path)}: import {words}, not {sorted(direct)[0]}"
    if any(m == words or m.startswith(f"{words}.") for m in modules):
        assert path.name.startswith("_gluon"), f"{relative(path)}: {words} imports Triton"
    if f"{words}.jit" in modules:
        kin = path.relative_to(ROOT).with_suffix("").parts[:-1]
        kernels = ".".join(("swathe", *kin, "_gluon"))
        allowed = ("__future__", "typing", words, kernels)
        others = {m for m in modules if not m.startswith(allowed)}
        assert not others, f"{relative(path)} holds Gluon kernels and imports {sorted(others)}"


@pytest.mark.parametrize(
    "path", [*SHIPPED, *(p for p in ALL_PYTHON if p not in SHIPPED)], ids=relative
)
def test_budgets(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{relative(path)}: split it by the reader's question"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{relative(path)}:{node.lineno}: {node.name} has {length} lines"


def test_names_say_what_is_inside() -> None:
    vague = [p for p in (*SHIPPED, *ALL_PYTHON) if p.stem in ("utils", "common", "helpers", "misc")]
    assert not vague, f"name files by their content: {[relative(p) for p in vague]}"


def test_no_init_where_it_would_shadow() -> None:
    for name in ("kernels/__init__.py", "tests/__init__.py"):
        assert not (ROOT / name).exists(), f"{name}: see DESIGN.md section 1"


def test_links_are_relative() -> None:
    for name in ("kernels", "modeling"):
        link = ROOT / "swathe" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.suffix == ".py"], ids=relative)
def test_nothing_dangerous(path: Path) -> None:
    banned = {"eval", "exec", "__import__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in banned, f"{relative(path)}:{node.lineno}: {node.func.id}"
    assert not modules_imported_by(path) & {"pickle", "yaml", "dill"}


def fresh(code: str) -> str:
    """Run code in a new process at the root of the checkout and return what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_swathe_is_light() -> None:
    loaded = fresh(
        "import torch, sys; a = set(sys.modules); import swathe; print(*set(sys.modules) - a)"
    )
    ours = loaded.split()
    assert "swathe" in ours
    heavy = [
        m
        for m in ours
        if m.split(".")[0] in ("triton", "transformers", "numpy", "safetensors")
        or m.startswith("swathe.modeling.families")
    ]
    assert not heavy


def test_public_names_exist_and_families_come_on_demand() -> None:
    code = (
        "import swathe, sys\n"
        "homes = {n: swathe._HOME.get(n, '') for n in swathe.__all__}\n"
        "[getattr(swathe, n) for n, home in homes.items() if '.families.' not in home]\n"
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules\n"
        "print([m for m in sys.modules if m.startswith('swathe.modeling.families.')])"
    )
    assert fresh(code) == "[]"


def test_unknown_public_name() -> None:
    import swathe

    with pytest.raises(AttributeError, match="has no attribute 'rmsnorm'"):
        _ = swathe.rmsnorm
