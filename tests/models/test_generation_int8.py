"""generate(weights="int8"): the dequantised model's tokens, what is noticed, what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from support.families import FAMILIES, pair, tokens
from support.generating import Counter
from swathe.kernels.core import cpp
from swathe.kernels.linear.eager import quantised
from swathe.modeling import recorded
from swathe.modeling.generation import int8 as int8_module
from swathe.modeling.layers import linear as linear_module
from swathe.modeling.layers.linear import Linear

needs_cpp = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)
IDS = tokens(2, 7)


class Dequantised(nn.Module):
    """A projection with its weight rounded to int8 and back, in fp32, rounded at the end."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        numbers, scales = quantised(linear.weight)
        self.full, self.bias = numbers * scales[:, None], linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.full, bias).to(x.dtype)


def dequantised(model: Any) -> Any:
    """A copy whose projections are Dequantised; its embedding keeps the full weight."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, Dequantised(module))
    return twin


def run(model: Any, weights: str | None = "int8", ids: Tensor = IDS, **options: Any) -> Tensor:
    given = {"max_new_tokens": 12, "eos_token_id": [], **options}
    return model.generate(ids, weights=weights, **given)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every weight that was rounded."""
    seen: list[tuple[int, ...]] = []

    def noted(weight: Tensor) -> Any:
        seen.append(tuple(weight.shape))
        return quantised(weight)

    monkeypatch.setattr(int8_module, "quantised", noted)
    return seen


BOTH = [(family, torch.float32) for family in FAMILIES]
BOTH += [(family, torch.bfloat16) for family in ("llama", "qwen3", "gemma2", "phi3")]


@pytest.mark.parametrize(("family", "dtype"), BOTH)
def test_the_tokens_of_the_dequantised_model(family: str, dtype: torch.dtype) -> None:
    model = pair(family)[1].to(dtype)
    expected = run(dequantised(model), None)
    found = run(model)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    # another order of sums may round a logit of 16 bits the other way: ties are then no longer ties
    agree = (found == expected)[:, 7:].float().cumprod(1).sum(1)
    assert float(agree.mean()) >= 6, agree


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_the_dequantised_model(family: str) -> None:
    model = pair(family)[1]
    called, twin = int8_module.with_weights(model, "int8"), dequantised(model)
    with torch.no_grad():
        for length in (1, 4, 11):  # few rows and many
            ids = tokens(2, length)
            found, expected = called(input_ids=ids).logits, twin(ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert float((found - model(ids).logits).abs().max()) > 1e-3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_heads_and_long_prompts(tied: bool, cache: str) -> None:
    model = pair("llama", tie_word_embeddings=tied)[1]
    twin, ids = dequantised(model), tokens(3, 40)
    for options in ({}, {"repetition_penalty": 1.3, "min_new_tokens": 2}):
        given: dict[str, Any] = {"ids": ids, "cache_implementation": cache, **options}
        assert torch.equal(run(model, **given), run(twin, None, **given))


def test_sampling_draws_from_the_dequantised_model() -> None:
    model = pair("qwen3")[1]
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
    torch.manual_seed(3)
    expected = run(dequantised(model), None, **options)
    torch.manual_seed(3)
    assert torch.equal(run(model, **options), expected)


@needs_cpp
def test_the_recorded_step_reads_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = pair("llama", num_hidden_layers=2)[1], []
    real = recorded.RecordedLayers.run
    monkeypatch.setattr(
        recorded.RecordedLayers, "run", lambda *given: (runs.append(1), real(*given))[1]
    )
    found = run(model, max_new_tokens=30)
    assert len(runs) == 29
    monkeypatch.setattr("swathe.modeling.decoder.run_recorded", lambda *_: None)
    assert torch.equal(run(model, max_new_tokens=30), found) and len(runs) == 29


@needs_cpp
def test_a_recording_is_of_one_kind_of_weights() -> None:
    model = pair("llama", num_hidden_layers=2)[1]
    called = int8_module.with_weights(model, "int8")

    def logits(calls: tuple[Any, ...]) -> list[Tensor]:
        found, cache = [], None
        with torch.no_grad():
            for at, call in enumerate(calls):
                given = {"input_ids": IDS[:, at : at + 1], "past_key_values": cache}
                out = call(**given, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
        return found

    calls = (model, called, called, model, called, model)
    found = logits(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swathe.modeling.decoder.run_recorded", lambda *_: None)
        for one, other in zip(found, logits(calls), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_of_it_is_left() -> None:
    model = pair("qwen2")[1]
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, run(model, None)
    logits, attributes = model(IDS).logits, {n: set(vars(m)) for n, m in model.named_modules()}
    run(model)
    assert linear_module.being_read() is None
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(run(model, None), plain) and torch.equal(model(IDS).logits, logits)


def test_copies_and_files_have_none_of_it(tmp_path: Path, made: list[tuple[int, ...]]) -> None:
    model = pair("llama")[1]
    model.save_pretrained(tmp_path / "before")
    found, count = run(model), len(made)
    assert count == 4 * 7 + 1
    model.save_pretrained(tmp_path / "after")
    names = [
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("before", "after")
    ]
    assert names[0] == names[1]
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert torch.equal(run(twin), found)
        count += 4 * 7 + 1
        assert len(made) == count, "a copy rounds its own weights"


def test_it_is_kept_until_it_is_forgotten(made: list[tuple[int, ...]]) -> None:
    model = pair("llama")[1]
    found = run(model)
    assert torch.equal(run(model), found) and len(made) == 29
    held = [
        weakref.ref(k.int8.weight)
        for m, k in int8_module._kept.items()
        if m in set(model.modules())
    ]
    assert len(held) == 29
    model.forget_int8()
    assert not any(kept() is not None for kept in held)
    assert torch.equal(run(model), found) and len(made) == 58
    held = [
        weakref.ref(k.int8.weight)
        for m, k in int8_module._kept.items()
        if m in set(model.modules())
    ]
    del model
    gc.collect()
    assert len(held) == 29 and not any(kept() is not None for kept in held)


def in_place(linear: Linear) -> None:
    with torch.no_grad():
        linear.weight[1, 2] += 1.0


def a_number_and_back(linear: Linear) -> None:
    with torch.no_grad():
        linear.weight.neg_().neg_()


def behind_its_back(linear: Linear) -> None:
    linear.weight.data += 0.3


def another_parameter(linear: Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * -1.0)


def other_memory(linear: Linear) -> None:
    linear.weight.data = linear.weight.data * -1.0


@pytest.mark.parametrize(
    "change", [in_place, a_number_and_back, behind_its_back, another_parameter, other_memory]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_weight_is_noticed(
    change: Callable[[Linear], None], dtype: torch.dtype, made: list[tuple[int, ...]]
) -> None:
    model = pair("llama")[1].to(dtype)
    run(model)
    del made[:]
    change(model.model.layers[1].mlp.up_proj)
    found = run(model)
    assert made == [(74, 64)], "one weight is made anew"
    model.forget_int8()
    assert torch.equal(run(model), found)


def test_replaced_modules_and_other_dtypes_are_noticed(made: list[tuple[int, ...]]) -> None:
    model = pair("llama")[1]
    run(model)
    del made[:]
    model.lm_head = Linear(64, 99, bias=False)
    run(model)
    assert made == [(99, 64)]
    run(model.to(torch.bfloat16))
    assert len(made) == 1 + 29


class Adapter(nn.Module):
    """What adapters do: a projection, and a product of two small ones besides."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def adapt(model: Any) -> None:
    torch.manual_seed(4)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)


def hook(model: Any) -> None:
    projection = model.model.layers[0].mlp.gate_proj
    projection.register_forward_hook(lambda module, given, out: out * 0.5)


def put_a_forward(model: Any) -> None:
    projection = model.model.layers[2].self_attn.v_proj
    own = projection.forward
    projection.forward = lambda x: own(x) + 1.0


@pytest.mark.parametrize("wrap", [adapt, hook, put_a_forward])
def test_what_wraps_a_projection_gets_its_int8_result(wrap: Callable[[Any], None]) -> None:
    model = pair("llama")[1]
    wrapped, twin = copy.deepcopy(model), dequantised(model)
    wrap(wrapped), wrap(twin)
    expected = run(twin, None)
    assert torch.equal(run(wrapped), expected) and not torch.equal(run(model), expected)


def test_a_forward_by_others_meanwhile_reads_full_weights() -> None:
    model, expected = pair("llama")[1], []

    class Looking:
        def put(self, value: Tensor) -> None:
            expected.append(model(IDS).logits)

        def end(self) -> None: ...

    run(model, streamer=Looking(), max_new_tokens=3)
    with torch.no_grad():
        assert all(torch.equal(logits, model(IDS).logits) for logits in expected)


def test_in_inference_mode() -> None:
    model = pair("llama")[1]
    with torch.inference_mode():
        found = run(model)
        twin = copy.deepcopy(model)  # its parameters count no changes
        assert torch.equal(run(twin), found)
        twin.lm_head.weight.neg_()
        assert not torch.equal(run(twin), found)
    assert torch.equal(run(model), found)


def parametrize(model: Any) -> Any:
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    return model


def compiled(model: Any) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda model: model.train(),
            r"the model is in training mode; call model.eval\(\); or leave",
        ),
        (lambda model: model.to("meta"), "the model is on meta, and int8 is for CPUs"),
        (parametrize, "model.layers.1.mlp.up_proj is a ParametrizedLinear"),
        (compiled, "the model was compiled"),
    ],
)
def test_models_that_are_refused(change: Callable[[Any], Any], error: str) -> None:
    model = change(pair("llama")[1])
    with pytest.raises(ValueError, match=f"weights='int8': {error}"):
        int8_module.with_weights(model, "int8")


def test_names_that_are_refused() -> None:
    model = pair("llama")[1]
    for name in ("int4", "", True, torch.int8):
        with pytest.raises(ValueError, match=r"weights=.*; allowed: \(None, 'int8'\)"):
            run(model, name)
    with pytest.raises(ValueError, match="has no projections that are swathe's Linear"):
        Counter().eval().generate(IDS % 50, max_new_tokens=2, weights="int8")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        run(model)
    with pytest.raises(TypeError, match=r"has no option 'weight'.*'weights'"):
        model.generate(IDS, max_new_tokens=2, weight="int8")
