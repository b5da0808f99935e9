"""DynamicCache: what it returns, how it grows, and under gradients; outputs as containers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from swathe.modeling.cache import DynamicCache
from swathe.modeling.cache_layers import FIRST_CAPACITY
from swathe.modeling.outputs import CausalLMOutputWithPast

B, K, D = 2, 3, 4


def chunk(length: int, batch: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, K, length, D), torch.randn(batch, K, length, D)


@pytest.mark.parametrize("lengths", [(1,) * 70, (5, 1, 200, 1), (64, 64, 1), (0, 3)])
def test_everything_given_comes_back(lengths: tuple[int, ...]) -> None:
    cache, given = DynamicCache(), [chunk(n) for n in lengths]
    for k, v in given:
        keys, values = cache.update(k, v, 0)
        assert cache.get_mask_sizes(3) == (cache.get_seq_length() + 3, 0)
    assert torch.equal(keys, torch.cat([k for k, _ in given], 2))
    assert torch.equal(values, torch.cat([v for _, v in given], 2))
    assert cache.get_seq_length() == sum(lengths) and cache.get_max_length() == -1


def test_growth_is_amortised() -> None:
    cache, buffers = DynamicCache(), set()
    for _ in range(8 * FIRST_CAPACITY):
        keys, _ = cache.update(*chunk(1), 0)
        buffers.add(keys.data_ptr())
    assert len(buffers) <= 6


def test_layers_rows_and_crops() -> None:
    cache = DynamicCache()
    k0, v0 = chunk(5)
    cache.update(k0, v0, 0)
    k1, _ = cache.update(*chunk(5), 1)
    assert (len(cache), cache.batch_size, repr(cache)) == (2, B, "DynamicCache(layers=2, tokens=5)")
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    none = torch.zeros(2 * B, K, 0, D)
    keys, values = cache.update(none, none, 0)
    order = [1, 1, 0, 0]
    assert torch.equal(keys, k0[order, :, :3]) and torch.equal(values, v0[order, :, :3])
    assert torch.equal(cache.update(none, none, 1)[0], k1[order, :, :3])
    cache.crop(0)
    assert cache.get_seq_length(1) == 3 and cache.get_seq_length(7) == 0
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size is None
    assert cache.update(*chunk(1, batch=1), 0)[0].shape == (1, K, 1, D)


def test_gradients_reach_what_was_cached() -> None:
    cache = DynamicCache()
    first, second = chunk(3)[0].requires_grad_(), chunk(2)[0].requires_grad_()
    early, _ = cache.update(first, first, 0)
    loss = early.square().sum()
    late, _ = cache.update(second, second, 0)
    (loss + late.square().sum()).backward()
    torch.testing.assert_close(first.grad, 4 * first.detach())
    torch.testing.assert_close(second.grad, 2 * second.detach())
    with torch.no_grad():
        keys, _ = cache.update(*chunk(1), 0)
    assert keys.shape[2] == 6 and not keys.requires_grad
    assert torch.equal(keys[:, :, :3], first)


def test_refusals() -> None:
    cache = DynamicCache()
    cache.update(*chunk(2), 0)
    with pytest.raises(ValueError, match=r"layer 0 holds .*\(2, 3, 4, torch.float32.*given \(1, 3"):
        cache.update(*chunk(2, batch=1), 0)
    with pytest.raises(ValueError, match=r"given \(2, 3, 4, torch.float16"):
        cache.update(*(t.half() for t in chunk(2)), 0)
    assert cache.get_seq_length() == 2
    with pytest.raises(ValueError, match=r"tokens_to_remove=3; pass a negative number"):
        cache.crop(3)


def test_outputs_are_hugging_faces_containers() -> None:
    out = CausalLMOutputWithPast(logits=torch.ones(2), hidden_states=(torch.zeros(1),))
    assert list(out) == ["logits", "hidden_states"] == list(out.keys()) and len(out) == 2
    assert out[0] is out.logits is out["logits"] and out[:1] == (out.logits,)
    assert out.to_tuple() == (out.logits, out.hidden_states) and "loss" not in out
    assert dict(out.items())["hidden_states"] is out.hidden_states
    with pytest.raises(KeyError, match=r"has no 'loss'; it has \['logits', 'hidden_states'\]"):
        _ = out["loss"]
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert type(doubled) is CausalLMOutputWithPast and doubled.logits.tolist() == [2, 2]
    paths = [str(path[0]) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert paths[0] == "['logits']"
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert torch.equal(other.logits, out.logits) and other.loss is None
