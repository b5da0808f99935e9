"""What surrounds attention in torch: graphs, checkpoints, layouts, autocast, what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.families import tokens
from support.hf_attention import attention_of, example, made, padding, run
from swathe.modeling.hf import attention
from swathe.modeling.hf.attention import FORWARDS
from swathe.modeling.hf.generation import CACHE
from swathe.modeling.hf.masks import interval_mask

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class Counting:
    """A compiler that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.mark.parametrize("side", ["none", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_graph(name: str, side: str) -> None:
    model, at, count = made(name), example(name, side), Counting()
    torch._dynamo.reset()
    with attention_of(model, "swathe"):
        expected = run(model, at)
        compiled = torch.compile(model, backend=count, fullgraph=True)
        logits = compiled(**at.inputs, use_cache=False).logits[at.real]
        torch.testing.assert_close(logits, expected[0], **CLOSE)
    assert count.graphs == 1
    torch._dynamo.reset()


def test_compiled_training() -> None:
    model, at = made("gemma2"), example("gemma2", "right")
    torch._dynamo.reset()
    with attention_of(model, "swathe"):
        expected = run(model, at)
        found = run(torch.compile(model, backend="aot_eager", fullgraph=True), at)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    # the compiled module's parameters have a prefix
    for mine, other in zip(found[1].values(), expected[1].values(), strict=True):
        assert (mine - other).norm() <= 1e-4 * (1 + other.norm())
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(name: str) -> None:
    model, ids, count = made(name), tokens(3), Counting()
    expected = model(ids).logits[:, 7:]
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    torch._dynamo.reset()
    with attention_of(model, "swathe"):
        model(ids[:, :7], **{CACHE: cache})
        step = torch.compile(model, backend=count, fullgraph=True)
        pieces = [step(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(7, 11)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)
    assert count.graphs <= 2  # a window's length is a number that the first step does not know
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, at = copy.deepcopy(made(name)), example(name, "left")
    with attention_of(model, "swathe"):
        expected = run(model, at)
        # transformers renamed it
        older = model.gradient_checkpointing_enable
        enable = getattr(model.train(), "activation_checkpointing_enable", older)
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = run(model, at)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert found[1].keys() == expected[1].keys()
    for name, other in expected[1].items():
        assert (found[1][name] - other).norm() <= 1e-4 * (1 + other.norm()), name


def heads(dtype: torch.dtype = torch.float32, B: int = 2, T: int = 5) -> list[Tensor]:
    """q, k and v as projections give them: (B, H, T, D) views of (B, T, H, D) memory."""
    return [torch.randn(B, T, H, 16, dtype=dtype).transpose(1, 2) for H in (4, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["swathe", "triton"])
def test_outputs_are_dense_and_of_the_inputs_dtype(name: str, dtype: torch.dtype) -> None:
    o, weights = FORWARDS[name](nn.Module(), *heads(dtype))
    assert weights is None and o.dtype == dtype
    assert o.shape == (2, 5, 4, 16) and o.is_contiguous()


def test_double_is_served_by_torch() -> None:
    q, k, v = heads(torch.float64)
    o, _ = FORWARDS["swathe"](nn.Module(), q, k, v)
    assert o.dtype == torch.float64 and o.is_contiguous()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o, expected.transpose(1, 2))


def test_autocast() -> None:
    model, at = made("llama"), example("llama", "left")
    with attention_of(model, "swathe"), torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, at)
    exact = run(model, at)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = run(model, at)
    assert (found[0] - exact[0]).norm() <= 1.25 * (theirs[0] - exact[0]).norm()


def test_learned_queries_of_one_sequence() -> None:
    q, k, v = heads()
    o, _ = FORWARDS["swathe"](nn.Module(), q[:1], k, v, is_causal=False)
    expected, _ = FORWARDS["swathe"](
        nn.Module(), q[:1].expand(2, -1, -1, -1), k, v, is_causal=False
    )
    assert torch.equal(o, expected)


def test_sinks_of_every_row() -> None:
    """As inkling2 has them: a logit beside each row's scores, whose weight is thrown away."""
    q, k, v = (t.double().requires_grad_() for t in heads())
    sinks = torch.randn(2, 4, 5, 1, dtype=torch.float64, requires_grad=True)
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    z = (q @ wide_k.transpose(2, 3) / 4).masked_fill(~torch.ones(5, 5).tril().bool(), -1e30)
    expected = (torch.cat((z, sinks), -1).softmax(-1)[..., :-1] @ wide_v).transpose(1, 2)
    inputs = (q, k, v, sinks)
    true = torch.autograd.grad(expected.square().sum(), inputs)
    single = [t.detach().float().requires_grad_() for t in inputs]
    o, _ = FORWARDS["swathe"](nn.Module(), *single[:3], sinks=single[3])
    torch.testing.assert_close(o, expected.float(), **CLOSE)
    found = torch.autograd.grad(o.square().sum(), single)
    for mine, other in zip(found, true, strict=True):
        torch.testing.assert_close(mine, other.float(), **CLOSE)


def test_keys_that_an_indexer_picked() -> None:
    q, k, v = heads()
    picked = torch.stack([torch.randperm(5)[:3] for _ in range(10)]).view(2, 5, 3)
    picked[..., 0] = torch.arange(5)  # or a row may see nothing
    allowed = torch.zeros(2, 5, 5, dtype=torch.bool).scatter(-1, picked, True)[:, None].tril()
    mask = interval_mask(2, 5, 5)
    found, _ = FORWARDS["swathe"](nn.Module(), q, k, v, mask, indices=picked.int())
    expected, _ = FORWARDS["swathe"](nn.Module(), q, k, v, allowed)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_masks_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[str] = []
    real = attention._made

    def spy(given: Tensor | None, *rest: Any) -> Any:
        made_of.append(str(None if given is None else given.dtype))
        return real(given, *rest)

    monkeypatch.setattr(attention, "_made", spy)
    model = made("gemma3_text")  # seven layers of two kinds
    with attention_of(model, "swathe"), torch.no_grad():
        model(tokens(3), attention_mask=padding("left"))
    assert made_of == ["torch.int32"] * 2
    assert not [kept for kept in attention._kept if kept.tensors[0] is not None]  # they are gone


class Shapes(TorchDispatchMode):
    """The shapes of all that torch's operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.seen |= {t.shape for t in tree_leaves(found) if isinstance(t, Tensor)}
        return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "llama4_text", "bert"])
def test_no_mask_of_queries_by_keys(name: str) -> None:
    model, ids = made(name), tokens(2, 61)
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[0, :7] = mask[1, 3] = 0  # one has a hole
    for given in ({}, {"attention_mask": mask}):
        for attn, squares in (("swathe", False), ("eager", True)):
            with attention_of(model, attn), Shapes() as shapes:
                model(ids, **given).logits.sum().backward()
            assert any(shape[-2:] == (61, 61) for shape in shapes.seen) == squares, attn


def test_what_is_kept_is_not_mistaken() -> None:
    """The same tensor with other values, and a mask first made where nothing may need gradients."""
    call, (q, k, v) = FORWARDS["swathe"], heads()
    mask = interval_mask(
        2, 5, 5, attention_mask=torch.ones(2, 5).bool().index_fill(1, torch.tensor([0]), False)
    )
    hidden, _ = call(nn.Module(), q, k, v, mask)
    mask.copy_(interval_mask(2, 5, 5))
    seen, _ = call(nn.Module(), q, k, v, mask)
    assert not torch.allclose(hidden, seen)
    assert torch.equal(seen, call(nn.Module(), q, k, v, interval_mask(2, 5, 5))[0])
    with torch.inference_mode():
        call(nn.Module(), *heads(T=6))
    inputs = [t.requires_grad_() for t in heads(T=6)]
    call(nn.Module(), *inputs)[0].sum().backward()
    assert all(t.grad is not None for t in inputs)


def test_nothing_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "__bool__", lambda self: pytest.fail("a tensor was waited for"))
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a tensor was waited for"))
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("a tensor was waited for"))
    q, k, v = heads(B=1)
    borders = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders.clone(), "max_length_q": 3}
    for mask in (None, interval_mask(1, 5, 5)):
        FORWARDS["swathe"](nn.Module(), q, k, v, mask, **packed)
