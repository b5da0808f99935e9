"""DummyBert's relative positions beside a loop over queries and keys, and their tables resized."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.dummy_bert import (
    BACKENDS,
    CROSSED,
    KINDS,
    LOOSE,
    RELATIVE,
    RIGHT,
    SEEN,
    STATES,
    dummy,
)
from support.tiny_bert import CLOSE, IDS, TINY, TYPES, T
from swathe.kernels.attention.api import Mask
from swathe.modeling.examples.dummy_bert import DummyBertModel

HEADS, SIZE = 4, 8
ENCODER = {"encoder_hidden_states": STATES, "encoder_attention_mask": SEEN}


class Reference:
    """The model again, written from its definition over the same Parameters, without dropout."""

    def __init__(self, model: Any) -> None:
        self.p = dict(model.named_parameters())
        self.kind = model.config.position_embedding_type
        self.causal = model.config.is_decoder
        self.layers = model.config.num_hidden_layers

    def __call__(self, ids: Tensor, types: Tensor, visible: Tensor) -> Tensor:
        p = self.p
        x = p["embeddings.word_embeddings.weight"][ids]
        x = self.norm(x + p["embeddings.token_type_embeddings.weight"][types], "embeddings")
        for i in range(self.layers):
            at = f"encoder.layer.{i}"
            attended = self.attention(x, visible, f"{at}.attention.self")
            x = self.added(attended, x, f"{at}.attention.output")
            wide = F.gelu(self.linear(x, f"{at}.intermediate.dense"))
            x = self.added(wide, x, f"{at}.output")
        return x

    def linear(self, x: Tensor, at: str) -> Tensor:
        return x @ self.p[f"{at}.weight"].T + self.p[f"{at}.bias"]

    def norm(self, x: Tensor, at: str) -> Tensor:
        weight, bias = (self.p[f"{at}.LayerNorm.{name}"] for name in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)

    def added(self, x: Tensor, residual: Tensor, at: str) -> Tensor:
        return self.norm(self.linear(x, f"{at}.dense") + residual, at)

    def attention(self, x: Tensor, visible: Tensor, at: str) -> Tensor:
        q, k, v = (
            self.linear(x, f"{at}.{name}").unflatten(-1, (HEADS, SIZE))  # (B, T, H, D)
            for name in ("query", "key", "value")
        )
        table = self.p[f"{at}.distance_embedding.weight"]
        rows = []
        for left in range(x.shape[1]):
            scores = []
            for right in range(x.shape[1]):
                e = table[left - right + len(table) // 2]
                score = (q[:, left] * k[:, right]).sum(-1) + q[:, left] @ e
                if self.kind == "relative_key_query":
                    score = score + k[:, right] @ e
                hidden = ~visible[:, right, None] | (self.causal and right > left)
                scores.append((score / SIZE**0.5).masked_fill(hidden, float("-inf")))
            weights = torch.softmax(torch.stack(scores, -1), -1)  # (B, H, S)
            rows.append(torch.einsum("bhs,bshd->bhd", weights, v).flatten(1))
        return torch.stack(rows, 1)


@pytest.mark.parametrize("attn", BACKENDS)
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("kind", RELATIVE)
def test_states_and_every_gradient(kind: str, is_decoder: bool, attn: str) -> None:
    model = dummy("Model", attn, position_embedding_type=kind, is_decoder=is_decoder).train()
    weights = torch.randn(*IDS.shape, TINY["hidden_size"]) * RIGHT[..., None] / RIGHT.sum()
    expected = Reference(model)(IDS, TYPES, RIGHT.bool())
    (expected * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model(IDS, attention_mask=RIGHT, token_type_ids=TYPES).last_hidden_state
    torch.testing.assert_close(found * RIGHT[..., None], expected * RIGHT[..., None], **LOOSE)
    (found * weights).sum().backward()
    without = {"embeddings.position_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias"}
    assert {n for n, _ in model.named_parameters()} - set(gradients) == without
    for name, expected in gradients.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad,
            expected,
            atol=1e-5,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n} {m}",
        )


@pytest.mark.parametrize("kind", RELATIVE)
def test_eager_is_exact_in_fp64(kind: str) -> None:
    model = dummy(position_embedding_type=kind, is_decoder=True).double()
    expected = Reference(model)(IDS, TYPES, torch.ones_like(IDS).bool())
    found = model(IDS, token_type_ids=TYPES, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    named = dict(model.named_parameters())
    names = [n for n in named if "distance" in n or n.endswith(("query.weight", "key.weight"))]
    pairs = (
        torch.autograd.grad(o.square().sum(), [named[n] for n in names]) for o in (found, expected)
    )
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("attn", BACKENDS)
def test_kinds_differ_and_only_the_order_counts(attn: str) -> None:
    found = [dummy("Model", attn, position_embedding_type=kind)(IDS)[0] for kind in KINDS]
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in pairwise(found))
    # tokens moved behind padding of the left see each other as before
    model = dummy("Model", attn, position_embedding_type="relative_key_query")
    mask = torch.cat((torch.zeros(3, 5), torch.ones(3, T)), dim=1)
    padded = model(F.pad(IDS, (5, 0)), attention_mask=mask)[0]
    torch.testing.assert_close(padded[:, 5:], found[2], **LOOSE)
    with pytest.raises(ValueError, match="only the order of tokens counts; leave them out"):
        model(IDS, position_ids=torch.arange(T)[None])
    with pytest.raises(ValueError, match="have 25 tokens; the model has positions"):
        model(torch.ones(1, 25).long())


@pytest.mark.parametrize("attn", BACKENDS)
@pytest.mark.parametrize("kind", RELATIVE)
def test_terms_come_on_top_of_a_mask_that_adds(kind: str, attn: str) -> None:
    model = dummy("Model", attn, position_embedding_type=kind)
    allowed = (torch.rand(3, 1, T, T) > 0.4) | torch.eye(T).bool()
    expected = model(IDS, attention_mask=allowed)[0]
    for lowest in (float("-inf"), torch.finfo(torch.float32).min):
        added = torch.zeros(3, 1, T, T).masked_fill(~allowed, lowest)
        torch.testing.assert_close(model(IDS, attention_mask=added)[0], expected, **LOOSE)
    soft = torch.randn(3, 4, T, T)
    found = model(IDS, attention_mask=soft)[0]
    assert not torch.allclose(found, model(IDS)[0], atol=1e-2)
    torch.testing.assert_close(found, model(IDS, attention_mask=Mask(bias=soft))[0], **CLOSE)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, model(IDS, attention_mask=soft)[0], **LOOSE)


@pytest.mark.parametrize("attn", BACKENDS)
def test_nothing_of_padding_alone(attn: str) -> None:
    model = dummy("Model", attn, position_embedding_type="relative_key_query")
    mask = torch.ones_like(IDS)
    mask[1] = 0
    hidden = model(IDS, attention_mask=mask)[0]
    torch.testing.assert_close(hidden[[0, 2]], model(IDS[[0, 2]])[0], **LOOSE)
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", RELATIVE)
def test_weights_are_of_the_scores_with_terms(kind: str) -> None:
    model = dummy(position_embedding_type=kind, **CROSSED)
    found = model(IDS, output_attentions=True, attention_mask=RIGHT, **ENCODER)
    plain = model.encoder.layer[0].attention.self
    plain.kind, plain.distance_embedding = "absolute", None
    without = model(IDS, output_attentions=True, attention_mask=RIGHT, **ENCODER)
    one, other = found.attentions[0], without.attentions[0]
    torch.testing.assert_close(one.sum(-1), torch.ones(3, HEADS, T))
    assert not torch.allclose(one, other, atol=1e-2)
    assert not one[1, :, :, 4:].any() and not one.triu(1).any()
    # distances to an encoder's states mean nothing: there are no tables
    names = [n for n in dummy(position_embedding_type=kind, **CROSSED).state_dict() if "dist" in n]
    assert names == [f"encoder.layer.{i}.attention.self.distance_embedding.weight" for i in (0, 1)]


@pytest.mark.parametrize("kind", RELATIVE)
def test_bf16_is_a_few_roundings_away(kind: str) -> None:
    exact = dummy(position_embedding_type=kind).double()(IDS, attention_mask=RIGHT)[0]
    for attn in BACKENDS:
        model = dummy("Model", attn, position_embedding_type=kind).to(torch.bfloat16)
        found = model(IDS, attention_mask=RIGHT)[0]
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() <= 2**-5 * exact.norm()


@pytest.mark.parametrize("kind", RELATIVE)
def test_compiles_in_one_graph_and_runs_under_autocast(kind: str) -> None:
    options = {**CROSSED, "position_embedding_type": kind, "num_hidden_layers": 1}
    model = dummy("Model", "sdpa", **options)
    inputs = {"attention_mask": RIGHT, "use_cache": False, **ENCODER}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(IDS, **inputs)[0]
    torch.testing.assert_close(compiled(IDS, **inputs)[0], expected, **CLOSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(IDS, **inputs)[0]
    assert 0 < (found - expected).norm() <= 2**-6 * expected.norm()


# tables of another length


@pytest.mark.parametrize("kind", KINDS)
def test_more_positions(kind: str) -> None:
    model = dummy(position_embedding_type=kind)
    expected, before = model(IDS)[0], dict(model.named_parameters())
    model.resize_position_embeddings(40)
    assert model.config.max_position_embeddings == 40
    torch.testing.assert_close(model(IDS)[0], expected, **CLOSE)
    assert model(torch.ones(1, 40).long())[0].isfinite().all()
    assert all(before[n] is p for n, p in model.named_parameters())
    replaced = dict(model.resize_report.replaced)
    assert replaced.pop("embeddings.position_embeddings.weight") == ((24, 32), (40, 32))
    tables = [n for n in model.state_dict() if "distance" in n]
    assert replaced == dict.fromkeys(tables, ((47, 8), (79, 8)))
    for name in tables:
        table = model.get_parameter(name)
        assert table.shape == (79, 8) and 0.1 < table[:16].std() < 0.3  # initializer_range 0.2
    again = DummyBertModel(model.config).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(IDS)[0], expected, **CLOSE)


@pytest.mark.parametrize("kind", RELATIVE)
def test_fewer_positions(kind: str) -> None:
    model = dummy("ForMaskedLM", position_embedding_type=kind)
    expected = model(IDS).logits
    model.resize_position_embeddings(T)
    torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
    assert model.dummy_bert.encoder.layer[1].attention.self.distance_embedding.num_embeddings == 21
    with pytest.raises(ValueError, match=r"have 12 tokens; the model has positions for .*=11"):
        model(torch.ones(1, 12).long())


def test_the_table_that_relative_kinds_do_not_read_is_not_trained() -> None:
    model = dummy(position_embedding_type="relative_key")
    expected = model(IDS)[0]
    table = model.embeddings.position_embeddings.weight
    assert not table.requires_grad and table.shape == (24, 32)
    with torch.no_grad():
        table.normal_()
    assert torch.equal(model(IDS)[0], expected)
    assert dummy().embeddings.position_embeddings.weight.requires_grad
