"""What Trainer, PEFT and a person at a prompt ask of a model: checkpointing, hooks, reports."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def ids() -> Tensor:
    return torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def recomputed(model: LlamaForCausalLM) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if layer.checkpointing is not None]


def test_the_newer_names_of_checkpointing() -> None:
    model = build()
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    assert recomputed(model) == [0, 2] and model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert recomputed(model) == []
    with pytest.raises(ValueError, match=r"unknown 'bogus'.*allowed: \('use_reentrant'"):
        model.activation_checkpointing_enable({"bogus": 1})


def test_the_hook_that_transformers_methods_call() -> None:
    model = build()
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint)
    assert recomputed(model) == [0, 1, 2, 3]
    with_arguments = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    model._set_gradient_checkpointing(True, with_arguments, every_n_layers=3)
    assert recomputed(model) == [0, 3]
    assert model.model.layers[0].checkpointing == {"preserve_rng_state": False}
    model._set_gradient_checkpointing(enable=False)
    assert recomputed(model) == []
    with pytest.raises(ValueError, match=r"layers are recomputed by torch\.utils\.checkpoint"):
        model._set_gradient_checkpointing(True, lambda layer, *args: layer(*args))


def test_a_class_may_refuse_checkpointing() -> None:
    class Plain(LlamaForCausalLM):
        supports_gradient_checkpointing = False

    with pytest.raises(
        ValueError, match="Plain does not support gradient checkpointing: supports_"
    ):
        Plain(LlamaConfig(**TINY)).gradient_checkpointing_enable()


WRONG_CHECKPOINTING: dict[str, tuple[dict[str, Any], str]] = {
    "every 0": ({"every_n_layers": 0}, "every_n_layers=0 must be a whole number of at least 1"),
    "every 1.5": ({"every_n_layers": 1.5}, "every_n_layers=1.5 must be a whole number"),
    "every text": ({"every_n_layers": "2"}, "every_n_layers='2' must be"),
    "a list": ({"gradient_checkpointing_kwargs": ["use_reentrant"]}, "must be a dict of arguments"),
    "unknown": ({"gradient_checkpointing_kwargs": {"bogus": 1}}, r"unknown 'bogus'; allowed: \("),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTING)
def test_wrong_checkpointing_changes_nothing(case: str) -> None:
    options, message = WRONG_CHECKPOINTING[case]
    model = build()
    model.gradient_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match=message):
        model.gradient_checkpointing_enable(**options)
    assert recomputed(model) == [0, 2]


@pytest.mark.parametrize("every", [1, 3])
def test_offloaded_inputs_give_the_same_gradients(every: int) -> None:
    model = build().train()
    found, copied = [], []
    for options in ({}, {"every_n_layers": every}, {"every_n_layers": every, "offload": True}):
        if options:
            model.activation_checkpointing_enable(**options)
        model.zero_grad()
        with torch.profiler.profile() as profile:
            model(ids(), labels=ids()).loss.backward()
        copied.append(sum(e.count for e in profile.key_averages() if e.key == "aten::copy_"))
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, *others in zip(*found, strict=True):
        assert all(torch.equal(plain, other) for other in others)
    assert copied[2] > copied[1], "what is kept is copied to the CPU's memory and back"
    model.activation_checkpointing_disable()
    assert recomputed(model) == [] and not model.is_gradient_checkpointing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the GPU's memory")
def test_checkpointing_and_offloading_take_less_memory() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = build(**sizes).train().cuda()
    long = torch.randint(1, 99, (4, 1024), device="cuda")
    peaks = []
    for options in (None, {}, {"offload": True}):
        if options is not None:
            model.gradient_checkpointing_enable(**options)
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            model(long, labels=long).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] > peaks[1] > peaks[2], peaks


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_an_adapter_over_frozen_embeddings(recompute: bool) -> None:
    model = build().train()
    model.requires_grad_(False)
    adapter = model.model.layers[3].mlp.down_proj.weight.requires_grad_(True)
    if recompute:
        model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    assert len(model.model.embed_tokens._forward_hooks) == 1
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids(), labels=ids()).loss.backward()
    assert seen[0].requires_grad and adapter.grad is not None and bool(adapter.grad.any())
    with torch.no_grad():
        assert not model(ids()).logits.requires_grad
    copy.deepcopy(model).disable_input_require_grads()
    model.disable_input_require_grads()
    model.disable_input_require_grads()
    assert not model.model.embed_tokens._forward_hooks


def test_the_decoder_is_the_body() -> None:
    model = build()
    assert model.get_decoder() is model.model is model.model.get_decoder()


def test_dummy_inputs_run() -> None:
    for vocab_size in (99, 3):
        model = build(vocab_size=vocab_size)
        assert model(**model.dummy_inputs).logits.shape == (3, 5, vocab_size)


def test_padding_without_a_mask_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build(pad_token_id=0)
    padded = ids()
    padded[0, :2] = 0
    caplog.set_level(logging.WARNING)
    model.warn_if_padding_and_no_attention_mask(ids(), None)
    model.warn_if_padding_and_no_attention_mask(padded, (padded != 0).long())
    build().warn_if_padding_and_no_attention_mask(padded, None)
    assert not caplog.records
    for _ in range(2):
        model.warn_if_padding_and_no_attention_mask(padded, None)
    (record,) = caplog.records
    assert "pad_token_id=0 and no attention_mask was given" in record.getMessage()


def test_repr_says_what_it_is() -> None:
    model = build(kernels="eager", attn_implementation="sdpa").to(torch.bfloat16)
    lines = repr(model).split("\n")
    assert lines[0] == f"LlamaForCausalLM: {count(model)} parameters, bfloat16, on cpu"
    assert lines[1] == "kernels: attn=sdpa, linear=eager, mlp=eager, norm=eager, rope=eager"
    assert lines[2] == "LlamaForCausalLM(" and lines[3] == "  (model): LlamaModel("
    assert repr(model).count("parameters,") == 1, "the body inside does not say it again"
    assert repr(model.model).startswith("LlamaModel: ")
    model.model.norm.float()
    with torch.device("meta"):
        model.lm_head = torch.nn.Linear(32, 99, bias=False)
    model.set_kernels({"norm": "triton", "model.norm": "eager"})
    first, second = repr(model).split("\n")[:2]
    assert first.endswith("bfloat16 and float32, on cpu, meta")
    assert "norm=triton/eager" in second


def count(model: LlamaForCausalLM) -> str:
    return f"{model.num_parameters() / 1000:.1f}K"


def test_load_reports_are_kept_and_readable(tmp_path: Path) -> None:
    model = build(tie_word_embeddings=True).half()
    model.save_pretrained(tmp_path)
    assert model.load_report is None
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    report = again.load_report
    assert report is not None and report.loaded == len(list(again.parameters()))
    text = repr(report)
    assert text.startswith(f"LoadReport: {report.loaded} tensors loaded")
    assert "tied: lm_head.weight -> model.embed_tokens.weight" in text
    assert f"cast: {report.loaded} tensors, float16 -> float32" in text
    body = again.model
    body.save_pretrained(tmp_path / "body")
    headed = LlamaForCausalLM.from_pretrained(
        tmp_path / "body", tie_word_embeddings=False, progress=False
    )
    assert "missing (left for initialisation): 'lm_head.weight'" in repr(headed.load_report)


def test_a_load_report_says_what_may_have_been_renamed(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for right, wrong in (("gate_proj", "gate_prj"), ("norm", "nrm")):
        for name in [name for name in weights if f".{right}." in name]:
            weights[name.replace(f".{right}.", f".{wrong}.")] = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected '.*gate_prj.*' .nearest: '.*gate_proj"):
        LlamaForCausalLM.from_pretrained(tmp_path, progress=False)
    report = LlamaForCausalLM.from_pretrained(tmp_path, strict=False, progress=False).load_report
    (line,) = (line for line in str(report).split("\n") if line.startswith("renamed, it seems: "))
    assert "'model.norm.weight'" not in line and "model.nrm.weight -> model.norm.weight" in line
    layer = "model.layers.0.mlp"
    assert f"{layer}.gate_prj.weight -> {layer}.gate_proj.weight" in line
    whole = LlamaForCausalLM.from_config(build().config)
    whole.save_pretrained(tmp_path / "whole")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "whole", progress=False)
    assert "renamed" not in str(again.load_report)


@pytest.mark.parametrize(
    "option",
    [{"quantization_config": {"bits": 4}}, {"gguf_file": "x.gguf"}, {"load_in_4bit": True}],
)
def test_what_transformers_is_for(tmp_path: Path, option: dict[str, Any]) -> None:
    build().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="load the model with transformers"):
        LlamaForCausalLM.from_pretrained(tmp_path, **option)
    LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=None, load_in_4bit=False)


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, extra={"quantization_config": {"quant_method": "gptq"}})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"quantization_config .*gptq.*not read here"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_offload_state_dict_is_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build().save_pretrained(tmp_path)
    caplog.set_level(logging.INFO)
    LlamaForCausalLM.from_pretrained(tmp_path, offload_state_dict=True, progress=False)
    (told,) = [r.getMessage() for r in caplog.records if "offload_state_dict" in r.getMessage()]
    assert "changes nothing" in told and 'device_map="auto"' in told
