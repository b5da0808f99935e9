"""What `make sanitize` rests on, and csrc/ as compilers for other processors see it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import address_sanitizer

CSRC = Path(__file__).parents[1] / "csrc"
CXX = os.environ.get("CXX", "c++")
PORTABLE = [CXX, "-std=c++17", "-DSWATHE_PORTABLE_ONLY", "-Wno-psabi"]

needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX!r}")


def syntax(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PORTABLE, "-fsyntax-only", "-Wall", "-Werror", f"-I{CSRC}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_compiler
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cpp")), ids=lambda path: path.name)
def test_compiles_without_the_sets_of_x86(source: Path) -> None:
    run = syntax(str(source))
    assert run.returncode == 0, run.stderr


@needs_compiler
def test_an_intrinsic_outside_its_guard_does_not(tmp_path: Path) -> None:
    body = "SWATHE_TARGET static vf twice(vf x) { return (vf)_mm512_add_ps((__m512)x, (__m512)x); }"
    (tmp_path / "body.h").write_text(body)
    source = tmp_path / "op.cpp"
    head = f'#include "{CSRC}/abi.h"\n#define SWATHE_BODY "{tmp_path}/body.h"\n'
    source.write_text(f'{head}#include "{CSRC}/each_isa.h"\n')
    run = syntax(str(source))
    assert run.returncode != 0 and "_mm512_add_ps" in run.stderr


@needs_compiler
def test_a_portable_library_uses_the_portable_set(tmp_path: Path) -> None:
    out = tmp_path / "library.so"
    command = [*PORTABLE, "-shared", "-fPIC", "-o", str(out), str(CSRC / "library.cpp")]
    subprocess.run(command, check=True, timeout=120)
    assert ctypes.CDLL(str(out)).swathe_isa() == 0


@pytest.mark.parametrize("plant", address_sanitizer.PLANTS, ids=lambda plant: plant.report)
def test_faults_can_still_be_planted(plant: address_sanitizer.Plant) -> None:
    assert (CSRC / plant.header).read_text().count(plant.old) == 1


def test_where_sanitizers_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(address_sanitizer, "CXX", str(tmp_path / "none"))
    assert "no C++ compiler" in str(address_sanitizer.why_not())
    assert address_sanitizer.main() == 2
    other = tmp_path / "clang"
    other.write_text("#!/bin/sh\necho clang version 20\n")
    other.chmod(0o755)
    monkeypatch.setattr(address_sanitizer, "CXX", str(other))
    assert "is not GCC" in str(address_sanitizer.why_not())
