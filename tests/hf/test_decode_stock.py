"""swathe.generate over transformers' own forwards: the loop's tokens, captured and not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import swathe
from support import graphs as double
from support.generating import Bytes
from support.graphs import drawn
from support.hf_zoo import build
from support.hf_zoo_coverage import listed
from support.hf_zoo_types import CAUSAL
from support.tiny_causal import with_lora
from swathe.modeling.errors import ConfigError
from swathe.modeling.generation import graph as graph_module
from swathe.modeling.hf import decode, masks

NEW = 12
PROMPT = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(2))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
HOLES = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1] * 7, [1, 0, 0, 0, 1, 1, 1]])

# positions in the scores; a window and grouped queries; keys of a low rank; states, with and
# without attention, in layers of their own and beside it; experts; experts and states
TYPES = ["bloom", "cohere2", "deepseek_v3", "mamba2", "jamba", "falcon_h1", "olmoe", "qwen3_next"]
# in transformers 5.10 the first two read the device in a step, and the last takes no padding
NOT_IN_OLDER = ("bloom", "deepseek_v3", "mamba2")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.3, "min_new_tokens": 6, "eos_token_id": [*range(80)]},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "sequences": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}


def stock(name: str) -> Any:
    """A tiny model of the type on the attention and the experts that it has on a GPU."""
    if name in NOT_IN_OLDER and transformers.__version__ != listed()["transformers"]:
        pytest.skip(f"{name} does otherwise in transformers {transformers.__version__}")
    model = build(CAUSAL[name], "eager" if name in ("bloom", "mamba2") else "sdpa")
    if any("Experts" in type(module).__name__ for module in model.modules()):
        model.set_experts_implementation("grouped_mm")
    model.generation_config.eos_token_id = None
    return model


def ours(model: Any, **options: Any) -> Tensor:
    """Tokens of a call on a ragged batch."""
    calling = SimpleNamespace(generate=lambda ids, **given: swathe.generate(model, ids, **given))
    return drawn(calling, **{"cache_implementation": None, "max_new_tokens": NEW, **options})


def theirs(model: Any, mask: Tensor, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    """transformers' own, greedy."""
    fixed = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    return model.generate(ids * mask, attention_mask=mask, **{**fixed, **options})


def to_the_end(model: Any, mask: Tensor, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    """The same by our loop."""
    free: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": [], "pad_token_id": 0}
    found = swathe.generate(model, ids * mask, attention_mask=mask, **{**free, **options})
    assert isinstance(found, Tensor)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[double.Graph]:
    return double.install(monkeypatch)


@pytest.mark.parametrize("name", TYPES)
def test_captured_tokens_are_transformers(name: str, made: list[double.Graph]) -> None:
    model = stock(name)
    expected = theirs(model, LEFT)
    assert torch.equal(to_the_end(model, LEFT, cuda_graph=True), expected)
    assert made[0].replays == NEW - 1
    # the graph serves another prompt, of another length and without padding
    other, full = PROMPT[:, 2:].flip(0), torch.ones(3, 5, dtype=torch.long)
    assert torch.equal(to_the_end(model, full, other), theirs(model, full, other))
    assert torch.equal(to_the_end(model, LEFT), expected)
    assert len(made) == 1


@pytest.mark.parametrize("name", TYPES)
def test_uncaptured_tokens_are_transformers(name: str) -> None:
    model = stock(name)
    expected = theirs(model, LEFT)
    for cache in (None, "dynamic", "static"):
        assert torch.equal(to_the_end(model, LEFT, cache_implementation=cache), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["cohere2", "falcon_h1"])
def test_every_option_is_the_loops(name: str, way: str, made: list[double.Graph]) -> None:
    model, options = stock(name), WAYS[way]
    expected = ours(model, cuda_graph=False, **options)
    assert not made
    for _ in range(2):
        assert torch.equal(ours(model, cuda_graph=True, **options), expected)
    steps = expected.shape[1] - 7
    assert made[0].replays == 2 * (steps - 1) and (steps < NEW) == (way == "penalised")
    if way == "sampled":
        assert not torch.equal(ours(model, seed=4, **options), expected)


def test_streams_and_strings_end_a_captured_row(made: list[double.Graph]) -> None:
    model = stock("cohere2")
    free = ours(model, cuda_graph=False)
    text = Bytes().decode(free[1, 11:13].tolist())
    found, streams = [], []
    for cuda_graph in (False, True):
        got: list[list[int]] = []
        streamer = SimpleNamespace(put=lambda t, got=got: got.append(t.tolist()), end=lambda: None)
        options = {"stop_strings": text, "tokenizer": Bytes(), "cuda_graph": cuda_graph}
        found.append(ours(model, streamer=streamer, **options))
        streams.append(got)
    assert torch.equal(found[0], found[1]) and streams[0] == streams[1] and len(streams[0]) > 9
    assert (found[1][1, 13:] == 0).all() and len(made) == 1


@pytest.mark.parametrize("mask", [LEFT, HOLES], ids=["left", "holes"])
@pytest.mark.parametrize("name", ["cohere2", "qwen3_next"])
def test_on_swathes_attention(
    name: str, mask: Tensor, made: list[double.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stock(name)
    expected = theirs(model, mask)
    model.set_attn_implementation("swathe")
    # a mask of a CPU's is looked at, a GPU's never
    monkeypatch.setattr(masks, "looked_at", lambda _: False)
    shapes, carrier = set(), masks._carrier

    def noted(*given: Any) -> Tensor:
        shapes.add(tuple(carrier(*given).shape))
        return carrier(*given)

    monkeypatch.setattr(masks, "_carrier", noted)
    assert torch.equal(to_the_end(model, mask, cuda_graph=True), expected)
    assert any(str(call.function).startswith("swathe") for call in made[0].calls)
    # flags of keys are handed on where padding is not the outline alone, and cost the fast kernel
    room = graph_module.ROOM
    rows = 1 if mask is LEFT else 1 + room // 2
    assert (3, 1, rows, 2) in shapes and ((3, 1, 1 + room // 2, 2) in shapes) == (mask is HOLES)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "kernels": lambda model: model.set_attn_implementation("swathe"),
    "weights elsewhere": lambda model: setattr(
        model.model.norm, "weight", nn.Parameter(model.model.norm.weight.flip(0))
    ),
    "a hook": lambda model: model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, out: 2 * out
    ),
    "an adapter": with_lora,
    "forgotten": swathe.hf.forget_graphs,
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_of_a_model_that_changed_are_dropped(change: str, made: list[double.Graph]) -> None:
    model = stock("cohere2")
    before = ours(model, cuda_graph=True)
    CHANGES[change](model)
    expected = ours(model, cuda_graph=False)
    assert torch.equal(ours(model, cuda_graph=True), expected) and len(made) == 2
    assert torch.equal(before, expected) == (change in ("kernels", "forgotten"))


def test_patched_models_are_captured_as_they_are(made: list[double.Graph]) -> None:
    model = stock("cohere2")
    expected = theirs(model, LEFT)
    assert swathe.patch(model).patched
    assert torch.equal(to_the_end(model, LEFT, cuda_graph=True), expected) and len(made) == 1


class Planted(nn.Module):
    """In the place of a norm: something that a replay would do otherwise than a call."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.calls = norm, 0
        self.state: Any = torch.zeros(1)


class Counting(Planted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(x) * (1 + self.calls / 1000)


class MadeAnew(Planted):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            self.state = self.state + 0.01
        return self.norm(x) + self.state


class OfThePrefill(Planted):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            self.state = x[:, :1] * 0.01
        return self.norm(x) + self.state


class Asking(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (2.0 if bool(x.sum() > 0) else 1.0)


class Growing(Planted):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            self.state = torch.cat((self.state, x.new_zeros(1)))
        return self.norm(x) + self.state.sum()


class FromTheHost(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * torch.tensor(2.0)


PLANTED = {
    Counting: "its steps differ: aten.mul.Tensor in test_decode_stock.py",
    MadeAnew: "its steps differ: aten.add.Tensor",
    OfThePrefill: "it reads what its prefill made",
    Asking: r"it asks the device \(aten._local_scalar_dense.default\), in test_decode_stock.py",
    Growing: "its steps differ: aten.cat",
    FromTheHost: "it makes a number of the host's a tensor",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_a_replay_would_do_otherwise_is_not_captured(
    planted: type[Planted], made: list[double.Graph]
) -> None:
    model = stock("cohere2")
    model.model.norm = planted(model.model.norm)
    why = PLANTED[planted]
    with pytest.warns(UserWarning, match=f"Cohere2ForCausalLM without a CUDA graph: {why}"):
        to_the_end(model, LEFT, max_new_tokens=3)
    # said once; asked for by name it is an error, and not tried it is none
    to_the_end(model, LEFT, max_new_tokens=3)
    to_the_end(model, LEFT, max_new_tokens=3, cuda_graph=False)
    with pytest.raises(ValueError, match=f"cuda_graph=True: {why}.*'auto'"):
        to_the_end(model, LEFT, cuda_graph=True)
    with pytest.raises(ValueError, match=f"'static' .* Cohere2ForCausalLM .*{why}"):
        to_the_end(model, LEFT, cache_implementation="static")
    assert not made


def test_a_cache_with_room_that_changes_the_numbers_is_refused() -> None:
    model = stock("moshi")  # whose windows count keys from the end of the room
    assert torch.equal(to_the_end(model, LEFT), theirs(model, LEFT))
    with pytest.raises(ValueError, match="its logits over a cache of fixed room are not"):
        to_the_end(model, LEFT, cache_implementation="static")


REFUSED = {
    "rwkv": "RwkvForCausalLM: it keeps what it has read in no cache",
    "blt": "how many layers",
    "musicgen": "another generate",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_decode_otherwise_are_sent_to_their_own(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{REFUSED[name]}.*model\.generate"):
        swathe.generate(build(CAUSAL[name]), PROMPT, max_new_tokens=2)


def test_encoder_decoders_are_sent_to_their_own() -> None:
    small: dict[str, Any] = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 99,
    }
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    with pytest.raises(ConfigError, match=r"T5ForCond.* encoder-decoder.*model\.generate"):
        swathe.generate(model, PROMPT, max_new_tokens=2)
    with pytest.raises(ConfigError, match="no head that generates"):
        swathe.generate(build(CAUSAL["cohere2"]).model, PROMPT, max_new_tokens=2)


def test_our_families_with_hooks_are_decoded_by_their_own_forward() -> None:
    model = build(CAUSAL["llama"])
    plain = to_the_end(model, LEFT)
    assert model in decode._ours and model not in decode._stock
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(to_the_end(model, LEFT), plain) and len(seen) == NEW
    with pytest.raises(ValueError, match="swathe's Linear"):
        to_the_end(model, LEFT, weights="int8")


def test_the_model_is_left_as_it_was(made: list[double.Graph]) -> None:
    model = stock("cohere2")
    expected = to_the_end(model, LEFT)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    model.model.layers[1].self_attn.attention_dropout = 0.5
    assert torch.equal(to_the_end(model, LEFT, cuda_graph=True), expected)
    assert [module.training for module in model.modules()] == modes
    assert not any(p.grad is not None for p in model.parameters())


def test_nothing_keeps_the_model_alive(made: list[double.Graph]) -> None:
    model = stock("cohere2")
    to_the_end(model, LEFT, max_new_tokens=2, cuda_graph=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not decode._stock and not graph_module._graphs


def test_its_special_tokens_end_a_row(made: list[double.Graph]) -> None:
    model = stock("cohere2")
    free = to_the_end(model, LEFT)
    model.generation_config.eos_token_id = [int(free[0, 9]), int(free[1, 12]), int(free[2, 8])]
    own = theirs(model, LEFT, min_new_tokens=0)
    found = to_the_end(model, LEFT, eos_token_id=None, pad_token_id=None)
    assert torch.equal(found, own) and own.shape[1] < free.shape[1]


def test_a_cache_of_fixed_room_forgets_what_would_poison_it(made: list[double.Graph]) -> None:
    model = stock("falcon_h1")
    expected = to_the_end(model, LEFT, cuda_graph=True)
    (captured,) = graph_module._graphs[decode._stock[model]].kept.values()
    for layer in captured.step.cache.layers:
        several = isinstance(layer.conv_states, dict)  # a tensor in older versions
        states = layer.conv_states.values() if several else [layer.conv_states]
        for t in (layer.keys, layer.values, *states):
            t.fill_(torch.nan)
    assert torch.equal(to_the_end(model, LEFT), expected) and len(made) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attn", ["sdpa", "swathe"])
@pytest.mark.parametrize("name", ["bloom", "cohere2", "deepseek_v3", "olmoe"])
def test_a_real_graph(name: str, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # products over more keys may round otherwise, and bfloat16 has ties
    monkeypatch.setattr(graph_module, "ROOM", 1)
    model = stock(name).bfloat16().cuda()
    if name != "bloom":
        model.set_attn_implementation(attn)
    mask, ids = LEFT.cuda(), PROMPT.cuda()
    expected = to_the_end(model, mask, ids, cuda_graph=False, cache_implementation="static")
    for asked in (True, "auto", True):
        assert torch.equal(to_the_end(model, mask, ids, cuda_graph=asked), expected)
    (kept,) = graph_module._graphs[decode._stock[model]].kept.values()
    assert kept.graph is not None
    swathe.hf.forget_graphs(model)
    assert decode._stock[model] not in graph_module._graphs
