"""Bugs planted in the C++ of linear with weights in int8: the contract catches every one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from swathe.kernels.core import cpp
from swathe.kernels.core.contract import Case, Problem, measure
from swathe.kernels.core.testing import Report
from swathe.kernels.linear import _cpp
from swathe.kernels.linear.contract import CONTRACT, random
from swathe.kernels.linear.shapes import Shape

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(
        cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
    ),
]

# (file, old text, new text)
MUTANTS: dict[str, tuple[str, str, str]] = {
    "scale of the first row for all": ("linear_rows.h", "load_part(scales + i, part)", "all(scales[0])"),
    "scales of the weight's first rows": ("linear_rows.h", "c.of.scales + c.n", "c.of.scales"),
    "scale of the next row": ("linear_rows.h", "c.of.scales + c.n", "c.of.scales + c.n - (c.n > 0)"),
    "no scale": ("linear_rows.h", "if (scales != nullptr) values *=", "if (false) values *="),
    "bias scaled": ("linear_rows.h", "values += load_part(bias + i, part)", "values += load_part(bias + i, part) * (scales ? load_part(scales + i, part) : all(1.0f))"),
    "bias forgotten": ("linear_rows.h", "if (bias != nullptr) values +=", "if (false) values +="),
    "columns after the last vector dropped": ("linear_rows.h", "if (k < K) {", "if (false) {"),
    "the last column dropped": ("linear_rows.h", "load_part(w + r * stride + k, K - k)", "load_part(w + r * stride + k, K - k - 1)"),
    "unsigned": ("vec.h", "__builtin_convertvector(__builtin_convertvector(bytes, vi), vf)", "__builtin_convertvector(__builtin_convertvector(bytes, vi) & 255, vf)"),
    "sign lost": ("vec.h", "__builtin_convertvector(__builtin_convertvector(bytes, vi), vf)", "__builtin_convertvector(__builtin_convertvector(bytes, vi) & 127, vf)"),
    "rows of a sliced weight taken as adjacent": ("linear_rows.h", "static_cast<const int8_t*>(of.w) + n * stride", "static_cast<const int8_t*>(of.w) + n * a.K"),
    "first rows widened for all": ("linear_rows.h", "widen_row(c.w + i * c.stride, rows + i * a.K, a.K)", "widen_row(c.w, rows + i * a.K, a.K)"),
    "last widened column dropped": ("linear_rows.h", "if (n < count) store_part(to + n, load_part(x + n, count - n), count - n);", ""),
    "widened rows taken as apart": ("linear_rows.h", "{c.of, c.n, c.count, rows, a.K}, x", "{c.of, c.n, c.count, rows, a.K - 1}, x"),
    "results of the first rows for all": ("linear.cpp", "a.x = static_cast<const char*>(a.x) + a.M * a.x_stride * size;", ""),
    "later rows over the first": ("linear.cpp", "static_cast<char*>(a.of[i].y) + a.M * a.of[i].N * size", "static_cast<char*>(a.of[i].y)"),
    "full weights read as int8": ("linear_rows.h", "if (of.scales == nullptr) {", "if (a.of[0].scales == nullptr) {"),
}  # fmt: skip
SHAPES = (Shape("few", 3, 37, (9, 6, 5), biased=True), Shape("many", 262, 21, (70,), biased=True))


def caught(folder: Path, patch: pytest.MonkeyPatch) -> str | None:
    """What the contract says of the library compiled from `folder`; None if nothing."""
    target = folder / "mutant.so"
    assert COMPILER is not None
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-DSWATHE_PORTABLE_ONLY", "-Wno-psabi"]
    subprocess.run([COMPILER, *flags, "linear.cpp", "-o", target], cwd=folder, check=True)
    entry = ctypes.CDLL(str(target)).swathe_linear
    entry.argtypes = [ctypes.c_char_p]
    patch.setattr(_cpp, "call", lambda name, packed: entry(packed))
    for problem in problems():
        report = Report("mutant")
        measure(CONTRACT, report, Case("", problem), "cpp", backward=False)
        if report.misses:
            return report.misses[0]
    return None


def problems() -> list[Problem]:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return [random(shape, dtype, seed=1, int8=True) for shape in SHAPES for dtype in kinds]


def test_the_code_as_it_is_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(CSRC, tmp_path / "csrc")
    assert caught(source, monkeypatch) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, old, new = MUTANTS[mutant]
    source = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (source / name).read_text()
    assert old in text, f"{name} has no {old!r}"
    (source / name).write_text(text.replace(old, new))
    assert caught(source, monkeypatch) is not None, "nobody noticed"
