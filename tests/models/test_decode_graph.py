"""generate with its step captured: the loop's tokens, nothing asked, graphs kept and dropped."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from support import graphs as double
from support.families import pair, tokens
from support.generating import Bytes
from support.graphs import MASK, NEW, drawn
from swathe.modeling import forward as forward_module
from swathe.modeling.generation import generate as generate_module
from swathe.modeling.generation import graph as graph_module
from swathe.modeling.layers import grouped

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.3, "min_new_tokens": 40},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "sequences": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}
CASES = [
    *(("llama", "eager", way) for way in WAYS),
    *((name, None, way) for name in ("gemma3_text", "gpt_oss") for way in ("greedy", "sampled")),
    ("qwen3_moe", None, "sampled"),
    ("phi3", None, "penalised"),  # whose rotation remembers the longest position
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[double.Graph]:
    return double.install(monkeypatch)


@pytest.fixture
def model() -> Any:
    return pair("llama", "eager", num_hidden_layers=1)[1]


@pytest.mark.parametrize(("family", "kernels", "way"), CASES)
def test_replayed_tokens_are_the_loops(
    family: str, kernels: str | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch has a grouped product for a CPU as well: one operator, as on a GPU
    monkeypatch.setattr(grouped, "has_kernel", lambda x, weight: True)
    monkeypatch.setattr(graph_module, "has_kernel", lambda x, weight: True)
    _, model = pair(family, kernels, intermediate_size=64)  # rows of 16 bytes, for that product
    options = WAYS[way]
    ends = [] if way != "penalised" else drawn(model, cuda_graph=False, **options)[:, 40].tolist()
    expected = drawn(model, cuda_graph=False, eos_token_id=ends, **options)
    made = double.install(monkeypatch)
    forwards: list[int] = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    found = [drawn(model, cuda_graph=True, eos_token_id=ends, **options) for _ in range(2)]
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    assert len(made) == 1 and made[0].replays == 2 * (expected.shape[1] - 7 - 1)
    # to warm up and to capture, and two prompts
    assert len(forwards) == graph_module.WARM_UPS + 1 + 2


def test_tokens_with_kernels_of_triton(made: list[double.Graph]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "attention_mask": None, "pad_token_id": 1}
    _, model = pair("llama", {"attn": "triton", "norm": "triton"}, num_hidden_layers=1)
    expected = drawn(model, cuda_graph=False, **options)
    assert torch.equal(drawn(model, cuda_graph=True, **options), expected)
    names = {str(call.function) for call in made[0].calls}
    assert any(name.startswith("swathe") for name in names), names


def test_the_devices_own_generator_is_drawn_from(model: Any, made: list[double.Graph]) -> None:
    found, states = [], []
    for cuda_graph in (False, True, True):
        torch.manual_seed(5)
        found.append(drawn(model, None, do_sample=True, cuda_graph=cuda_graph))
        states.append(torch.get_rng_state())
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    assert torch.equal(states[1], states[0]) and torch.equal(states[2], states[0])
    assert not torch.equal(drawn(model, None, do_sample=True, cuda_graph=True), found[0])
    assert len(made) == 1


def test_what_happens_on_the_host_follows_each_replay(model: Any, made: list[double.Graph]) -> None:
    found, streams = [], []
    for cuda_graph in (False, True):
        got: list[list[int]] = []
        streamer = SimpleNamespace(put=lambda t, got=got: got.append(t.tolist()), end=lambda: None)
        free = drawn(model, cuda_graph=False, max_new_tokens=20)
        text = Bytes().decode(free[1, 15:18].tolist())
        options: dict[str, Any] = {"stop_strings": text, "tokenizer": Bytes()}
        found.append(drawn(model, streamer=streamer, cuda_graph=cuda_graph, **options))
        streams.append(got)
    assert torch.equal(found[0], found[1]) and streams[0] == streams[1]
    assert (found[1][1, 18:] == 0).all() and found[1].shape == (3, 71)


class Syncs(TorchDispatchMode):
    """Counts the questions that the host asks the device."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))


def test_the_host_asks_once_in_a_poll(
    model: Any, made: list[double.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(generate_module.POLL, "cpu", 8)
    monkeypatch.setattr(forward_module, "_within", lambda ids, vocab_size: True)
    counts = {}
    for new in (2, 2, 8, 66):
        with Syncs() as syncs:
            drawn(model, cuda_graph=True, max_new_tokens=new, eos_token_id=[98])
        counts[new] = syncs.count
    assert len(made) == 1
    assert counts[66] - counts[2] == 8 and counts[8] == counts[2]


def test_ends_between_two_looks_cost_nothing_but_steps(
    model: Any, made: list[double.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = drawn(model, cuda_graph=False)
    ends = free[:, [9, 17, 12]].diagonal().tolist()
    expected = drawn(model, cuda_graph=False, eos_token_id=ends)
    monkeypatch.setitem(generate_module.POLL, "cpu", 8)
    assert torch.equal(drawn(model, cuda_graph=True, eos_token_id=ends), expected)
    steps = expected.shape[1] - 7
    assert made[0].replays == -(-steps // 8) * 8 - 1 < NEW - 1


def test_graphs_are_kept_by_rows_room_and_policy(model: Any, made: list[double.Graph]) -> None:
    first = drawn(model, cuda_graph=True)
    before = first.clone()
    drawn(model, cuda_graph=True, max_new_tokens=graph_module.ROOM - 7)  # the whole room
    model.generate(tokens(3, 90), max_new_tokens=9, eos_token_id=[], pad_token_id=0,
                   cache_implementation="static", cuda_graph=True)  # fmt: skip
    assert len(made) == 1 and torch.equal(first, before), "results are no views of the buffer"
    others: list[dict[str, Any]] = [
        {"max_new_tokens": graph_module.ROOM - 6}, {"pad_token_id": 1}, {"eos_token_id": [5]},
        {"repetition_penalty": 2.0}, {"do_sample": True},
    ]  # fmt: skip
    for count, options in enumerate(others, 2):
        drawn(model, cuda_graph=True, **{"max_new_tokens": 4, **options})
        assert len(made) == count
        drawn(model, cuda_graph=True, **{"max_new_tokens": 4, **options})
        assert len(made) == count
    assert len(graph_module._graphs[model].kept) == graph_module.KEPT
    assert len({id(graph.memory) for graph in made}) == 1, "they share memory"
    drawn(model, cuda_graph=True, max_new_tokens=2)  # had to give way
    assert len(made) == len(others) + 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda model: model.to(torch.float64),
    "kernels": lambda model: model.set_attn_implementation("sdpa"),
    "weights elsewhere": lambda model: setattr(
        model.model.norm, "weight", nn.Parameter(model.model.norm.weight + 1)
    ),
    "a hook": lambda model: model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, out: 2 * out
    ),
    "a module's mode": lambda model: model.model.layers[0].train(),
    "forgotten": lambda model: model.forget_graphs(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_of_a_model_that_changed_are_dropped(
    change: str, model: Any, made: list[double.Graph]
) -> None:
    drawn(model, cuda_graph=True)
    CHANGES[change](model)
    expected = drawn(model, cuda_graph=False)
    assert torch.equal(drawn(model, cuda_graph=True), expected)
    assert len(made) == 2 and len(graph_module._graphs[model].kept) == 1


def test_weights_written_in_place_need_no_new_graph(model: Any, made: list[double.Graph]) -> None:
    old = drawn(model, cuda_graph=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    found = drawn(model, cuda_graph=True)
    assert torch.equal(found, drawn(model, cuda_graph=False)) and not torch.equal(found, old)
    assert len(made) == 1


def test_a_graph_keeps_no_model_alive(made: list[double.Graph]) -> None:
    model = pair("llama", "eager", num_hidden_layers=1)[1]
    drawn(model, cuda_graph=True, max_new_tokens=2)
    copy.deepcopy(model), pickle.dumps(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and made[0].replays == 1
    with pytest.raises(double.Refused, match="memory that was freed"):
        made[0].replay()


def test_a_call_within_a_call_and_one_that_fails(model: Any, made: list[double.Graph]) -> None:
    expected = drawn(model, cuda_graph=False, max_new_tokens=6)
    inner = []

    def put(_: Tensor) -> None:
        inner.append(drawn(model, cuda_graph=True, max_new_tokens=6))

    streamer = SimpleNamespace(put=put, end=lambda: None)
    outer = drawn(model, cuda_graph=True, max_new_tokens=6, streamer=streamer)
    assert torch.equal(outer, expected) and all(torch.equal(i, expected) for i in inner)
    count = len(made)

    def fail(value: Tensor) -> None:
        if value.dim() == 1:
            raise OSError("no more paper")

    with pytest.raises(OSError, match="paper"):
        drawn(model, cuda_graph=True, streamer=SimpleNamespace(put=fail, end=None))
    # what a call was using is not kept; the one beside it is gone as well, for they had one key
    assert torch.equal(drawn(model, cuda_graph=True, max_new_tokens=6), expected)
    assert len(made) == count + 1


def test_in_and_out_of_inference_mode(model: Any, made: list[double.Graph]) -> None:
    with torch.inference_mode():
        first = drawn(model, cuda_graph=True)
    second = drawn(model, cuda_graph=True)
    assert torch.equal(first, second) and len(made) == 1 and not second.is_inference()


def test_a_capture_leaves_the_models_buffers(made: list[double.Graph]) -> None:
    _, model = pair("phi3", None)
    model.model.rotary_emb.register_buffer("longest", torch.tensor(5), persistent=False)
    model.model.rotary_emb._frequencies = lambda positions: (
        model.model.rotary_emb.longest.add_(1).float() * 0 + model.model.rotary_emb.inv_freq
    )
    model.generate(tokens(1, 4), max_new_tokens=3, eos_token_id=[],
                   cache_implementation="static", cuda_graph=True)  # fmt: skip
    assert model.model.rotary_emb.longest == 5 + 3


def on_a_gpu(family: str) -> Any:
    own = {"moe_intermediate_size": 24} if family == "qwen3_moe" else {}
    return pair(family, None, intermediate_size=64, **own)[1].bfloat16().cuda()


def drawn_on_a_gpu(model: Any, cuda_graph: Any, rows: int = 3, **options: Any) -> Tensor:
    mask = MASK[:rows].cuda()
    if "do_sample" in options:
        options["generator"] = torch.Generator("cuda").manual_seed(3)
    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": []}
    return model.generate(
        tokens(rows, 7).cuda() * mask, attention_mask=mask, cache_implementation="static",
        cuda_graph=cuda_graph, **{**given, **options},
    )  # fmt: skip


@pytest.fixture
def exact_room(monkeypatch: pytest.MonkeyPatch) -> None:
    # products over more keys may round otherwise, and bfloat16 has ties
    monkeypatch.setattr(graph_module, "ROOM", 1)


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_a_real_graph(family: str, way: str, exact_room: None) -> None:
    model = on_a_gpu(family)
    expected = drawn_on_a_gpu(model, False, **WAYS[way])
    for asked in (True, "auto", True):
        assert torch.equal(drawn_on_a_gpu(model, asked, **WAYS[way]), expected)
    assert len(graph_module._graphs[model].kept) == 1
    model.forget_graphs()


@pytest.mark.gpu
@needs_a_gpu
def test_real_graphs_take_turns_in_the_memory_they_share(exact_room: None) -> None:
    model = on_a_gpu("llama")
    cases: list[dict[str, Any]] = [
        {"rows": rows, **options}
        for rows in (3, 1)
        for options in ({}, {"do_sample": True, "eos_token_id": [5]})
    ]
    expected = [drawn_on_a_gpu(model, False, **case) for case in cases]
    for _ in range(3):
        for case, wanted in zip(cases, expected, strict=True):
            assert torch.equal(drawn_on_a_gpu(model, True, **case), wanted)
    assert len(graph_module._graphs[model].kept) == len(cases)
    model.set_attn_implementation("eager")
    wanted = drawn_on_a_gpu(model, False)
    assert torch.equal(drawn_on_a_gpu(model, True), wanted)
    assert len(graph_module._graphs[model].kept) == 1
