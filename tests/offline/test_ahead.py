"""Compiling for a GPU that is not here: the kernels are those that its launches would ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton import knobs
from triton.runtime import driver

import swathe
from support.fake_driver import fake_gpu
from swathe.kernels import ahead
from swathe.kernels.attention import _triton as attention
from swathe.kernels.attention import _triton_blocks as blocks
from swathe.kernels.core.device import arch
from swathe.kernels.core.errors import BackendUnavailable
from swathe.kernels.core.offline import Compiled, compiling_for
from swathe.kernels.norm import _triton as norm

META = torch.device("meta")
ROOT = Path(__file__).parents[2]


def rows(device: str, N: int = 576) -> None:
    """RMSNorm, forward."""
    x = torch.ones(3, N, dtype=torch.bfloat16, device=device)
    norm.forward(x, torch.ones(N, dtype=torch.bfloat16, device=device), 1e-6, 0.0, "llama")


def causal(device: str) -> None:
    """Attention, forward and backward, on sm_90 by TMA."""
    memory = torch.ones(2, 256, 8, 64, dtype=torch.bfloat16, device=device)
    q = k = v = memory.transpose(1, 2)
    bounds = torch.ones(1, 256, dtype=torch.int32, device=device)
    rest = (bounds, bounds, *[None] * 7, 0.125, 0.0, 0.0, False)
    o, lse = attention.forward(q, k, v, *rest)
    attention.backward(o, None, q, k, v, o, lse, *rest)


@pytest.mark.parametrize("call", [rows, causal])
def test_launches_on_the_gpu_ask_for_the_very_kernels(
    call: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(call)
    with compiling_for("sm_90") as done:
        call("meta")
    # a stand-in's tensors lie on a CPU, which has no TMA
    monkeypatch.setattr(
        attention, "tiles_by_tma", lambda *streams: all(blocks.fits_tma(t) for t in streams)
    )
    with fake_gpu("sm_90") as gpu:
        call("cpu")
    launched = {launch.hash for launch in gpu.launches}
    assert launched and launched == done.hashes


def test_nothing_is_launched_nor_kept_and_all_is_put_back() -> None:
    listener, active = knobs.compilation.listener, driver._active
    with pytest.raises(ZeroDivisionError), compiling_for("sm_90") as done:
        assert arch(META) == 90
        rows("meta")
        raise ZeroDivisionError
    assert len(done.compiled) + len(done.found) == 1 and done.seconds > 0
    assert not norm._forward_rows_at._compiled
    assert arch(META) is None
    assert knobs.compilation.listener is listener and driver._active is active
    with fake_gpu("sm_90") as gpu:
        rows("cpu")
        assert len(gpu.launches) == 1 and norm._forward_rows_at._compiled


def test_targets_have_kernels_of_their_own() -> None:
    hashes, cuts = set(), set()
    for target in ("sm_90", "sm_80", "sm_90"):
        with compiling_for(target) as done:
            rows("meta")
            q = torch.empty(1, 1, 4, 256, device="meta", dtype=torch.bfloat16)
            cuts.add(blocks.cut(q, q, False))
        assert done.target == target
        hashes |= done.hashes
    assert len(hashes) == len(cuts) == 2


def test_others_listen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    names: list[str] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda **facts: names.append(facts["metadata"]["name"])
    )
    with compiling_for("sm_90", heard.append):
        rows("meta")
        rows("meta", 577)
    assert names == ["_forward_rows"] * 2 and len(heard) == 2
    assert all(text.startswith("_forward_rows: ") for text in heard)


SCRIPT = """
import sys, torch
from swathe.kernels.core.offline import compiling_for
from swathe.kernels.norm import _triton as norm
with compiling_for("sm_90") as done:
    for N in (64, 128):
        x = torch.empty(4, N, dtype=torch.bfloat16, device="meta")
        norm.forward(x, x[0], 1e-6, 0.0, "llama")
print(len(done.compiled), len(done.found), done.cache)
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, cwd=ROOT,
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        said.append(run.stdout.split())
    assert said == [["2", "0", str(tmp_path)], ["0", "2", str(tmp_path)]]
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_attention_is_compiled_with_every_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is called, not what compiling it says: that others of this folder's tests do."""
    called: list[str] = []

    class Call:
        def __init__(self, label: str) -> None:
            self.label = label

        def __call__(self) -> None:
            called.append(self.label)
            if self.label.startswith("one query"):
                rows("meta")

    from swathe.kernels.attention import ahead as attention_ahead

    whole = attention_ahead.calls
    monkeypatch.setattr(
        attention_ahead, "calls", lambda *sizes: [(n, Call(n)) for n, _ in whole(*sizes)]
    )
    done = swathe.warmup(target="sm_90", heads=((64, 64),))
    assert isinstance(done, Compiled) and len(done.compiled) + len(done.found) == 1
    assert called == [
        *("whole, portable", "causal, portable"),
        *("one query of 256 keys, portable", "one query of 8192 keys, portable"),
        *("whole, gluon", "causal, gluon"),
        *("one query of 256 keys, gluon", "one query of 8192 keys, gluon"),
        *("whole, gluon_fused", "causal, gluon_fused"),
    ]
    assert (
        "attention 64x64 bfloat16 one query of 256 keys, portable: _forward_rows"
        in capsys.readouterr().out
    )
    called.clear()
    assert ahead.main(["--target", "sm_80", "--heads", "64,192x128", "--dtypes", "float16"]) == 0
    assert len(called) == 20
    assert "kernels compiled for sm_80 and" in capsys.readouterr().out


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"target 'sm_91' is unknown; allowed: \['sm_80'"):
        swathe.warmup(target="sm_91")
    with pytest.raises(ValueError, match=r"dtypes \['int8'\] unknown; allowed: \['bfloat16'"):
        swathe.warmup(target="sm_90", dtypes=("int8",))
    with pytest.raises(ValueError, match=r"heads \[\(64, 512\)\] have no kernels"):
        swathe.warmup(target="sm_90", heads=((64, 512),))
    with pytest.raises(ValueError, match="given were neither"):
        swathe.warmup()  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="given were both"):
        swathe.warmup(torch.nn.Linear(1, 1), target="sm_90")  # type: ignore[call-overload]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET is set"):
        swathe.warmup(target="sm_90")


def test_the_command_refuses_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ahead.main(["--target", "sm_90", "--heads", "64x"])
    assert "'64x' is no head size; write 128, or 192x128" in capsys.readouterr().err
    assert ahead.main(["--target", "sm_90", "--dtypes", "int8"]) == 2
    assert "warmup: dtypes ['int8'] unknown" in capsys.readouterr().err
