"""attention: every backend against fp64, every mask part, rows that see nothing, refusals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from swathe.kernels.attention.api import (
    AttentionSpec,
    Mask,
    attention,
    attention_with_weights,
    register_attention,
    resolve_attention,
)
from swathe.kernels.core.cpp import why_unavailable
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import unregister_backend
from swathe.kernels.core.spec import ANY, FLOATS, Capabilities

BACKENDS = ("eager", "sdpa", "triton", "cpp")
B, H, T, S, D = 3, 4, 5, 8, 16


def inputs(
    kv_heads: int = 2, dtype: torch.dtype = torch.float32, queries: int = T, keys: int = S
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as projections give them: (B, H, T, D) views of (B, T, H, D) memory."""
    torch.manual_seed(0)
    made = (
        torch.randn(B, n, heads, D, dtype=dtype).transpose(1, 2).requires_grad_()
        for n, heads in ((queries, H), (keys, kv_heads), (keys, kv_heads))
    )
    q, k, v = made
    return q, k, v


def visible_by_definition(mask: Mask, queries: int = T, keys: int = S) -> Tensor:
    """The table in mask.py, evaluated one position at a time."""
    visible = torch.ones(B, H, queries, keys, dtype=torch.bool)
    for b, h, t, s in product(range(B), range(H), range(queries), range(keys)):
        position = t + keys - queries

        def row(bound: Tensor | None, b: int = b, t: int = t) -> int:
            if bound is None:
                return 0
            return int(bound[b] if bound.dim() == 1 else bound[b][t])

        def chunk_of(at: int, b: int, t: int) -> int:
            assert mask.chunk is not None
            return (at - row(mask.start, b, t)) // mask.chunk

        visible[b, h, t, s] = (
            (not mask.causal or s <= position or s < row(mask.start) + row(mask.prefix))
            and (mask.ahead is None or s <= position + mask.ahead)
            and (mask.chunk is None or chunk_of(s, b, t) == chunk_of(position, b, t))
            and (mask.window is None or s > position - mask.window)
            and (mask.start is None or s >= row(mask.start))
            and (mask.end is None or s < row(mask.end))
            and (mask.keys is None or bool(mask.keys[b, s]))
            and (mask.allowed is None or bool(mask.allowed.expand(B, H, queries, keys)[b, h, t, s]))
        )
    return visible


def by_definition(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
    """fp64 attention from the formula; rows that see nothing are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.double()
    exponent = torch.where(visible, scores, -torch.inf).exp()
    return (exponent / exponent.sum(-1, keepdim=True).clamp(min=1e-300) @ v).transpose(1, 2)


def _masks() -> dict[str, Callable[[], Mask]]:
    torch.manual_seed(1)
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1]] * B).bool()
    dense = torch.rand(B, H, T, S) > 0.3
    left, right = torch.tensor([0, 2, 4]), torch.tensor([8, 7, 3])
    return {
        "full": lambda: Mask(),
        "causal": lambda: Mask(causal=True),
        "window": lambda: Mask(causal=True, window=3),
        "both sides": lambda: Mask(window=2, ahead=1),
        "chunks": lambda: Mask(causal=True, chunk=3),
        "chunks that look ahead": lambda: Mask(chunk=3, start=left),
        "chunks after padding": lambda: Mask(causal=True, chunk=3, start=left),
        "prompt": lambda: Mask(causal=True, prefix=torch.tensor([0, 5, 8])),
        "prompt after padding": lambda: Mask(
            causal=True, prefix=torch.tensor([6, 5, 3]), start=left
        ),
        "prompt, window": lambda: Mask(causal=True, prefix=torch.tensor([0, 5, 8]), window=4),
        "left padding": lambda: Mask(causal=True, start=left),
        "right padding": lambda: Mask(causal=True, end=right),
        "both ends": lambda: Mask(start=torch.tensor([0, 2, 5]), end=right),
        "rows": lambda: Mask(start=torch.arange(T).expand(B, T), end=torch.full((B, T), 6)),
        "holes": lambda: Mask(causal=True, keys=holes),
        "dense": lambda: Mask(causal=True, allowed=dense),
        "one for all heads": lambda: Mask(allowed=dense[:1, :1]),
    }


MASKS = _masks()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_forward_and_gradients(backend: str, name: str, kv_heads: int) -> None:
    mask = MASKS[name]()
    q, k, v = inputs(kv_heads)
    visible = visible_by_definition(mask)
    assert torch.equal(mask.visible(T, S, q.device).expand(B, H, T, S), visible)

    o = attention(q, k, v, mask, implementation=backend)
    gold = by_definition(q, k, v, visible, None)
    assert o.shape == (B, T, H, D)
    torch.testing.assert_close(o, gold.float(), atol=2e-6, rtol=1e-5)

    do = torch.randn_like(o)
    ours = torch.autograd.grad(o, (q, k, v), do)
    theirs = torch.autograd.grad(gold, (q, k, v), do.double())
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 4, 8])
def test_causal_is_aligned_with_the_last_key(backend: str, queries: int) -> None:
    q, k, v = inputs(queries=queries)
    o = attention(q, k, v, causal=True, implementation=backend)
    visible = visible_by_definition(Mask(causal=True), queries)
    expected = by_definition(q, k, v, visible, None).float()
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys(backend: str) -> None:
    q, k, v = inputs(queries=8, keys=5)
    o = attention(q, k, v, causal=True, implementation=backend)
    assert torch.equal(o[:, :3], torch.zeros(B, 3, H, D))
    visible = visible_by_definition(Mask(causal=True), 8, 5)
    expected = by_definition(q, k, v, visible, None).float()
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_rows_that_see_nothing(backend: str, lowest: float) -> None:
    q, k, v = inputs()
    bias = torch.zeros(B, 1, T, S)
    bias[1] = lowest
    bias[2, :, 2] = lowest
    o = attention(q, k, v, bias, implementation=backend)
    assert not o[1].any() and not o[2, 2].any() and o[0].all()
    o.square().sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    assert not q.grad[1].any() and not q.grad[2, :, 2].any()
    assert not k.grad[1].any() and not v.grad[1].any()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v) if t.grad is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_is_added(backend: str) -> None:
    q, k, v = inputs()
    bias = torch.randn(1, H, T, S)
    o = attention(q, k, v, bias, causal=True, implementation=backend)
    visible = visible_by_definition(Mask(causal=True))
    expected = by_definition(q, k, v, visible, bias).float()
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(backend: str) -> None:
    q, k, v = (t[:1] for t in inputs(queries=8))
    mask = Mask.packed(torch.tensor([0, 3, 4, 8]), 8)
    together = attention(q, k, v, mask, implementation=backend)
    for a, b in ((0, 3), (3, 4), (4, 8)):
        parts = (t[:, :, a:b] for t in (q, k, v))
        alone = attention(*parts, causal=True, implementation=backend)
        torch.testing.assert_close(together[:, a:b], alone, atol=2e-6, rtol=1e-5)


def test_eager_takes_fp64_and_has_hugging_faces_roundings() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, v = inputs(dtype=torch.bfloat16)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    lowest = torch.finfo(torch.bfloat16).min
    added = torch.zeros(B, 1, T, S, dtype=torch.bfloat16).masked_fill(
        ~visible_by_definition(Mask(causal=True))[:, :1], lowest
    )
    expected, weights = llama.eager_attention_forward(module, q, k, v, added, D**-0.5)
    o, ours = attention_with_weights(q, k, v, AttentionSpec(Mask(causal=True), D**-0.5))
    assert torch.equal(o, expected) and torch.equal(ours, weights)

    q, k, v = inputs(dtype=torch.float64)
    o = attention(q, k, v, implementation="eager")
    gold = by_definition(q, k, v, torch.ones(B, H, T, S, dtype=torch.bool), None)
    torch.testing.assert_close(o, gold, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_scales_and_is_seeded(backend: str) -> None:
    q, k, v = inputs()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(attention(q, k, torch.ones_like(v), dropout=0.5, implementation=backend))
    assert torch.equal(*runs)
    assert not torch.allclose(runs[0], torch.ones_like(runs[0]))


def test_sdpa_forms_no_mask_and_copies_nothing_where_it_need_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a mask was formed")

    monkeypatch.setattr(Mask, "_form", refuse)
    for queries, causal in ((T, False), (1, True), (S, True)):
        q, k, v = inputs(queries=queries)
        o = attention(q, k, v, causal=causal, implementation="sdpa")
        assert o.flatten(2).data_ptr() == o.data_ptr()


def test_mask_is_formed_once_for_all_layers() -> None:
    mask = Mask(causal=True, start=torch.tensor([0, 1, 2]))
    assert mask.dense(T, S, torch.device("cpu")) is mask.dense(T, S, torch.device("cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_the_inputs(backend: str) -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(q, k.bfloat16(), v, causal=True, implementation=backend)
    low = (t.bfloat16() for t in (q, k, v))
    assert torch.equal(o, attention(*low, causal=True, implementation=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend: str) -> None:
    q, k, v = inputs()
    start = torch.tensor([0, 1, 2])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, Mask(causal=True, start=start), implementation=backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_resolve_and_use_a_choice() -> None:
    q, k, v = inputs()
    choice = resolve_attention(q, D, groups=2)
    assert choice.backend == ("sdpa" if why_unavailable() else "cpp")
    expected = attention(q, k, v, implementation=choice.backend)
    assert torch.equal(attention(q, k, v, implementation=choice), expected)
    with pytest.raises(ValueError, match="the input is on meta, but backend 'here' was chosen for"):
        here = type(choice)("attention", "here", choice.call, frozenset({"cpu"}), "here")
        attention(*(t.to("meta") for t in (q, k, v)), implementation=here)


def test_a_backend_that_cannot_give_weights_says_so() -> None:
    x = torch.empty(1)
    assert resolve_attention(x, D, weights=True).backend == "eager"
    with pytest.raises(UnsupportedFeature, match=r"'sdpa' cannot serve .*does not serve weights"):
        resolve_attention(x, D, "sdpa", weights=True)


def test_third_party_backend_gets_the_whole_mask() -> None:
    seen: list[Mask] = []

    def mine(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        seen.append(spec.mask)
        return q.transpose(1, 2)

    capabilities = Capabilities(frozenset({"cpu"}), FLOATS, {"grouped": ANY})
    register_attention("mine", mine, capabilities)
    try:
        q, k, v = inputs()
        start = torch.tensor([0, 1, 2])
        attention(q, k, v, Mask(causal=True, start=start), implementation="mine")
        assert seen[0].start is start and seen[0].causal
        with pytest.raises(ValueError, match="'mine' is registered already"):
            register_attention("mine", mine, capabilities)
        with pytest.raises(UnsupportedFeature, match="does not serve dropout"):
            attention(q, k, v, dropout=0.1, implementation="mine")
    finally:
        unregister_backend("attention", "mine")


q0, k0, v0 = inputs()
REFUSALS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "dimensions": (ValueError, "each needs four dimensions", lambda: attention(q0[0], k0, v0)),
    "head size": (ValueError, r"equal B, D, K and S", lambda: attention(q0[..., :8], k0, v0)),
    "heads": (ValueError, "4 heads and k has 3", lambda: attention(q0, *_three_heads())),
    "dtypes": (TypeError, "one floating-point dtype", lambda: attention(q0.half(), k0, v0)),
    "devices": (ValueError, "move them together", lambda: attention(q0.to("meta"), k0, v0)),
    "dropout": (ValueError, "at least 0 and below 1", lambda: attention(q0, k0, v0, dropout=1.0)),
    "mask shape": (
        ValueError,
        r"mask \(allowed\) is \(3, 1, 5, 7\).*must broadcast to \(3, 4, 5, 8\) on cpu",
        lambda: attention(q0, k0, v0, torch.ones(B, 1, T, 7).bool()),
    ),
    "start": (
        ValueError,
        r"mask \(start\) is \(2,\) on cpu; it must broadcast to \(3,\) or \(3, 5\) on cpu",
        lambda: attention(q0, k0, v0, Mask(start=torch.tensor([0, 1]))),
    ),
    "keys": (
        ValueError,
        r"mask \(keys\) is \(3, 5\) on cpu; it must broadcast to \(3, 8\)",
        lambda: attention(q0, k0, v0, Mask(keys=torch.ones(B, T).bool())),
    ),
    "five dimensions": (
        ValueError,
        r"mask \(bias\) is \(1, 3, 4, 5, 8\)",
        lambda: attention(q0, k0, v0, torch.zeros(1, B, H, T, S)),
    ),
    "mask dtype": (TypeError, r"mask\.bool\(\)", lambda: attention(q0, k0, v0, _int_mask())),
    "backend": (
        ValueError,
        r"unknown backend 'sdpaa' \(did you mean 'sdpa'\?\); allowed: .*'gluon', 'sdpa', '",
        lambda: attention(q0, k0, v0, implementation="sdpaa"),
    ),
}


def _three_heads() -> tuple[Tensor, Tensor]:
    return torch.ones(B, 3, S, D), torch.ones(B, 3, S, D)


def _int_mask() -> Tensor:
    return torch.ones(B, 1, T, S, dtype=torch.int64)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    error, message, call = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", [n for n, made in MASKS.items() if made().interval])
def test_intervals_are_two_integers_a_row(name: str) -> None:
    mask = MASKS[name]()
    first, last = mask.bounds(T, S, torch.device("cpu"))
    assert first.dtype == last.dtype == torch.int64
    assert all(bound.shape[0] in (1, B) and bound.shape[1] in (1, T) for bound in (first, last))
    key = torch.arange(S)
    seen = (key >= first[..., None]) & (key < last[..., None])
    visible = visible_by_definition(mask)[:, 0]
    assert torch.equal(seen.expand(B, T, S), visible)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "window=0; it must be 1 or more, or None"),
        ({"ahead": -1}, "ahead=-1; it must be 0 or more"),
        ({"chunk": -4}, "chunk=-4; it must be 1 or more"),
        ({"prefix": torch.ones(B)}, "prefix is given without causal=True"),
    ],
)
def test_masks_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask(**given)


def test_a_prefix_that_does_not_fit() -> None:
    q, k, v = inputs()
    mask = Mask(causal=True, prefix=torch.ones(B + 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask \(prefix\) is \(4,\)"):
        attention(q, k, v, mask)
