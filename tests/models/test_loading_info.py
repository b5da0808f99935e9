"""What is missing, unexpected or of another shape: transformers' report, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.classes import CLASSES, build, config_of, tiny
from swathe.modeling.auto import AutoModelForSequenceClassification, model_class
from swathe.modeling.checkpoint.errors import CheckpointError

State = dict[str, Tensor]
BODIES = ("model.", "bert.", "transformer.")
SECOND_MLP = ("layers.1.mlp", "layer.1.intermediate")
HEADS_OWN = ("lm_head.weight", "score.weight", "classifier.weight", "qa_outputs.weight")


def without_prefix(state: State) -> State:
    return {k.partition(".")[2]: v for k, v in state.items() if k.startswith(BODIES)}


PERTURBED: dict[str, Callable[[State], State]] = {
    "whole": lambda s: s,
    "missing": lambda s: {k: v for k, v in s.items() if not any(m in k for m in SECOND_MLP)},
    "unexpected": lambda s: {**s, "model.more": torch.ones(2), "other": torch.ones(2)},
    "renamed": lambda s: {
        k.replace("k_proj", "kay").replace("key", "kay"): v for k, v in s.items()
    },
    "mismatched": lambda s: {
        k: torch.ones(40, 16) if k.endswith(HEADS_OWN) else v for k, v in s.items()
    },
    "body only": without_prefix,
    "head only": lambda s: {k: v for k, v in s.items() if not k.startswith(BODIES)},
}
FAMILIES = ("Llama", "Bert", "Gemma2", "Phi3", "Mixtral")
# a body alone has neither prefix nor head, and a tied head no tensor; of a whole expert that is
# missing, theirs names the parameter and ours the stored tensors
CASES = [
    (name, case)
    for name in CLASSES
    for case in PERTURBED
    if name.startswith(FAMILIES)
    and not (name.endswith("Model") and case in ("body only", "head only"))
    and not (name.startswith(("Mixtral", "Gemma2ForCausal")) and case == "head only")
]


def written(directory: Path, name: str, change: Callable[[State], State]) -> None:
    """transformers' checkpoint of that class in `directory`, with its tensors changed."""
    theirs = getattr(transformers, name)
    torch.manual_seed(0)
    theirs(theirs.config_class(**tiny(CLASSES[name][0]))).save_pretrained(directory)
    file = directory / "model.safetensors"
    state = {key: value.clone() for key, value in change(load_file(file)).items()}
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_dict_is_theirs(name: str, case: str, tmp_path: Path) -> None:
    written(tmp_path, name, PERTURBED[case])
    _, expected = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = model_class(*CLASSES[name]).from_pretrained(
        tmp_path, output_loading_info=True, strict=False, progress=False
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert {kind: info[kind] for kind in kinds} == {kind: set(expected[kind]) for kind in kinds}
    assert info["error_msgs"] == expected["error_msgs"] == []
    assert not model.training and not any(p.is_meta for p in model.parameters())
    assert all(bool(p.isfinite().all()) and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_of_nothing_that_fits_misses_everything(tied: bool, tmp_path: Path) -> None:
    build("LlamaForCausalLM", tie_word_embeddings=tied).save_pretrained(tmp_path)
    save_file({"nothing": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    llama = model_class("llama", "causal_lm")
    model, info = llama.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for strict in ("head", True):
        with pytest.raises(CheckpointError, match="looks like a different architecture"):
            llama.from_pretrained(tmp_path, strict=strict)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="E_ARCHITECTURE") as caught:
        model_class("bert", "base").from_pretrained(tmp_path, config=config_of("bert"))
    assert "this looks like a different architecture: load it with its own class" in str(
        caught.value
    )


def test_a_new_head_may_be_missing_and_a_part_of_the_body_may_not(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert model.score.weight.std().item() == pytest.approx(0.1, rel=0.4)
    with pytest.raises(CheckpointError, match=r"missing 'score.weight'"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, strict=True)

    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.1.mlp.upp_proj.weight"] = torch.ones(2)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        model_class("llama", "causal_lm").from_pretrained(tmp_path)
    text = str(caught.value)
    assert "missing 'model.layers.1.mlp.up_proj.weight' (nearest: 'model.layers.1.mlp.upp" in text
    assert (
        "unexpected 'model.layers.1.mlp.upp_proj.weight' (nearest: 'model.layers.1.mlp.up_" in text
    )
    assert str(tmp_path) in text and "ignore_missing=[...]" in text


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "BertForTokenClassification"])
def test_a_head_of_another_size(name: str, tmp_path: Path) -> None:
    model = build(name, num_labels=3)
    model.save_pretrained(tmp_path)
    cls, head = type(model), "score" if name.startswith("Llama") else "classifier"
    with pytest.raises(CheckpointError, match=rf"E_SHAPE(?s:.*)'{head}.weight'.*\(3, .*\(42, "):
        cls.from_pretrained(tmp_path, num_labels=42)
    again, info = cls.from_pretrained(
        tmp_path, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True
    )
    width = model.config.hidden_size
    assert (f"{head}.weight", (3, width), (42, width)) in info["mismatched_keys"]
    assert again.get_submodule(head).weight.shape == (42, width)
    mine = again.state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(mine[key], value)


def test_two_ends_of_a_tie_that_differ(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tie_word_embeddings=False)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    llama = type(model)
    with pytest.raises(CheckpointError, match=r"E_TIED.*set tie_word_embeddings to false"):
        llama.from_pretrained(tmp_path, tie_word_embeddings=True)
    kept = llama.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert not kept.config.tie_word_embeddings
    assert torch.equal(kept.lm_head.weight, model.lm_head.weight)
    assert torch.equal(kept.model.embed_tokens.weight, model.model.embed_tokens.weight)
