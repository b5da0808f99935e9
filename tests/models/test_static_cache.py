"""StaticCache: fixed buffers, a length for each sequence, padding left out, no host sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.tensors import DEVICE
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

IDS = (torch.arange(27).view(3, 9) * 7 % 49 + 1).to(DEVICE)
MASKS = {
    "left": torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2]).to(DEVICE),
    "right": torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]]).to(DEVICE),
    "holes": torch.tensor([[1] * 9, [0, 1, 1, 0, 1, 1, 1, 0, 1], [1] * 9]).to(DEVICE),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=["eager", "sdpa", "triton"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def build(attn: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        kernels="eager",
        attn_implementation=attn,
    )
    return LlamaForCausalLM(config).eval().to(DEVICE)


def alone(model: Any, row: int, ids: Tensor) -> Tensor:
    """Logits of one row's tokens, without a cache."""
    return model(ids[row : row + 1], use_cache=False).logits[0]


@pytest.mark.parametrize("padding", MASKS)
def test_every_sequence_goes_on_from_its_own_end(model: Any, padding: str) -> None:
    mask, new = MASKS[padding], IDS[:, :2] + 5
    cache = StaticCache(model.config, 12)
    first = model(IDS, attention_mask=mask, past_key_values=cache).logits
    counts = mask.sum(1).tolist()
    assert cache.lengths is not None and cache.lengths.tolist() == counts
    steps = [model(new[:, i : i + 1], past_key_values=cache).logits for i in range(2)]
    for row, real in enumerate(mask.bool()):
        whole = torch.cat((IDS[row, real], new[row]))[None]
        expected = alone(model, 0, whole)
        found = torch.cat((first[row, real], *(step[row] for step in steps)))
        torch.testing.assert_close(found, expected, **CLOSE)
    assert cache.get_seq_length() == max(counts) + 2 and cache.get_max_length() == 12


def test_pieces_with_a_mask_of_everything_so_far(model: Any) -> None:
    mask, cache = MASKS["left"], StaticCache(model.config, 9)
    parts = ((0, 4), (4, 5), (5, 9))
    found = [
        model(IDS[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in parts
    ]
    expected = model(IDS, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], **CLOSE)


def test_lengths_set_on_the_device_are_what_counts(model: Any) -> None:
    cache, other = StaticCache(model.config, 12), DynamicCache()
    model(IDS, past_key_values=cache)
    assert cache.lengths is not None
    where = cache.lengths.data_ptr()
    cache.crop(-4)
    assert cache.lengths.tolist() == [5, 5, 5] and cache.get_mask_sizes(1) == (12, 0)
    model(IDS[:, :5], past_key_values=other)
    found, expected = (model(IDS[:, 7:], past_key_values=c).logits for c in (cache, other))
    torch.testing.assert_close(found, expected, **CLOSE)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    other.reorder_cache(torch.tensor([2, 2, 0]))
    found, expected = (model(IDS[:, :1], past_key_values=c).logits for c in (cache, other))
    torch.testing.assert_close(found, expected, **CLOSE)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.lengths.data_ptr() == where
    torch.testing.assert_close(model(IDS, past_key_values=cache).logits, model(IDS).logits, **CLOSE)


def test_rows_are_repeated_and_selected(model: Any) -> None:
    cache, other = StaticCache(model.config, 12), DynamicCache()
    cache.batch_repeat_interleave(5)
    assert cache.batch_size is None
    mask = MASKS["left"]
    for some in (cache, other):
        model(IDS, attention_mask=mask, past_key_values=some)
        some.batch_repeat_interleave(2)
        some.batch_select_indices(torch.tensor([5, 1, 0, 2]))
    assert cache.lengths is not None and cache.lengths.tolist() == [2, 9, 9, 6]
    assert cache.batch_size == other.batch_size == 4
    wide = mask.repeat_interleave(2, 0)[[5, 1, 0, 2]]
    new = IDS[:1, :2].expand(4, 2)
    given = {"attention_mask": torch.cat((wide, torch.ones_like(new)), 1)}
    expected = model(new, past_key_values=other, **given).logits
    torch.testing.assert_close(model(new, past_key_values=cache).logits, expected, **CLOSE)


def test_a_smaller_cache_is_taken_over(model: Any) -> None:
    cache, small, other = (
        StaticCache(model.config, 12),
        StaticCache(model.config, 9),
        DynamicCache(),
    )
    with pytest.raises(ValueError, match=r"None rows of 9 tokens do not fit into None of 12; both"):
        cache.take_over(small)
    model(IDS.flip(1), past_key_values=cache)
    held = [pair[0].data_ptr() for pair in cache._buffers if pair]
    for some in (small, other):
        model(IDS[:, :8], past_key_values=some)
    cache.take_over(small)
    assert [pair[0].data_ptr() for pair in cache._buffers if pair] == held
    expected = model(IDS[:, 8:], past_key_values=other).logits
    torch.testing.assert_close(model(IDS[:, 8:], past_key_values=cache).logits, expected, **CLOSE)
    assert cache.get_seq_length() == 9 and small.get_seq_length() == 8
    with pytest.raises(ValueError, match="3 rows of 12 tokens do not fit into 3 of 9"):
        small.take_over(cache)
    small.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"6 rows of 9 tokens .* into 3 of 12; .* equal rows"):
        cache.take_over(small)


def test_a_compiled_step_serves_every_length() -> None:
    torch.compiler.reset()
    model, graphs = build("sdpa"), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    cache, other = StaticCache(model.config, 16), DynamicCache()
    step = torch.compile(model.model, backend=count, fullgraph=True)
    for some in (cache, other):
        model(IDS, past_key_values=some)
    for at in range(4):
        new = IDS[:, at : at + 1]
        found = step(new, past_key_values=cache).last_hidden_state
        expected = model.model(new, past_key_values=other).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_serves_every_length() -> None:
    model = build("triton").bfloat16()
    cache, other, new = StaticCache(model.config, 600), DynamicCache(), IDS[:, :1].clone()
    for some in (cache, other):
        model(IDS, past_key_values=some)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(new, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(side)
    cache.crop(-1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(new, past_key_values=cache).logits
    for step in range(500):
        new.fill_(1 + step % 40)
        graph.replay()
        expected = model(new, past_key_values=other).logits
        torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


def test_refusals() -> None:
    model = build("eager")
    with pytest.raises(ValueError, match="max_cache_len=0; it must be 1 or more"):
        StaticCache(model.config, 0)
    cache = StaticCache(model.config, 10)
    with pytest.raises(ValueError, match="call advance for them first"):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"no gradient; use torch.no_grad"):
        model(IDS, past_key_values=cache)
    cache.reset()
    model(IDS, attention_mask=MASKS["right"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"would hold 11 tokens, but max_cache_len is 10"):
        model(IDS[:, :2], past_key_values=cache)
    assert cache.lengths is not None and cache.lengths.tolist() == [9, 4, 8]
    with pytest.raises(ValueError, match=r"holds 3 sequences, and 2 come"):
        model(IDS[:2, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"\(3, 1, 1, 1\); .* needs \(3, 1\), or \(3, 10\)"):
        model(IDS[:, :1], attention_mask=torch.ones(3, 1, 1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove=2; pass a negative"):
        cache.crop(2)
    with pytest.raises(ValueError, match=r"'paged'; allowed: \(None, 'dynamic', 'static'\)"):
        model.generate(IDS, max_new_tokens=1, cache_implementation="paged")
