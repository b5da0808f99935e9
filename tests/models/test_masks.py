"""Every mask form: what it becomes, that causality survives it, and which shapes are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swathe.kernels.attention.api import Mask
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM
from swathe.modeling.masks import bidirectional_mask, causal_mask

B, T = 3, 6
ATTENTION = ("eager", "sdpa", "triton")
ALLOW = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16)


@pytest.fixture(scope="module", params=ATTENTION)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(1, 1 + B * T).view(B, T)
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
REAL = PADDING.bool()


def new(queries: int = T) -> Tensor:
    """Hidden states of the right shape, which is all that causal_mask looks at."""
    return torch.empty(B, queries, 4)


def assert_causal(model: Any, mask: Tensor) -> None:
    """Changing the last token must not change any earlier logits."""
    changed = IDS.clone()
    changed[:, -1] += 7
    before, after = (model(ids, attention_mask=mask).logits[:, :-1] for ids in (IDS, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", ALLOW, ids=str)
@pytest.mark.parametrize("form", ["(B, S)", "(B, 1, S)", "(B, 1, 1, S)"])
def test_padding_forms_are_one(model: Any, form: str, dtype: torch.dtype) -> None:
    mask = PADDING.to(dtype)
    mask = (
        mask if form == "(B, S)" else mask[:, None] if form == "(B, 1, S)" else mask[:, None, None]
    )
    expected = model(IDS, attention_mask=PADDING).logits
    assert torch.equal(model(IDS, attention_mask=mask).logits, expected)
    assert_causal(model, mask)
    for row, (start, end) in enumerate(((0, 6), (2, 6), (0, 4))):
        positions = torch.arange(start, end)[None]
        alone = model(IDS[row : row + 1, start:end], position_ids=positions).logits[0]
        torch.testing.assert_close(expected[row, start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_padding_added_to_the_scores(model: Any, lowest: float) -> None:
    added = torch.zeros(B, 1, 1, T).masked_fill(~REAL[:, None, None], lowest)
    expected = model(IDS, attention_mask=PADDING).logits
    got = model(IDS, attention_mask=added).logits
    torch.testing.assert_close(got[REAL], expected[REAL], atol=1e-5, rtol=1e-5)
    assert_causal(model, added)


def test_full_masks_keep_causality(model: Any) -> None:
    everything = torch.ones(B, 1, T, T)
    expected = model(IDS).logits
    for mask in (everything.bool(), everything.long(), everything.bool()[:, 0], 0 * everything):
        torch.testing.assert_close(
            model(IDS, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5
        )
        assert_causal(model, mask)


def test_masks_a_head(model: Any) -> None:
    alibi = torch.arange(T)[None] - torch.arange(T)[:, None]
    bias = -0.5 * torch.arange(1, 5).view(1, 4, 1, 1) * alibi.abs()
    assert_causal(model, bias.expand(B, 4, T, T))
    assert not torch.equal(model(IDS, attention_mask=bias).logits, model(IDS).logits)


def test_a_mask_of_ones_is_no_mask(model: Any) -> None:
    assert torch.equal(model(IDS, attention_mask=torch.ones(B, T)).logits, model(IDS).logits)


def test_rows_of_nothing_but_padding(model: Any) -> None:
    mask = PADDING.clone()
    mask[1] = 0
    logits = model(IDS, attention_mask=mask).logits
    assert bool(logits.isfinite().all())
    full = model(IDS, attention_mask=PADDING).logits
    assert torch.equal(logits[0], full[0]) and torch.equal(logits[2, :4], full[2, :4])
    model.zero_grad()
    model(IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_mask_object_is_taken_as_it_is(model: Any) -> None:
    packed = Mask.packed(torch.tensor([0, 2, 6]), T)
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    logits = model(IDS[:1], attention_mask=packed, position_ids=positions).logits[0]
    for a, b in ((0, 2), (2, 6)):
        alone = model(IDS[:1, a:b]).logits[0]
        torch.testing.assert_close(logits[a:b], alone, atol=1e-5, rtol=1e-5)
    both_ways = model(IDS, attention_mask=Mask()).logits
    assert not torch.allclose(both_ways[:, 0], model(IDS).logits[:, 0])


def test_what_each_form_becomes() -> None:
    assert causal_mask(None, new(), 0).trivial
    assert causal_mask(torch.ones(B, T), new(), 0).trivial
    left = causal_mask(PADDING[:2].repeat(2, 1)[:B], new(), 0)
    assert left.interval and left.start is not None and left.start.tolist() == [0, 2, 0]
    assert left.rows_may_be_empty
    right = causal_mask(PADDING[[0, 2, 2]], new(), 0)
    assert right.end is not None and right.end.tolist() == [6, 4, 4]
    assert not right.rows_may_be_empty
    holes = PADDING.clone()
    holes[0, 3] = 0
    dense = causal_mask(holes, new(), 0)
    assert dense.keys is not None and torch.equal(dense.keys, holes.bool())
    # one new token after five cached ones: no row can be empty, whatever was padded
    step = causal_mask(PADDING[[0, 1, 1]], new(1), 5)
    assert step.interval and not step.rows_may_be_empty
    # two new tokens at 4 and 5: padding up to 4 leaves each row a key, up to 5 does not
    for padded, may_be_empty in ((4, False), (5, True)):
        mask = (torch.arange(6) >= padded).expand(B, 6)
        assert causal_mask(mask, new(2), 4).rows_may_be_empty is may_be_empty
    # a mask of the new tokens only: the cached ones are real
    short = causal_mask(torch.tensor([[0, 1]] * B), new(2), 4)
    assert short.keys is not None and short.keys.tolist()[0] == [True] * 4 + [False, True]


def test_no_values_are_read_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(Tensor, "tolist", None)
    monkeypatch.setattr(Tensor, "item", None)
    monkeypatch.setattr(Tensor, "__bool__", None)
    assert causal_mask(PADDING, new(), 0).keys is not None
    assert causal_mask(PADDING[:, None, None].float(), new(), 0).bias is not None
    assert causal_mask(torch.ones(B, 1, T, T), new(), 0).bias is not None


ones = torch.ones
REFUSED: dict[str, tuple[Callable[[], Tensor], int, str]] = {
    "short": (lambda: ones(B, T - 1), 0, r"\(3, 5\), but 3 sequences of 6 new tokens after 0"),
    "long": (lambda: ones(B, T + 1), 0, r"\(3, 7\), .* need \(3, 6\), \(3, 6, 6\)"),
    "transposed": (lambda: ones(T, B), 0, r"shape \(6, 3\)"),
    "batch": (lambda: ones(B + 1, T), 0, r"shape \(4, 6\), but 3 sequences"),
    "one row": (lambda: ones(1, T), 0, r"shape \(1, 6\), but 3 sequences"),
    "cached": (lambda: ones(B, T + 1), 4, r"after 4 cached ones need \(3, 10\) or \(3, 6\)"),
    "flat": (lambda: ones(T), 0, r"shape \(6,\)"),
    "five": (lambda: ones(B, 1, 1, T, T), 0, r"shape \(3, 1, 1, 6, 6\)"),
    "3D": (lambda: ones(B, T - 1, T), 0, r"shape \(3, 1, 5, 6\)"),
    "values": (lambda: PADDING * 2, 0, r"holds values other than 0 and 1 \(from 0 to 2\)"),
    "negative": (lambda: PADDING - 1, 0, r"from -1 to 0"),
    "nan": (lambda: PADDING * torch.nan, 0, "holds values other than 0 and 1"),
    "4D values": (lambda: 3 * ones(B, 1, T, T).long(), 0, "holds values other than 0 and 1"),
    "4D float of 0 and 1": (
        lambda: ones(B, 1, T, T).tril(),
        0,
        r"could mean visible or added to the scores; pass mask.bool\(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    mask, past, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        causal_mask(mask(), new(), past)


def test_heads_that_do_not_fit(model: Any) -> None:
    with pytest.raises(ValueError, match=r"\(3, 3, 6, 6\) on cpu; it must broadcast to \(3, 4, 6"):
        model(IDS, attention_mask=ones(B, 3, T, T).bool())


def test_lists_are_refused() -> None:
    with pytest.raises(TypeError, match=r"attention_mask is a list; .*torch.tensor\(mask\)"):
        causal_mask([[1, 1]], new(), 0)  # type: ignore[arg-type]


def test_an_encoders_masks() -> None:
    nothing = bidirectional_mask(None, new())
    assert nothing == Mask(rows_may_be_empty=False) and nothing.trivial
    assert bidirectional_mask(torch.ones(B, T), new()) == nothing
    given = Mask(causal=True)
    assert bidirectional_mask(given, new()) is given
    for dtype in ALLOW:
        mask = bidirectional_mask(PADDING.to(dtype), new())
        assert not mask.causal and mask.interval and not mask.rows_may_be_empty
        assert mask.visible(T, T, IDS.device)[:, 0].equal(REAL[:, None].expand(B, T, T))
    for form in (PADDING[:, None], PADDING[:, None, None], REAL[:, None, None]):
        assert bidirectional_mask(form, new()).interval
    holes = torch.tensor([[1, 0, 1, 1, 1, 0]] * B)
    mask = bidirectional_mask(holes, new())
    assert mask.keys is not None and not mask.rows_may_be_empty
    assert bidirectional_mask(torch.tensor([[1] * T, [0] * T, [1] * T]), new()).rows_may_be_empty
    added = torch.zeros(B, 1, 1, T).masked_fill(~REAL[:, None, None], -torch.inf)
    assert bidirectional_mask(added, new()).bias is added
    with pytest.raises(ValueError, match="holds only 0 and 1, which could mean visible or added"):
        bidirectional_mask(PADDING[:, None, None].float(), new())
    with pytest.raises(ValueError, match=r"has shape \(3, 5\), but 3 sequences of 6"):
        bidirectional_mask(PADDING[:, :5], new())
