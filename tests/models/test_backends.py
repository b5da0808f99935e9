"""Which backend each module runs: chosen once, by name or pattern, switched whole, reported."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swathe.modeling.families.llama.modeling_llama as llama
from swathe.kernels.attention.api import AttentionSpec, Mask, register_attention
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import unregister_backend
from swathe.kernels.core.spec import ANY, FLOATS, Capabilities
from swathe.modeling.auto import AutoModelForCausalLM
from swathe.modeling.errors import UninitializedParameter
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.layers.norm import RMSNorm
from swathe.modeling.policy import KernelPolicy

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(1, 13).view(2, 6)


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    return llama.LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def used(model: nn.Module) -> dict[str, str]:
    """The backend of every module, projections left out."""
    rows = model.kernel_report().rows  # type: ignore[operator]
    return {row.module: row.backend for row in rows if row.op != "linear"}


def test_auto_and_named_backends() -> None:
    model = build()
    assert set(used(model).values()) <= {"sdpa", "cpp", "eager"}
    eager = build(kernels="eager")
    assert set(used(eager).values()) == {"eager"}
    assert len(used(eager)) == 4 * TINY["num_hidden_layers"] + 2
    torch.testing.assert_close(model(IDS).logits, eager(IDS).logits, atol=1e-6, rtol=1e-5)
    mixed = build(kernels="eager", attn_implementation="sdpa")
    assert used(mixed)["model.norm"] == "eager"
    assert used(mixed)["model.layers.1.self_attn"] == "sdpa"


def test_patterns_of_modules() -> None:
    kernels = {"attn": "sdpa", "norm": "eager", "layers.0.*": {"attn": "eager"}}
    model = build(kernels=kernels)
    found = used(model)
    assert found["model.layers.0.self_attn"] == "eager"
    assert found["model.layers.1.self_attn"] == found["model.layers.2.self_attn"] == "sdpa"
    model.set_kernels({"model.layers.[12].*": "eager", "layers.2.self_attn": "sdpa"})
    found = used(model)
    assert found["model.layers.1.self_attn"] == "eager"
    assert found["model.layers.2.self_attn"] == "sdpa"
    # a later switch of one op keeps the patterns
    model.set_kernels(norm="eager")
    assert used(model)["model.layers.1.self_attn"] == "eager"
    assert used(model)["model.norm"] == "eager"
    assert used(build(kernels=KernelPolicy(norm="eager")))["model.norm"] == "eager"


def test_switching_keeps_the_logits() -> None:
    model = build()
    expected = model(IDS).logits
    for name in ("eager", "sdpa", "auto"):
        model.set_attn_implementation(name)
        assert model.config.attn_implementation == name
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)
    assert used(model.model)["layers.0.self_attn"] in ("cpp", "sdpa")


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "attention": (
        lambda m: m.set_attn_implementation("foo"),
        r'^Specified attn_implementation="foo" is not supported; allowed: '
        r"\['auto', 'eager', 'sdpa', 'triton', 'gluon', 'cpp'\]",
    ),
    "typo": (lambda m: m.set_attn_implementation("sdap"), r"\(did you mean 'sdpa'\?\)"),
    "another library's": (
        lambda m: m.set_attn_implementation("flash_attention_2"),
        r'^Specified attn_implementation="flash_attention_2" is not supported; allowed: .*triton',
    ),
    "norm": (
        lambda m: m.set_kernels(norm="egaer"),
        r'Specified norm_implementation="egaer" is not supported \(did you mean \'eager\'\?\)',
    ),
    "op": (lambda m: m.set_kernels(norms="eager"), r"'norms' \(did you mean 'norm'\?\)"),
    "key": (lambda m: m.set_kernels({"atn": "eager"}), r"'atn' \(did you mean 'attn'\?\)"),
    "pattern": (
        lambda m: m.set_kernels({"layer.0.*": "eager"}),
        r"'layer.0.\*' matches no module that calls a kernel; they are .*'model.layers.\*",
    ),
    "in a pattern": (lambda m: m.set_kernels({"layers.0.*": "foo"}), '="foo" is not supported'),
    "op in a pattern": (lambda m: m.set_kernels({"norm.*": {"nrm": "eager"}}), "unknown op 'nrm'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_change_nothing(case: str) -> None:
    model = build(attn_implementation="sdpa")
    before, report = model.config.attn_implementation, str(model.kernel_report())
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.config.attn_implementation == before == "sdpa"
    assert str(model.kernel_report()) == report


def test_wrong_kind_of_policy() -> None:
    with pytest.raises(TypeError, match="kernels is a int; it must be a backend's name"):
        build(kernels=3)


def test_a_named_backend_that_cannot_serve_raises() -> None:
    model = build()
    with pytest.raises(UnsupportedFeature, match=r"rms_norm: backend 'torch' cannot serve"):
        model.set_kernels(norm="torch", attn="eager")
    assert used(model)["model.layers.0.self_attn"] in ("cpp", "sdpa")


def test_third_party_attention_sees_the_padding() -> None:
    seen: list[Mask] = []

    def mine(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        seen.append(spec.mask)
        return q.transpose(1, 2)

    register_attention("mine", mine, Capabilities(frozenset({"cpu"}), FLOATS, {"grouped": ANY}))
    try:
        model = build(attn_implementation="mine")
        model(IDS, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))
        assert seen[0].causal and seen[0].start is not None and seen[0].start.tolist() == [2, 0]
        assert len({id(m) for m in seen}) == 1
        with pytest.raises(UnsupportedFeature, match=r"takes .*, not float64"):
            model.double()
    finally:
        unregister_backend("attention", "mine")


def test_moves_choose_again() -> None:
    model = build()
    assert used(model)["model.norm"] in ("cpp", "eager")
    assert set(used(model.double()).values()) == {"sdpa", "eager"}
    assert model(IDS).logits.dtype == torch.float64
    assert used(model.float()) == used(build())
    assert used(copy.deepcopy(model)) == used(model)


def test_a_name_given_on_meta_is_checked_where_the_weights_land() -> None:
    with torch.device("meta"):
        model = build(norm_implementation="cpp")
    assert {r.why for r in model.kernel_report().rows if r.op == "rms_norm"} == {"asked for 'cpp'"}
    model.to_empty(device="cpu")
    norms = {r.backend for r in model.kernel_report().rows if r.op == "rms_norm"}
    assert norms == {"cpp"}
    assert bool(model.model.rotary_emb.inv_freq.isfinite().all())
    assert model.model.rotary_emb.inv_freq[0] == 1.0


def test_report() -> None:
    model = build(attn_implementation="eager")
    text = str(model.kernel_report())
    header, *lines = text.splitlines()
    assert header.split() == ["module", "count", "op", "backend", "why", "skipped"]
    assert lines[0].split()[:4] == ["model.layers.*.self_attn", "3", "attention", "eager"]
    assert "asked for 'eager'" in lines[0]
    rows = json.loads(model.kernel_report().to_json())
    # four modules a layer, the last norm and the rotation; seven projections a layer and the head
    assert len(rows) == 14 + 22 and rows[0]["module"] == "model.layers.0.self_attn"
    assert set(rows[0]) == {"module", "op", "backend", "why", "skipped"}
    double = json.loads(model.double().kernel_report().to_json())
    skipped = {k: v for row in double for k, v in row["skipped"].items()}
    assert any("not float64" in reason for reasons in skipped.values() for reason in reasons)


def test_a_norm_of_its_own() -> None:
    norm = RMSNorm(8, 1e-6, offset=1.0, casting="gemma")
    assert not norm.weight.any()
    x, r = torch.randn(2, 8), torch.randn(2, 8)
    y, h = norm(x, r)
    assert torch.equal(h, x + r)
    torch.testing.assert_close(y, norm(h))
    assert "backend=" in repr(norm)


# loading options that concern how a model is made


def test_options_of_from_pretrained(tmp_path: Path) -> None:
    build(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        torch_dtype="bfloat16",
        attn_implementation="eager",
        norm_implementation="eager",
        rope_implementation="eager",
        mlp_implementation="eager",
        device_map={"": "cpu"},
        hidden_act="gelu",
        low_cpu_mem_usage=True,
    )
    assert model.dtype == torch.bfloat16 == model.config.dtype and not model.training
    assert set(used(model).values()) == {"eager"} and model.config.hidden_act == "gelu"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for dtype, expected in (("auto", torch.float32), (None, torch.float32), ("half", None)):
        if expected is None:
            with pytest.raises(ValueError, match=r"dtype='half'.*allowed"):
                llama.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        else:
            assert llama.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).dtype == expected


def test_kernels_of_a_configuration_in_use_are_forgotten(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    given = {"config": model.config, "kernels": {"linear": "eager", "norm": "eager"}}
    rows = llama.LlamaForCausalLM.from_pretrained(tmp_path, **given).kernel_report().rows
    assert {row.backend for row in rows if row.op in ("linear", "rms_norm")} == {"eager"}


def test_a_given_config_is_not_changed(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    config = LlamaConfig(**TINY)
    before = config.to_dict()
    loaded = llama.LlamaForCausalLM.from_pretrained(tmp_path, config=config, kernels="eager")
    assert config.to_dict() == before and config.kernels is None
    assert set(used(loaded).values()) == {"eager"}


LOADING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "typo": (
        {"atn_implementation": "sdpa"},
        TypeError,
        r"no argument 'atn_implementation' \(did you mean 'attn_implementation'\?\)",
    ),
    "field": ({"hiden_size": 8}, TypeError, r"\(did you mean 'hidden_size'\?\)"),
    "backend": ({"attn_implementation": "flash"}, ValueError, "^Specified attn_implementation"),
    "spread": ({"device_map": "even"}, ValueError, "device_map='even' names no device"),
    "split": ({"device_map": {"a": "cpu"}}, ValueError, "names that match no module .*: 'a'"),
    "quantised": ({"load_in_8bit": True}, NotImplementedError, "load the model with transformers"),
    "device kind": ({"device_map": 1.5}, TypeError, "must name one device"),
    "dtype": ({"dtype": torch.int8}, ValueError, "weights load as floating point"),
    "remote code": ({"trust_remote_code": True}, ValueError, "trust_remote_code=True is not"),
    "pickles": ({"use_safetensors": False}, ValueError, "use_safetensors=False is not supported"),
}


@pytest.mark.parametrize("case", LOADING)
def test_wrong_options(case: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    options, error, message = LOADING[case]
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_no_loading_onto_meta(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    with (
        torch.device("meta"),
        pytest.raises(RuntimeError, match=r"^You are using `from_pretrained`"),
    ):
        llama.LlamaForCausalLM.from_pretrained(tmp_path)


class Biased(llama.LlamaForCausalLM):
    """The guide's recipe for initialisation, which writes over parameters that were loaded."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(7.0)
            if module.bias is not None:
                module.bias.data.zero_()


class Uncovered(llama.LlamaForCausalLM):
    """A parameter that no rule of initialisation covers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(3))


def test_loaded_parameters_survive_initialisation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = Biased.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not loaded.lm_head.bias.any()
    assert "lm_head.bias" in caplog.text
    with pytest.raises(UninitializedParameter, match=r"no 'gain' of a Uncovered .* add a rule"):
        Uncovered.from_pretrained(tmp_path)
    assert Biased.from_pretrained(tmp_path, ignore_missing=["lm_head.bias"]) is not None


def test_saving_says_what_is_tied(tmp_path: Path) -> None:
    model = build()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = llama.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings and not model.config.tie_word_embeddings
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.architectures == ["LlamaForCausalLM"]
