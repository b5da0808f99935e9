"""transformers' _supports_* flags, derived: they say what switching to a backend then does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import tiny_bert
from support.families import FAMILIES, TINY, tokens
from swathe.kernels.attention.api import AttentionSpec, Mask, register_attention
from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
from swathe.kernels.core.registry import Backend, register_backend, registered, unregister_backend
from swathe.kernels.core.spec import ANY, FLOATS, Capabilities, Spec
from swathe.modeling.auto import model_class
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.families.bert.modeling_bert import BertModel
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.layers.attention import SelfAttention
from swathe.modeling.layers.mlp import GatedMLP
from swathe.modeling.model import PreTrainedModel

FLAGS = {
    "_supports_sdpa": ("sdpa",),
    "_supports_flex_attn": ("flex_attention",),
    "_supports_flash_attn": ("flash_attention_2", "flash_attention_3"),
}


def build(family: str, device: str = "cpu", **changes: Any) -> PreTrainedModel:
    if family == "bert":
        return BertModel(BertConfig(**{**tiny_bert.TINY, **changes}))
    given = {**TINY, **FAMILIES[family][1], **changes}
    config = model_class(family, "config")(**given)
    return model_class(family, "causal_lm").from_config(config, device=device)


def spec_of(model: Any) -> Spec:
    """What attention of the model needs, from its configuration alone."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    return Spec.on(
        "attention",
        model.device,
        model.dtype,
        size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        grad=True,
        grouped=heads > kv_heads,
        dropout=getattr(config, "attention_dropout", 0) > 0
        or getattr(config, "attention_probs_dropout_prob", 0) > 0,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=config.model_type == "gpt_oss",
    )


@pytest.fixture
def narrow() -> Iterator[None]:
    """Backends under transformers' names: flex without softcap or sinks, flash in fp32 to 16."""

    def never(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        raise AssertionError("only asked whether it would serve")

    cpu = frozenset({"cpu"})
    made = {
        "flex_attention": Capabilities(cpu, FLOATS, {"grouped": ANY, "dropout": ANY}),
        "flash_attention_2": Capabilities(
            cpu, FLOATS, {"grouped": ANY, "softcap": ANY}, max_size=16
        ),
    }
    for name, capabilities in made.items():
        register_attention(name, never, capabilities)
    yield
    for name in made:
        unregister_backend("attention", name)


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_flags_agree_with_the_backends_and_with_switching(family: str, narrow: None) -> None:
    model = build(family)
    spec = spec_of(model)
    serving = {n for n, backend in registered("attention").items() if not backend.check(spec)}
    assert serving
    for flag, names in FLAGS.items():
        assert getattr(model, flag) is (not serving.isdisjoint(names)), flag
    refusals = model.attention_backends()
    assert refusals.keys() == registered("attention").keys()
    assert {name for name, refusal in refusals.items() if refusal is None} == serving
    for name, refusal in refusals.items():
        if refusal is None:
            model.set_attn_implementation(name)
            assert {m.choice.backend for m in model._attention_modules()} == {name}
        else:
            with pytest.raises((UnsupportedFeature, BackendUnavailable)) as caught:
                model.set_attn_implementation(name)
            assert str(caught.value) == refusal
    assert model._supports_attention_backend


def test_flags_follow_what_the_model_is(narrow: None) -> None:
    assert build("llama")._supports_flash_attn and not build("qwen3")._supports_flash_attn
    assert build("gemma2", head_dim=16)._supports_flash_attn
    assert not build("gemma2")._supports_sdpa and not build("gpt_oss")._supports_flex_attn
    assert not build("llama", attention_dropout=0.1)._supports_flash_attn
    model = build("llama")
    assert model._supports_flash_attn and not model.double()._supports_flash_attn
    assert model._supports_sdpa
    assert not build("llama", device="meta")._supports_flash_attn
    unregister_backend("attention", "flash_attention_2")
    assert not model.float()._supports_flash_attn
    register_attention("flash_attention_2", nn.Identity(), Capabilities(frozenset(), FLOATS))
    assert not model._supports_flash_attn


def test_flags_are_read_only() -> None:
    model = build("llama")
    for flag in (*FLAGS, "_supports_attention_backend", "_can_compile_fullgraph"):
        with pytest.raises(AttributeError):
            setattr(model, flag, True)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_moe"])
def test_compiling_without_a_break(family: str) -> None:
    model = build(family).eval()
    assert model._can_compile_fullgraph
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, expected = compiled(tokens(), use_cache=False), model(tokens(), use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits)


def test_a_backend_that_no_graph_holds() -> None:
    given: dict[str, Any] = {"load": lambda: None, "op": "rms_norm", "name": "breaks"}
    promises: dict[str, Any] = {"devices": frozenset({"cpu", "cuda"}), "dtypes": FLOATS}
    names = ("casting", "residual", "weight_dtype")
    features: dict[str, str] = dict.fromkeys(names, ANY)
    record = Capabilities(**promises, features=features, graph_capture=False)
    register_backend(Backend(**given, capabilities=record))
    try:
        model = build("llama")
        assert model._can_compile_fullgraph
        model.set_kernels(norm="breaks")
        assert not model._can_compile_fullgraph
        model.set_kernels(norm="eager")
        assert model._can_compile_fullgraph
    finally:
        unregister_backend("rms_norm", "breaks")


def test_a_model_from_a_notebook_switches() -> None:
    """transformers reads the source of the class's module to decide that it cannot."""

    class Attention(SelfAttention):
        pass

    class NotebookModel(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.attention = Attention(config, 0)

        def forward(self, hidden: Tensor, rotation: Any) -> Tensor:
            return self.attention(hidden, rotation, Mask(causal=True))[0]

    class Without(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.mlp = GatedMLP(8, 8, "silu", False)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.mlp(hidden)

    model = NotebookModel(LlamaConfig(**TINY)).eval()
    assert model._supports_sdpa and model._supports_attention_backend
    hidden, out = torch.randn(2, 5, 64), {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.attention.choice.backend == name
        out[name] = model(hidden, lambda q, k: (q, k))
    torch.testing.assert_close(out["eager"], out["sdpa"], atol=1e-5, rtol=1e-5)

    plain = Without(LlamaConfig(**TINY))
    assert not plain._supports_attention_backend and not plain._supports_sdpa
    assert plain._can_compile_fullgraph
