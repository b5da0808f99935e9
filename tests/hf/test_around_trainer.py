"""transformers' Trainer on a patched model: the losses, the weights and the files of before."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import swathe.hf
from support.hf_around import BACKENDS, fully, step, training
from support.hf_patching import assert_equal
from swathe.modeling.hf.patching.patch import holders

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
# the name that it has in this transformers
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
_NEWER = "activation_checkpointing"
CHECKPOINTING = _NEWER if _NEWER in FIELDS else "gradient_checkpointing"


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Random tokens with labels, some of them ignored, and a column that no forward takes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 64, (10,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 4] = -100
        return {"input_ids": ids, "labels": labels, "source": torch.tensor(index)}


def trainer(model: Any, folder: Path, **arguments: Any) -> Any:
    given = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    data = Rows()
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **given),
        train_dataset=data,
        eval_dataset=data,
    )


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_two_steps_and_an_evaluation(model_type: str, backend: str, tmp_path: Path) -> None:
    plain, model = training(model_type), training(model_type)
    fully(model, backend)
    theirs, ours = (trainer(m, tmp_path) for m in (plain, model))
    # columns are kept by the forward's signature, and num_items_in_batch goes in if it takes it
    assert ours.model_accepts_loss_kwargs == theirs.model_accepts_loss_kwargs
    assert ours.label_names == theirs.label_names == ["labels"]
    for one in (theirs, ours):
        one.train()
    assert len(losses(ours)) == 2
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-5, atol=0)
    assert_equal(weights(model), weights(plain), 1e-4)
    found, expected = (one.evaluate()["eval_loss"] for one in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-5)
    ours, theirs = (one.predict(Rows()) for one in (ours, theirs))
    torch.testing.assert_close(ours.predictions, theirs.predictions, rtol=1e-4, atol=1e-4)
    assert (ours.label_ids == theirs.label_ids).all()


def test_patched_while_training(tmp_path: Path) -> None:
    """Between two trainings, and undone after."""
    plain, model = training("qwen3"), training("qwen3")
    for one in (plain, model):
        trainer(one, tmp_path).train()
    fully(model)
    for one in (plain, model):
        trainer(one, tmp_path).train()
    swathe.hf.unpatch(model)
    assert_equal(weights(model), weights(plain), 1e-4)
    assert_equal(step(model), step(plain), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_reloaded(backend: str, tmp_path: Path) -> None:
    model = training("llama")
    fully(model, backend)
    made = trainer(model, tmp_path)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert not holders(loaded)
    torch.testing.assert_close(weights(loaded), weights(model), rtol=0, atol=0)
    assert_equal(step(loaded.train()), step(model))


@pytest.mark.parametrize("resumed", ["patched", "plain"])
def test_a_run_goes_on_from_its_checkpoint(resumed: str, tmp_path: Path) -> None:
    """A patched run is resumed by a patched one, or by one that is not."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = training("llama")
    fully(whole)
    trainer(whole, tmp_path, **saving).train()
    model = training("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # what it goes on from is the checkpoint
    if resumed == "patched":
        fully(model)
    made = trainer(model, tmp_path, **saving)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert made.state.global_step == 2
    assert_equal(weights(model), weights(whole), 1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {CHECKPOINTING: True},
        {"label_smoothing_factor": 0.1},
        {"bf16": True, CHECKPOINTING: True},
    ],
    ids=lambda given: "-".join(given),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_trainer_is_asked_for(
    arguments: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    plain, model = training("llama"), training("llama")
    fully(model, backend)
    theirs, ours = (trainer(m, tmp_path, **arguments) for m in (plain, model))
    for one in (theirs, ours):
        one.train()
    close = 1e-2 if arguments.get("bf16") else 1e-5
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=close, atol=0)
    assert next(model.parameters()).dtype == torch.float32


def test_metrics_of_the_logits(tmp_path: Path) -> None:
    """A compute_loss of one's own that reads the logits in training."""

    class Penalised(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = model(**inputs)
            return output.loss + 0.01 * output.logits.float().logsumexp(-1).square().mean()

    found = []
    for backend in (None, *BACKENDS):
        model = training("llama")
        if backend is not None:
            fully(model, backend)
        made = trainer(model, tmp_path)
        made.__class__ = Penalised
        made.train()
        found.append((losses(made), weights(model)))
    for ours, state in found[1:]:
        torch.testing.assert_close(ours, found[0][0], rtol=1e-5, atol=0)
        assert_equal(state, found[0][1], 1e-4)
