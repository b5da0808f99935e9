"""Several documents in one row, by borders or by positions: each is as it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.tensors import DEVICE
from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM
from swathe.modeling.packing import mask_of_borders, mask_of_positions

LENGTHS = (3, 1, 5)
T = sum(LENGTHS)
BORDERS = torch.tensor([0, 3, 4, 9], dtype=torch.int32, device=DEVICE)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(DEVICE)
IDS = (torch.arange(T)[None] * 7 % 49 + 1).to(DEVICE)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


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


@pytest.fixture(scope="module", params=["eager", "sdpa", "triton"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def alone(model: Any) -> Tensor:
    parts = [model(ids[None]).logits for ids in IDS[0].split(LENGTHS)]
    return torch.cat(parts, 1)


FORMS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": POSITIONS},
    "borders": {"cu_seq_lens_q": BORDERS},
    "the collator's": {
        "position_ids": POSITIONS,
        **{"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS.clone()},
        **{"max_length_q": 5, "max_length_k": 5},
    },
    "a mask": {"position_ids": POSITIONS, "attention_mask": Mask.packed(BORDERS, T)},
}


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_as_they_are_alone(model: Any, form: str) -> None:
    torch.testing.assert_close(model(IDS, **FORMS[form]).logits, alone(model), **CLOSE)


def test_gradients_stay_in_their_document(model: Any) -> None:
    vectors = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=vectors, **FORMS["borders"], use_cache=False).logits
    logits[:, 4:].float().square().sum().backward()
    assert not vectors.grad[:, :4].any() and vectors.grad[:, 4:].any()


def test_rows_of_a_batch_pack_differently(model: Any) -> None:
    ids = torch.cat((IDS, IDS + 1))
    positions = torch.cat((POSITIONS, torch.arange(T, device=DEVICE)[None]))
    logits = model(ids, position_ids=positions).logits
    torch.testing.assert_close(logits[:1], alone(model), **CLOSE)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **CLOSE)


def test_the_loss_is_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    mine = build("triton").train()
    config = transformers.LlamaConfig(**{k: getattr(mine.config, k) for k in SHARED})
    theirs = transformers.LlamaForCausalLM(config).to(DEVICE)
    theirs.load_state_dict(mine.state_dict())
    features = [{"input_ids": ids, "labels": ids} for ids in IDS[0].split(LENGTHS)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in collate(features).items()}
    expected = theirs(**batch, use_cache=False).loss
    torch.testing.assert_close(mine(**batch).loss, expected, **CLOSE)


SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip


def test_compiled_it_is_the_same() -> None:
    model = build("triton")
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    for form in ("positions", "borders"):
        found = compiled(IDS, **FORMS[form], use_cache=False).last_hidden_state
        expected = model.model(IDS, **FORMS[form], use_cache=False).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)


def test_one_document_needs_no_mask() -> None:
    assert mask_of_positions(torch.arange(4, 9)[None]) is None
    assert mask_of_borders({"max_length_q": 4}, IDS) is None
    found = mask_of_positions(torch.tensor([[5, 6, 0, 0, 1]]))
    assert found is not None and found.start is not None
    assert found.start.tolist() == [[0, 0, 2, 3, 3]]


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "a batch": (
        lambda: {"input_ids": IDS.expand(2, -1), "cu_seq_lens_q": BORDERS},
        ValueError,
        r"cu_seq_lens_q is \(4,\) on .* for 2 sequences .* for a batch of one",
    ),
    "floats": (lambda: {"cu_seq_lens_q": BORDERS.float()}, TypeError, "is torch.float32; it must"),
    "too short": (
        lambda: {"cu_seq_lens_q": BORDERS[:-1]},
        ValueError,
        r"\[0, 3, 4\]; .* to 9, the",
    ),
    "falling": (
        lambda: {"cu_seq_lens_k": BORDERS[[0, 2, 1, 3]]},
        ValueError,
        r"\[0, 4, 3, 9\]; both must be the same",
    ),
    "two kinds": (
        lambda: {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS[[0, 1, 3]]},
        ValueError,
        r"is \[0, 3, 4, 9\], cu_seq_lens_k \[0, 3, 9\]",
    ),
    "a mask": (
        lambda: {"cu_seq_lens_q": BORDERS, "attention_mask": torch.ones(1, T)},
        ValueError,
        "take neither attention_mask nor past_key_values",
    ),
    "a cache": (
        lambda: {"cu_seq_lens_q": BORDERS, "past_key_values": DynamicCache()},
        ValueError,
        "take neither attention_mask nor past_key_values",
    ),
    "a typo": (
        lambda: {"cu_seqlens_q": BORDERS},
        TypeError,
        r"no argument 'cu_seqlens_q' \(did you mean 'cu_seq_lens_q'\?\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        build("eager")(**{"input_ids": IDS, **given()})
