"""Row intervals say what transformers' own dense masks say, for every mask function it has."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils as theirs

from support.hf_attention import NEWER, padding
from swathe.kernels.core.debug import debug
from swathe.modeling.hf import masks
from swathe.modeling.hf.masks import interval_mask, intervals_of

NONE = torch.zeros(3, dtype=torch.long)
LEFT = torch.tensor([4, 1, 0])
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "causal": lambda: theirs.causal_mask_function,
    "full": lambda: theirs.bidirectional_mask_function,
    "window": lambda: theirs.sliding_window_causal_mask_function(3),
    "both ways": lambda: theirs.sliding_window_bidirectional_mask_function(2),
    "chunk": lambda: theirs.chunked_causal_mask_function(4, NONE),
    "chunk after padding": lambda: theirs.chunked_causal_mask_function(4, LEFT),
}


def dense(mask: Tensor, T: int, S: int) -> Tensor:
    """bool (B, 1, T, S) of whatever interval_mask returned."""
    if mask.dtype == torch.bool:
        return mask
    return intervals_of(mask, T, S).visible(T, S, mask.device)


def both(B: int, T: int, S: int, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Our mask, what it shows, and what transformers' dense one shows."""
    given = {"batch_size": B, "q_length": T, "kv_length": S, **given}
    found = interval_mask(**given)
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    expected = theirs.sdpa_mask(**given)
    assert expected is not None
    return found, dense(found, T, S), expected


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_of_theirs(name: str, side: str) -> None:
    given = {} if side == "none" else {"attention_mask": padding(side).bool()}
    mask, found, expected = both(3, 11, 11, mask_function=FUNCTIONS[name](), **given)
    assert mask.dtype == torch.int32
    assert mask.shape == (3, 1, 11 if side != "holes" else 17, 2)
    assert torch.equal(found.expand_as(expected), expected)


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_a_graph(name: str, side: str) -> None:
    given = {} if side == "none" else {"attention_mask": padding(side).bool()}
    given |= {"batch_size": 3, "q_length": 11, "kv_length": 11}

    def make(x: Tensor) -> Tensor:
        # as transformers does: the function is made inside of the graph
        return interval_mask(mask_function=FUNCTIONS[name](), **given) + x

    eager = interval_mask(mask_function=FUNCTIONS[name](), **given)
    found = torch.compile(make, backend="eager", fullgraph=True)(torch.zeros((), dtype=torch.int32))
    assert torch.equal(dense(found, 11, 11), dense(eager, 11, 11))
    torch._dynamo.reset()


@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.integers(1, 6),
    st.integers(0, 9),
    st.integers(0, 5),
    st.integers(0, 4),
    st.booleans(),
)
def test_caches(name: str, T: int, past: int, room: int, dropped: int, tensor: bool) -> None:
    """T tokens after `past`; room for more in the cache; the first `dropped` keys gone."""
    dropped = min(dropped, past)
    mask = torch.ones(3, past + T, dtype=torch.bool)
    mask[0, : min(4, past)] = False
    given = {
        "q_offset": torch.tensor(past) if tensor else past,
        "kv_offset": dropped,
        "attention_mask": mask,
        "mask_function": FUNCTIONS[name](),
    }
    _, found, expected = both(3, T, past + T + room - dropped, **given)
    assert torch.equal(found.expand_as(expected), expected)


@pytest.mark.parametrize("name", ["causal", "window", "chunk"])
def test_packed_documents(name: str) -> None:
    positions = torch.cat([torch.arange(n) for n in (4, 1, 6)])[None].expand(3, -1)
    numbers = theirs.find_packed_sequence_indices(positions)
    assert numbers is not None
    function = FUNCTIONS[name]()
    if NEWER:
        function = theirs.remap_positions_for_packed_sequence(function, positions)
    function = theirs.and_masks(function, theirs.packed_sequence_mask_function(numbers))
    mask, found, expected = both(3, 11, 11, mask_function=function, allow_is_causal_skip=False)
    assert mask.dtype == torch.int32 and mask.shape == (3, 1, 11, 2)
    assert torch.equal(found, expected)


def test_blocks_of_images_are_intervals_too() -> None:
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1]]).expand(3, -1)
    function = theirs.or_masks(FUNCTIONS["window"](), theirs.blockwise_overlay(blocks))
    mask, found, expected = both(3, 11, 11, mask_function=function, allow_is_causal_skip=False)
    assert mask.dtype == torch.int32 and torch.equal(found, expected)


def even(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q - kv) % 2 == 0


@pytest.mark.parametrize("vmap", [False, True])
def test_what_is_no_interval_is_dense(vmap: bool) -> None:
    function = theirs.and_masks(theirs.causal_mask_function, even)
    given = {"mask_function": function, "attention_mask": padding("left").bool()}
    mask, found, expected = both(3, 11, 11, use_vmap=vmap, **given)
    assert mask.dtype == torch.bool and torch.equal(found, expected)


def test_a_graph_says_so_when_rows_are_no_intervals() -> None:
    def make(x: Tensor) -> Tensor:
        function = theirs.and_masks(theirs.causal_mask_function, even)
        return interval_mask(1, 5, 5, mask_function=function) + x

    compiled = torch.compile(make, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="use attn_implementation='sdpa'"):
        compiled(torch.zeros((), dtype=torch.int32))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (None, {"allow_is_causal_skip": False}),
        (SimpleNamespace(model_type="x", layer_types=["indexed_attention"]), {}),
    ],
)
def test_models_that_work_on_masks_get_the_eager_one(config: Any, given: dict[str, Any]) -> None:
    given |= {"batch_size": 3, "q_length": 4, "kv_length": 9, "q_offset": 5, "config": config}
    found = interval_mask(dtype=torch.bfloat16, **given)
    expected = theirs.eager_mask(dtype=torch.bfloat16, **given)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_padding_is_not_looked_at_where_that_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every mask of padding is handed on, and none is read."""
    monkeypatch.setattr(masks, "looked_at", lambda held: False)
    monkeypatch.setattr(Tensor, "__bool__", lambda self: pytest.fail("a tensor was waited for"))
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a tensor was waited for"))
    for side in ("left", "right", "holes"):
        for name, make in FUNCTIONS.items():
            given = {"mask_function": make(), "attention_mask": padding(side).bool()}
            mask = interval_mask(3, 11, 11, **given)
            assert mask.shape == (3, 1, 17, 2), name
    monkeypatch.undo()
    expected = theirs.sdpa_mask(3, 11, 11, allow_is_causal_skip=False, **given)
    assert expected is not None
    assert torch.equal(dense(mask, 11, 11), expected)


def test_debugging_looks_everywhere() -> None:
    with debug():
        mask = interval_mask(3, 11, 11, attention_mask=padding("left").bool())
    assert mask.shape == (3, 1, 11, 2)


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 1, 4, 2).int(), torch.zeros(1, 1, 5, 9).int(), torch.zeros(5, 9).int()]
)
def test_tensors_of_other_lengths(mask: Tensor) -> None:
    message = f"attention mask {tuple(mask.shape)} of torch.int32 is not one that was made for 5"
    with pytest.raises(ValueError, match=re.escape(message)):
        intervals_of(mask, 5, 9)


def test_theirs_is_what_is_recognised() -> None:
    """A transformers that names its closures otherwise is slower; this says so."""
    kinds = {kind for code, kind in masks._KINDS.items() if not isinstance(code, str)}
    newer = {"remapped"} if NEWER else set()
    assert kinds == {"and", "window", "around", "chunk", "documents"} | newer
