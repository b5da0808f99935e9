"""Proof of the honest interpreter: right numbers where the stock one errs, faults caught."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from support.interpreter import SanitizerError, sanitized, virtual_tensor
from support.numerics import narrow, tf32, widen

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
FACTOR = tl.constexpr(3)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    x, y = tl.load(x_ptr + n), tl.load(y_ptr + n)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "neg":
        out = -x
    elif OP == "less":
        out = tl.where(x < y, x, y)
    elif OP == "max":
        out = tl.maximum(x, y)
    else:
        out = x * 0.5
    tl.store(out_ptr + n, out)


BF16 = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x,
    "less": lambda x, y: torch.where(x < y, x, y),
    "max": torch.fmax,
    "scalar": lambda x, y: x * 0.5,
}


@pytest.mark.parametrize("op", BF16)
def test_bf16_arithmetic_is_rounded_fp32(op: str) -> None:
    x, y, out = torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), torch.empty(64).bfloat16()
    x[3], y[5] = float("nan"), float("nan")
    _arithmetic[(1,)](x, y, out, op, 64)
    torch.testing.assert_close(out, BF16[op](x, y), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _constant_first(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    scaled = (2 * FACTOR * x + (FACTOR - x)) / (FACTOR + x)
    tl.store(out_ptr + tl.arange(0, N), tl.abs(scaled))


def test_a_constant_and_a_block_make_a_block() -> None:
    x, out = torch.randn(16), torch.empty(16)
    _constant_first[(1,)](x, out, 16)
    torch.testing.assert_close(out, ((6 * x + (3 - x)) / (3 + x)).abs())


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.randn(1024)
    x[:6] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 65519.9, 65520.0])
    x, out = x.to(source), torch.empty(1024, dtype=target)
    _cast[(1,)](x, out, 1024)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_bf16_overflow_and_ties() -> None:
    values = torch.tensor([3.4e38, -3.4e38, 1.00390625, 1.01171875, 1e-40])
    torch.testing.assert_close(
        torch.from_numpy(widen(narrow(values.numpy()))), values.bfloat16().float(), rtol=0, atol=0
    )


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 16 + i[None, :])
    out = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * 16 + i[None, :], out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_exact_products(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype), torch.empty(16, 16)
    _dot[(1,)](a, b, out, "ieee", 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_fp32_dot_is_tf32_unless_told_otherwise() -> None:
    a, b, out = torch.randn(16, 32), torch.randn(32, 16), torch.empty(16, 16)
    _dot[(1,)](a, b, out, "tf32", 32)
    rounded = torch.from_numpy(tf32(a.numpy())) @ torch.from_numpy(tf32(b.numpy()))
    torch.testing.assert_close(out, rounded)
    assert (out - a @ b).abs().max() > 1e-4


@triton.jit
def _reduce(x_ptr, out_ptr, WIDE: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if WIDE:
        x = x.to(tl.float32)
    tl.store(out_ptr, tl.sum(x, 0))


@triton.jit
def _square(x):
    return x * x * FACTOR


@triton.jit
def _control(x_ptr, out_ptr, M, N: tl.constexpr):
    m = tl.program_id(0)
    total = tl.zeros((N,), tl.float32)
    while m < M:
        total += _square(tl.load(x_ptr + m * N + tl.arange(0, N)))
        m += tl.num_programs(0)
    for step in tl.static_range(2):
        total += step
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        total += tl.load(
            x_ptr + tl.cast(row, tl.int64) * N + tl.arange(0, N), eviction_policy="evict_last"
        )
    tl.debug_barrier()
    tl.store(
        out_ptr + tl.program_id(0) * N + tl.arange(0, N), tl.div_rn(total, tl.sqrt_rn(total + 9.0))
    )


def test_control_flow_helpers_and_module_constants() -> None:
    x, out = torch.rand(7, 16), torch.empty(2, 16)
    _control[(2,)](x, out, 7, 16)
    for p in range(2):
        total = (3 * x[p::2].square() + x[p::2]).sum(0) + 1
        torch.testing.assert_close(out[p], total / (total + 9).sqrt())


@triton.jit
def _load_lanes(x_ptr, out_ptr, live, OTHER: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n, n < live, other=0.0) if OTHER else tl.load(x_ptr + n, n < live)
    tl.store(out_ptr, tl.sum(x, 0))


def test_masked_lanes_without_other_are_poison() -> None:
    out = torch.zeros(1)
    _load_lanes[(1,)](torch.ones(10), out, 10, True, 16)
    assert out.item() == 10
    _load_lanes[(1,)](torch.ones(10), out, 10, False, 16)
    assert out.isnan().all()


@triton.jit
def _copy(x_ptr, out_ptr, stride, N: tl.constexpr):
    p = tl.program_id(0)
    tl.store(out_ptr + p * stride + tl.arange(0, N), tl.load(x_ptr + p * N + tl.arange(0, N)))


@triton.jit
def _lost_update(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


@triton.jit
def _producer_consumer(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(out_ptr + n, tl.load(x_ptr + n))
    else:
        tl.store(out_ptr + N + n, tl.load(out_ptr + n) * 2)


@triton.jit
def _duplicate(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N) * 0, tl.arange(0, N).to(tl.float32))


@triton.jit
def _hint(x_ptr, out_ptr, start, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + tl.multiple_of(start, 16) + n))


@triton.jit
def _runs(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.max_contiguous(tl.arange(0, N) * 2, 4)
    tl.store(out_ptr + n, tl.load(x_ptr + n))


@triton.jit
def _atomic_beside_store(out_ptr):
    if tl.program_id(0) == 0:
        tl.atomic_add(out_ptr, 1.0)
    else:
        tl.store(out_ptr, 2.0)


@triton.jit
def _widths(wide_ptr, narrow_ptr):
    if tl.program_id(0) == 0:
        tl.store(wide_ptr, 1)
    else:
        tl.store(narrow_ptr + 1, tl.cast(1, tl.int16))


@triton.jit
def _swap(x_ptr, at):
    tl.atomic_cas(x_ptr + at, 0, 1)


def _overlapping_widths() -> None:
    wide = torch.zeros(1, dtype=torch.int32)
    _widths[(2,)](wide, wide.view(torch.int16))


@triton.jit
def _block_truth(x_ptr, N: tl.constexpr):
    if tl.load(x_ptr + tl.arange(0, N)) > 0:
        tl.store(x_ptr, 1.0)


@triton.jit
def _product(out_ptr, a, b):
    tl.store(out_ptr, (a * b).to(tl.int64))


@triton.jit
def _assertion(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "x must be positive")


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "load out of bounds": (
        lambda: _copy[(2,)](torch.ones(24), torch.ones(32), 16, 16),
        "out of bounds load in program 1: 8 lanes",
    ),
    "store out of bounds": (
        lambda: _copy[(2,)](torch.ones(32), torch.ones(31), 16, 16),
        "out of bounds store",
    ),
    "overlapping tiles": (lambda: _copy[(2,)](torch.ones(32), torch.ones(32), 8, 16), "race"),
    "lost update": (lambda: _lost_update[(2,)](torch.zeros(1)), "race"),
    "producer and consumer": (
        lambda: _producer_consumer[(2,)](torch.ones(16), torch.zeros(32), 16),
        "program 1 loads what program 0 stores",
    ),
    "duplicate store": (lambda: _duplicate[(1,)](torch.zeros(1), 16), "twice in one store"),
    "false hint": (
        lambda: _hint[(1,)](torch.ones(64), torch.ones(16), 3, 16),
        r"multiple_of\(16\) is false",
    ),
    "false run": (lambda: _runs[(1,)](torch.ones(64), torch.ones(64), 16), "max_contiguous"),
    "atomic beside a store": (lambda: _atomic_beside_store[(2,)](torch.zeros(1)), "race"),
    "stores of two widths": (_overlapping_widths, "race"),
    "compare and swap out of bounds": (
        lambda: _swap[(1,)](torch.zeros(1, dtype=torch.int32), 1),
        "out of bounds atomic",
    ),
    "truth of a block": (lambda: _block_truth[(1,)](torch.ones(16), 16), "truth value"),
    "device assertion": (lambda: _assertion[(1,)](torch.zeros(1)), "x must be positive"),
    "grid": (lambda: _lost_update[(1, 70_000)](torch.zeros(1)), "the axes hold at most"),
    "short dot": (
        lambda: _dot[(1,)](torch.ones(16, 8), torch.ones(8, 16), torch.ones(16, 16), "ieee", 8),
        "tl.dot over 8",
    ),
    "bf16 reduction": (
        lambda: _reduce[(1,)](torch.ones(16).bfloat16(), torch.ones(1), False, 16),
        "cast to fp32 first",
    ),
    "fp8": (
        lambda: _cast[(1,)](torch.ones(16), torch.ones(16).to(torch.float8_e4m3fn), 16),
        "fp8",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str) -> None:
    run, message = FAULTS[fault]
    # debug makes device_assert real, as TRITON_DEBUG does on hardware
    with sanitized(overflow=fault == "device assertion"), pytest.raises(Exception) as caught:
        run()
    chain: BaseException | None = caught.value
    while chain is not None and not isinstance(chain, SanitizerError):
        chain = chain.__cause__ or chain.__context__
    assert chain is not None, f"caught {caught.value!r}, not a SanitizerError"
    assert caught.match(message) or message in str(chain)


def test_right_code_passes_in_every_order() -> None:
    for order in ("forward", "reverse", "random"):
        with sanitized(order=order, seed=1) as watch:
            out = torch.zeros(64)
            _copy[(4,)](torch.arange(64.0), out, 16, 16)
            assert torch.equal(out, torch.arange(64.0))
            assert (watch.launches, watch.programs) == (1, 4)


def test_int32_overflow_is_seen_when_asked_for() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _product[(1,)](out, 70_000, 70_000)
    with sanitized(overflow=True), pytest.raises(Exception, match="int32 overflow"):
        _product[(1,)](out, 70_000, 70_000)


@triton.jit
def _atomic(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))
    tl.atomic_add(out_ptr + tl.arange(0, N) * 0, x)


def test_float_atomics_show_as_results_that_depend_on_the_order() -> None:
    x = torch.randn(32 * 16) * torch.logspace(-6, 6, 32 * 16)
    results = set()
    for seed in range(4):
        with sanitized(order="random", seed=seed) as watch:
            out = torch.zeros(1)
            _atomic[(32,)](x, out, 16)
            results.add(out.item())
            assert watch.atomics == 32
    assert len(results) > 1


def test_threads_take_turns() -> None:
    outs = [torch.zeros(64) for _ in range(8)]

    def run(out: Tensor) -> None:
        _copy[(4,)](torch.arange(64.0), out, 16, 16)

    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, torch.arange(64.0)) for out in outs)


@triton.jit
def _last(x_ptr, out_ptr, at):
    tl.store(out_ptr, tl.load(x_ptr + at))


def test_tensors_larger_than_memory() -> None:
    x, out = virtual_tensor((2**31 + 16,), torch.bfloat16), torch.ones(1).bfloat16()
    x[-1] = 5
    _last[(1,)](x, out, 2**31 + 15)
    assert out.item() == 5
    with pytest.raises(SanitizerError, match="out of bounds"):
        _last[(1,)](x, out, 2**31 + 16)


def test_helpers_agree_with_torch() -> None:
    values = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    assert np.array_equal(
        narrow(values.numpy()), values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


def test_switches_are_checked() -> None:
    with pytest.raises(ValueError, match="order='sideways'"), sanitized(order="sideways"):
        pass
