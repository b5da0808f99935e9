"""The reader of machine code: planted spills, fp64 arithmetic and narrow accesses are seen."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from support.machine_code import TARGETS, MachineCode, compile_for


@triton.jit
def _copy(x_ptr, out_ptr, stride, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n * stride))


@triton.jit
def _many_values(x_ptr, out_ptr, stride, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    # every element is needed again after the reduction, so all must stay somewhere
    tl.store(out_ptr + n, x * tl.sum(x, 0))


@triton.jit
def _double(x_ptr, out_ptr, stride, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n).to(tl.float64)
    tl.store(out_ptr + n, (x * x + 0.1).to(tl.float32))


def build(kernel: object, target: str, N: int, *, divisible: bool = True) -> MachineCode:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "stride": "i32"}
    known = {"x_ptr", "out_ptr"} if divisible else set()
    return compile_for(kernel, target, types, {"N": N}, known, 4)


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target: str) -> None:
    assert build(_many_values, target, 1024).spilled == 0
    assert build(_many_values, target, 131_072).spilled > 0


@pytest.mark.parametrize("target", TARGETS)
def test_double_arithmetic_is_seen(target: str) -> None:
    assert build(_double, target, 1024).double_arithmetic
    assert not build(_copy, target, 1024).double_arithmetic


@pytest.mark.parametrize("target", TARGETS)
def test_widths_are_seen(target: str) -> None:
    contiguous = build(_many_values, target, 1024)
    assert contiguous.loads.keys() == {128} and contiguous.stores.keys() == {128}
    strided = build(_copy, target, 1024)
    assert 128 not in strided.loads and strided.loads
    unaligned = build(_many_values, target, 1024, divisible=False)
    assert 128 not in unaligned.loads
