"""attention's benchmark: what it takes for the truth, what peers are asked, how flops count."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import report
from bench.cases import Cell, gate
from bench.contenders import Contender, contenders
from bench.long_attention import flops, whole
from bench.measure import measure
from bench.ops import attention as of_attention
from bench.ops.attention import FORMS, SUBJECT, draw, flash, flex, sdpa, varlen
from bench.record import document
from swathe.kernels.attention.api import Mask, attention
from swathe.kernels.attention.contract import CONTRACT
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Problem

FP32 = torch.float32
SQUARE = Shape("square", 2, 4, 2, 24, 24, 16, 16)
CACHED = Shape("cached", 2, 4, 2, 5, 24, 16, 16)


def drawn(form: str, shape: Shape = SQUARE) -> Problem:
    return draw(shape, FP32, form, "cpu", 3)


@pytest.mark.parametrize("form", FORMS)
def test_truth_a_tile_at_a_time_is_the_contracts(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("bench.long_attention.TILE", 24 * 2 * 5)
    for shape in (SQUARE, CACHED) if form != "packed" else (SQUARE,):
        problem = drawn(form, shape)
        found, expected = SUBJECT.contract.gold(problem), CONTRACT.gold(whole(problem))
        for name, t in found.items():
            torch.testing.assert_close(t, expected[name], rtol=1e-12, atol=1e-12)


def test_flops_count_what_is_seen() -> None:
    pairs = {"full": 24 * 24, "causal": 24 * 25 // 2, "window": 6 * 24 - 15}
    for form, each in pairs.items():
        assert flops(drawn(form), False) == 2 * (2 * 4 * each) * 32
        assert flops(drawn(form), True) == 2 * (2 * 4 * each) * (32 + 80)
    packed = drawn("packed")
    lengths = packed.options["cu_seqlens"].diff()
    assert flops(packed, False) == 2 * 4 * int((lengths * (lengths + 1) // 2).sum()) * 32
    cached = draw(CACHED, FP32, "causal", "cpu", 0)
    assert flops(cached, False) == 2 * (2 * 4 * (5 * 24 - 10)) * 32


def right(function: Any, problem: Problem, backward: bool = True) -> None:
    truth = SUBJECT.contract.gold(problem)
    truth = truth if backward else {"o": truth["o"]}
    assert gate(problem.run(function, backward=backward), truth, FP32) is None


class Dao:
    """flash-attention's functions, by our eager code: (B, T, H, D) in and out."""

    @staticmethod
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        window = None if window_size[0] < 0 else window_size[0] + 1
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v, Mask(causal=causal, window=window), implementation="eager")

    flash_attn_with_kvcache = flash_attn_func

    @staticmethod
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool, **_: Any
    ) -> Tensor:
        q, k, v = (t[None].transpose(1, 2) for t in (q, k, v))
        given: Any = {"cu_seqlens": cu_seqlens_q, "causal": causal, "implementation": "eager"}
        return attention(q, k, v, **given)[0]


class DaoFour:
    """The fourth release: outputs with a log-sum, no function for caches."""

    @staticmethod
    def flash_attn_func(*args: Tensor, **given: Any) -> tuple[Tensor, None]:
        return Dao.flash_attn_func(*args, **given), None

    @staticmethod
    def flash_attn_varlen_func(*args: Tensor, **given: Any) -> tuple[Tensor, None]:
        return Dao.flash_attn_varlen_func(*args, **given), None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", FORMS)
def test_peers_are_asked_for_the_same(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    releases: list[Any] = [Dao, DaoFour]
    prepare = [partial(sdpa, "sdpa", None), flex]
    prepare += [partial(flash, "flash_attn", one) for one in releases]
    for shape in (SQUARE, CACHED) if form in ("causal", "full") else (SQUARE,):
        for one in prepare:
            # FlexAttention has no backward on a CPU
            right(one(drawn(form, shape)), drawn(form, shape), backward=one is not flex)


def test_the_fourth_release_alone_is_not_the_second(tmp_path: Path, monkeypatch: Any) -> None:
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("def flash_attn_func(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        absent = {peer.name: peer.absent for peer in of_attention.peers("cuda")}
    finally:
        for name in ("flash_attn", "flash_attn.cute"):
            sys.modules.pop(name, None)
    assert absent["flash_attn 4"] is None
    assert "import flash_attn.flash_attn_interface raised" in str(absent["flash_attn 2"])
    assert absent["flash_attn 3"] == "package flash_attn_interface is not installed"


def test_packed_documents_by_torchs_own() -> None:
    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, borders: Tensor, *_: Any, **given: Any
    ) -> Tensor:
        assert given == {"window_size": (-1, 0), "enable_gqa": True}
        return Dao.flash_attn_varlen_func(q, k, v, borders, True)

    module: Any = SimpleNamespace(varlen_attn=varlen_attn)
    right(varlen(module, drawn("packed")), drawn("packed"))
    with pytest.raises(NotImplementedError, match="varlen is for packed documents"):
        varlen(module, drawn("causal"))


def test_a_peer_that_refuses_is_no_failure() -> None:
    def refuses(*_: Any, **given: Any) -> Any:
        raise RuntimeError("No available kernel.\nmore")

    module: Any = SimpleNamespace(flash_attn_func=refuses)
    with pytest.raises(NotImplementedError, match=r"fa does not serve this: No avail.*kernel\.$"):
        flash("fa", module, drawn("full"))


def test_what_would_not_fit_is_left_out() -> None:
    long = Shape("long", 1, 32, 8, 32_768, 32_768, 1, 1)
    with torch.device("meta"):
        shapes = torch.empty(*long[1:3], long.T, 1), torch.empty(1, 8, long.S, 1)
    problem = Problem({"q": shapes[0], "k": shapes[1]}, {})
    assert of_attention.left_out("eager", problem) == "its scores would take 256 GiB"
    everyone = {c.name: c for c in contenders(SUBJECT, "cpu")}
    for name in ("eager", "compile"):
        with pytest.raises(NotImplementedError, match=f"{name}: "):
            everyone[name].prepare(problem)
    assert of_attention.left_out("eager", drawn("full")) is None


def test_each_shape_is_timed_in_forms_of_its_own() -> None:
    timed = {s.name: [v.name for v in SUBJECT.variants_of(s)] for s in SUBJECT.gpu}
    assert timed["llama_8b_decode_32k"] == ["causal forward"]
    directions = ["forward", "forward+backward", "backward"]
    assert timed["llama_8b_prefill_32k"] == [f"causal {one}" for one in directions]
    assert "full forward+backward" in timed["heads_of_128"]
    groups = {(s.H // s.K, s.T == 1) for s in SUBJECT.gpu if "_groups_of_" in s.name}
    assert groups == {(group, decode) for group in (1, 2, 8, 32) for decode in (True, False)}
    on_cpu = {v.form for s in SUBJECT.cpu for v in SUBJECT.variants_of(s)}
    assert on_cpu == {*FORMS}
    assert {form for names in timed.values() for form in (n.split()[0] for n in names)} == {*FORMS}


def test_rows_and_tables_have_teraflops() -> None:
    cell = Cell.of("attention", SUBJECT.tiny[0], "float32", SUBJECT.variant("causal forward"))
    ours = Contender("mine", lambda problem: SUBJECT.eager, ours=True)
    peer = Contender("sdpa", partial(sdpa, "sdpa", None))
    rows = measure(cell, "cpu", [ours, peer], rounds=2)
    for row in rows:
        assert row["tflops"] * row["median_us"] * 1e6 == pytest.approx(row["flops"], rel=1e-3)
        assert row["product_tflops"] > 0 and row["of_product"] > 0
    text = report.summary({**document("attention", "cpu", "c0ffee"), "benchmarks": rows})
    assert "TFLOP/s  of product" in text and "matrix product: up to" in text
    assert "time of ours over that of each peer\n  sdpa: " in text
