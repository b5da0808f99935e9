"""Which keys a row sees, beside transformers' own mask builders and on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from support.families import ATTENTION, TINY, pair, tokens
from swathe.kernels.attention.api import Mask, attention
from swathe.modeling.decoder import narrowed
from swathe.modeling.masks import bidirectional_mask, causal_mask

B, T, PAST, WIDTH = 3, 8, 5, 3
PADDING = {
    "none": None,
    "ones": torch.ones(B, PAST + T, dtype=torch.long),
    "left": torch.arange(PAST + T).expand(B, -1) >= torch.tensor([[0], [2], [7]]),
    "right": torch.arange(PAST + T).expand(B, -1) < torch.tensor([[13], [9], [12]]),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1]] * B),
}
BACKENDS = ("eager", "sdpa", "triton")


class Held:
    """A cache of PAST tokens, as much of it as their builders ask."""

    is_compileable = False

    def __init__(self, past: int) -> None:
        self.past = past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    get_query_offset = get_seq_length
    is_sliding = (False,)


def theirs(builder: str, padding: Tensor | None, past: int) -> Tensor:
    """What their mask shows, (B, T, S) bool."""
    config = transformers.MistralConfig(**TINY, sliding_window=WIDTH)
    config.attention_chunk_size = WIDTH
    config._attn_implementation = "eager"
    vectors = torch.zeros(B, T, 64)
    given: dict[str, Any] = {"attention_mask": padding}
    if "bidirectional" not in builder:
        given |= {"cache": Held(past), "position_ids": torch.arange(past, past + T)[None]}
    added = getattr(masking_utils, builder)(config, vectors, **given)
    shape = (B, T, past + T)
    return torch.ones(shape).bool() if added is None else (added == 0)[:, 0].expand(shape)


def ours(builder: str, padding: Tensor | None, past: int) -> Mask:
    hidden = torch.zeros(B, T, 64)
    if "bidirectional" in builder:
        mask = bidirectional_mask(padding, hidden)
        if "sliding" in builder:
            # their window is as wide to the right, and one wider than a causal one
            return replace(mask, window=WIDTH + 1, ahead=WIDTH, rows_may_be_empty=True)
        return mask
    mask = causal_mask(padding, hidden, past)
    if "chunked" in builder:
        return replace(mask, chunk=WIDTH, rows_may_be_empty=True)
    return narrowed(mask, WIDTH) if "sliding" in builder else mask


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    ("builder", "past"),
    [
        ("create_causal_mask", 0),
        ("create_causal_mask", PAST),
        ("create_sliding_window_causal_mask", 0),
        ("create_sliding_window_causal_mask", PAST),
        ("create_chunked_causal_mask", 0),
        ("create_chunked_causal_mask", PAST),
        ("create_bidirectional_mask", 0),
        ("create_bidirectional_sliding_window_mask", 0),
    ],
)
def test_rows_see_what_theirs_see(builder: str, past: int, padding: str) -> None:
    mask = PADDING[padding]
    mask = None if mask is None else mask[:, PAST - past :]
    found = ours(builder, mask, past).visible(T, past + T, torch.device("cpu"))
    expected = theirs(builder, mask, past)
    assert torch.equal(found.expand(B, -1, -1, -1)[:, 0].expand_as(expected), expected)
    q, k, v = torch.randn(3, B, 2, past + T, 16).unbind()
    q = q[:, :, past:]
    dense = attention(q, k, v, Mask(allowed=expected[:, None]), implementation="eager")
    for backend in BACKENDS:
        o = attention(q, k, v, ours(builder, mask, past), implementation=backend)
        torch.testing.assert_close(o, dense, atol=1e-5, rtol=1e-5)
        assert not o[~expected.any(-1)].any()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss"])
def test_weights_outside_a_window_are_0(family: str) -> None:
    _, model = pair(family, "eager", sliding_window=2)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    out = model(tokens(), output_attentions=True)
    windows = [layer.window for layer in model.model.layers]
    assert 2 in windows
    for weights, window in zip(out.attentions, windows, strict=True):
        outside = (distance < 0) | (distance >= (window or 11))
        assert not weights[..., outside].any() and weights[..., ~outside].all()


# a tree of drafts after two tokens that are accepted: 2 -> 3, 2 -> 4, 3 -> 5, each sees its way
PARENTS = (-1, 0, 1, 2, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_of_drafts_in_one_forward(backend: str) -> None:
    _, model = pair("llama", {"attn": backend}, num_hidden_layers=2)
    _, eager = pair("llama", "eager", num_hidden_layers=2)
    ids = tokens(1, len(PARENTS))
    ways: list[list[int]] = []
    for node, parent in enumerate(PARENTS):
        ways.append([*(ways[parent] if parent >= 0 else ()), node])
    allowed = torch.zeros(1, 1, len(PARENTS), len(PARENTS), dtype=torch.bool)
    for node, way in enumerate(ways):
        allowed[0, 0, node, way] = True
    positions = torch.tensor([[len(way) - 1 for way in ways]])
    # bool is seen besides causality, a Mask as it is; a tree in order of its nodes is both
    for mask in (allowed, Mask(allowed=allowed)):
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[0]
        for node, way in enumerate(ways):
            alone = eager(ids[:, way]).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_a_mask_object_shows_what_comes_later(backend: str) -> None:
    _, model = pair("llama", {"attn": backend}, num_hidden_layers=1)
    everything = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    causal = model(tokens()).logits
    torch.testing.assert_close(model(tokens(), everything).logits, causal, atol=1e-5, rtol=1e-5)
    full = model(tokens(), Mask(allowed=everything)).logits
    both_ways = model(tokens(), Mask()).logits
    torch.testing.assert_close(full, both_ways, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full[:, 0], causal[:, 0], atol=1e-2)


FORMS = ("(B, S)", "(B, 1, S)", "(B, 1, 1, S)", "(B, T, S)", "(B, 1, T, S)")
HALF = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "attn"), [("gemma2", "eager"), ("mistral", "sdpa"), ("mistral", "triton")]
)
def test_windows_under_every_form(family: str, attn: str, form: str) -> None:
    """Layers with a window and layers without: each form is the 2D one on real tokens."""
    assert attn in ATTENTION[family]
    _, model = pair(family, {"attn": attn}, num_hidden_layers=2)
    padding = torch.tensor([[1] * 11, [0] * 3 + [1] * 8]).bool()
    shapes = {"(B, S)": (2, 11), "(B, 1, S)": (2, 1, 11), "(B, 1, 1, S)": (2, 1, 1, 11)}
    if form in shapes:
        mask = padding.view(shapes[form])
    else:
        mask = padding[:, None].expand(2, 11, 11)
        mask = mask if form == "(B, T, S)" else mask[:, None]
    expected = model(tokens(), padding).logits[padding]
    given = [mask, mask.long()]
    if mask.dim() == 4:
        given += [
            torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf) for dtype in HALF
        ]
    for each in given:
        found = model(tokens(), each).logits[padding]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
