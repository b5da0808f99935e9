"""The C++ library: loading, versions, every instruction set, threads, and one OpenMP runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.tensors import instruction_sets
from swathe.kernels.core import cpp
from swathe.kernels.core.errors import BackendUnavailable
from swathe.kernels.core.testing import FP32_EAGER
from swathe.kernels.norm import _cpp, eager

pytestmark = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpp.using_isa(request.param):
        assert cpp.isa() == request.param
        yield request.param


def compile_library(folder: Path, source: str) -> Path:
    (folder / "other.cpp").write_text(source)
    out = folder / "other.so"
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-o", str(out), "other.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return out


def test_versions_must_agree(tmp_path: Path) -> None:
    other = compile_library(tmp_path, 'extern "C" int swathe_abi_version() { return 999; }')
    with pytest.raises(BackendUnavailable, match=r"ABI version 999, this swathe needs "):
        cpp.load(other)


def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    other = compile_library(tmp_path, 'extern "C" int something_else() { return 1; }')
    with pytest.raises(BackendUnavailable, match="no swathe library"):
        cpp.load(other)


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.so").write_bytes(b"\x7fELF and nothing else")
    with pytest.raises(BackendUnavailable, match=r"other\.so cannot be loaded"):
        cpp.load(tmp_path / "other.so")


def test_a_library_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    # the linker would take it, and the first missing page end the process
    other = compile_library(tmp_path, 'extern "C" int swathe_abi_version() { return 999; }')
    other.write_bytes(other.read_bytes()[:-64])
    with pytest.raises(BackendUnavailable, match="end of the file is missing"):
        cpp.load(other)


def test_another_library_can_be_named(tmp_path: Path) -> None:
    other = shutil.copy(str(cpp.library_path()), tmp_path / "other.so")
    code = "from swathe.kernels.core import cpp; print(cpp.library()._name)"
    run = with_library(other, code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(other)


def test_a_named_library_that_does_not_serve_is_an_error_even_for_auto(tmp_path: Path) -> None:
    stale = compile_library(tmp_path, 'extern "C" int swathe_abi_version() { return 999; }')
    code = "import torch, swathe; swathe.rms_norm(torch.ones(2, 3), torch.ones(3))"
    for path, why in ((tmp_path / "none.so", "where there is no file"), (stale, "ABI version 999")):
        run = with_library(path, code)
        assert run.returncode == 1
        assert "BackendUnavailable" in run.stderr and why in run.stderr


def with_library(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SWATHE_CSRC": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_header_and_binding_name_one_version() -> None:
    header = Path(__file__).parents[2] / "csrc" / "abi.h"
    assert f"#define SWATHE_ABI_VERSION {cpp.ABI_VERSION}\n" in header.read_text()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 3, 15, 16, 17, 64, 1000, 4097])
def test_every_instruction_set_rounds_like_eager(dtype: torch.dtype, N: int) -> None:
    # small integers: sums are exact in any order, so all instruction sets must agree to the bit
    x = torch.randint(-6, 7, (5, N)).to(dtype)
    x[:, 0] = 1
    r, weight = torch.randint(-6, 7, (5, N)).to(dtype), torch.randn(N).to(dtype)
    for casting in ("llama", "fp32"):
        y, _ = _cpp.forward(x, weight, 1e-6, 0.0, casting)
        assert torch.equal(y, eager.rms_norm(x, weight, 1e-6, 0.0, casting, None))
        y, h, rstd = _cpp.forward_add(x, r, weight, 1e-6, 0.5, casting)
        expected_y, expected_h = eager.rms_norm(x, weight, 1e-6, 0.5, casting, r)
        assert torch.equal(h, expected_h) and torch.equal(y, expected_y)
    gradients = [_cpp.backward(y, h, weight, rstd, x, 0.5)]
    with cpp.using_isa("portable"):
        gradients.append(_cpp.backward(y, h, weight, rstd, x, 0.5))
    for ours, portable in zip(*gradients, strict=True):
        torch.testing.assert_close(
            ours, portable, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
        )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_survives(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(-1, 1)
    zero = torch.zeros_like(x)
    # h = x + 0 is a load, a widening, a rounding and a store of every bit pattern
    _, h, _ = _cpp.forward_add(x, zero, torch.ones(1).to(dtype), 1e-6, 0.0, "fp32")
    torch.testing.assert_close(h, x + zero, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_from_fp32_is_torchs(dtype: torch.dtype) -> None:
    scale = torch.exp2(torch.arange(-150, 129, dtype=torch.float64)).float()
    weight = torch.cat([scale * (1 + torch.rand(279)), scale * 1.001953125, scale * 1.00390625])
    weight = torch.cat([weight, -weight])
    ones = torch.ones(1, weight.numel(), dtype=dtype)
    y, rstd = _cpp.forward(ones, weight, 0.0, 0.0, "fp32")
    assert rstd.item() == 1.0
    torch.testing.assert_close(y[0], weight.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("M", [1, 7, 64, 333])
def test_threads_change_no_bit(M: int) -> None:
    x, weight, dy = torch.randn(M, 2049), torch.randn(2049), torch.randn(M, 2049)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y, rstd = _cpp.forward(x, weight, 1e-6, 0.0, "llama")
            results.append((y, rstd, *_cpp.backward(dy, x, weight, rstd, None, 0.0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_one_openmp_runtime_and_no_more_threads_than_torch_says() -> None:
    code = (
        "import os, torch, swathe\n"
        "torch.set_num_threads(1)\n"
        "x, w = torch.randn(512, 4096), torch.ones(4096)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "swathe.rms_norm(x, w, implementation='cpp')\n"
        "assert len(os.listdir('/proc/self/task')) == before, 'a thread was started'\n"
        "torch.set_num_threads(2)\n"
        "swathe.rms_norm(x, w, implementation='cpp')\n"
        "maps = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split()[-1]}\n"
        "print(len(maps))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works_on_one_thread() -> None:
    # like torch itself, a child forked after threads were used must not use them again
    code = (
        "import os, torch, swathe\n"
        "x, w = torch.randn(512, 4096), torch.ones(4096)\n"
        "torch.set_num_threads(2)\n"
        "swathe.rms_norm(x, w, implementation='cpp')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    ok = torch.equal(swathe.rms_norm(x, w, implementation='cpp'), swathe.rms_norm(x, w))\n"
        "    os._exit(0 if ok else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_many_rows_keep_the_weights_gradient_accurate() -> None:
    x, weight, dy = torch.randn(20_000, 24), torch.randn(24), torch.randn(20_000, 24)
    _, rstd = _cpp.forward(x, weight, 1e-6, 0.0, "fp32")
    _, dw = _cpp.backward(dy, x, weight, rstd, None, 0.0)
    gradients = []
    for wide in (torch.float64, torch.float32):
        w = weight.to(wide).requires_grad_()
        y = eager.rms_norm(x.to(wide), w, 1e-6, 0.0, "fp32", None)
        gradients.append(torch.autograd.grad(y, w, dy.to(wide))[0].double())
    gold, theirs = gradients
    assert (dw - gold).norm() <= FP32_EAGER * (theirs - gold).norm()


def test_facts_about_the_library() -> None:
    assert cpp.isa() in cpp.ISAS
    assert cpp.why_unavailable() is None
    assert cpp.library().swathe_threaded() in (0, 1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_outputs_are_the_same_bits(dtype: torch.dtype) -> None:
    # 2100 rows of 2048 are past the size from which outputs are streamed, ten rows are not
    x, weight, dy = (torch.randn(*s).to(dtype) for s in ((2100, 2048), (2048,), (2100, 2048)))
    y, rstd = _cpp.forward(x, weight, 1e-6, 0.0, "llama")
    dx, _ = _cpp.backward(dy, x, weight, rstd, None, 0.0)
    some = slice(700, 710)
    small, rstd = _cpp.forward(x[some], weight, 1e-6, 0.0, "llama")
    dsmall, _ = _cpp.backward(dy[some], x[some], weight, rstd, None, 0.0)
    assert torch.equal(y[some], small) and torch.equal(dx[some], dsmall)
