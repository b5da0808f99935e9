"""Layers recorded once and run as one call: the loop's bits, and what ends a recording."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.families import pair, tokens
from swathe.kernels.core import cpp
from swathe.kernels.core.program import NotRecordable, recording
from swathe.kernels.linear.api import linear
from swathe.kernels.norm.api import rms_norm
from swathe.modeling import decoder, recorded
from swathe.modeling.cache import DynamicCache
from swathe.modeling.layers.linear import ROWS, Linear

pytestmark = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)
# families whose layers are the C++ library's throughout, without windows
WHOLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "gemma": {},
    "phi3": {"sliding_window": None},
}


def build(family: str = "llama", **changes: Any) -> Any:
    """The family's tiny model with two layers, whose small projections are C++ in a loop too."""
    given = {"num_hidden_layers": 2, "max_position_embeddings": 512, **changes}
    model = pair(family, **given)[1]
    for module in model.modules():
        if isinstance(module, Linear):
            module.few = ROWS * module.in_features
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """ "made" for each recording, "run" for each run of one."""
    seen: list[str] = []
    make, run = recorded.RecordedLayers.__init__, recorded.RecordedLayers.run

    def making(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        seen.append("made")

    def running(self: Any, *arguments: Any) -> Any:
        seen.append("run")
        return run(self, *arguments)

    monkeypatch.setattr(recorded.RecordedLayers, "__init__", making)
    monkeypatch.setattr(recorded.RecordedLayers, "run", running)
    yield seen


def in_a_loop(call: Callable[[], Any]) -> Any:
    """What the call returns where layers always run one after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "run_recorded", lambda *_: None)
        return call()


def steps(model: Any, ids: Tensor, sizes: tuple[int, ...], **options: Any) -> list[Tensor]:
    """Logits of the first of `sizes` tokens, then of the next, on one cache."""
    found, cache, at = [], DynamicCache(config=model.config), 0
    with torch.no_grad():
        for size in sizes:
            given = {k: v[:, : at + size] for k, v in options.items()}
            new = ids[:, at : at + size]
            found.append(model(new, past_key_values=cache, use_cache=True, **given).logits)
            at += size
    return found


def alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", WHOLE)
def test_the_same_bits_as_the_loop(family: str, dtype: torch.dtype, runs: list[str]) -> None:
    model = build(family, **WHOLE[family]).to(dtype)
    ids, sizes = tokens(2, 90), (20, *[1] * 50, 3, 3, 1, 8, 1, 1, 1, 1, 1)
    found = steps(model, ids, sizes)
    # of 16-bit numbers torch multiplies more than four rows
    taken = sum(2 * size <= (16 if dtype == torch.float32 else 4) for size in sizes)
    assert runs.count("run") == taken
    # new numbers of tokens, and a cache that has doubled, are recorded anew
    assert 2 <= runs.count("made") <= 8
    alike(found, in_a_loop(lambda: steps(model, ids, sizes)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths(side: str, runs: list[str]) -> None:
    model, ids = build(), tokens(3, 24)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :4] = 0
    if side == "right":
        mask = torch.cat((mask[:, :8].flip(1), mask[:, 8:]), 1)
    found = steps(model, ids, (8, *[1] * 16), attention_mask=mask)
    assert ("run" in runs) == (side == "left"), "holes among keys are no intervals of rows"
    alike(found, in_a_loop(lambda: steps(model, ids, (8, *[1] * 16), attention_mask=mask)))


def test_generate_is_the_loop(runs: list[str]) -> None:
    model, ids = build("qwen3", **WHOLE["qwen3"]), tokens(2, 5)

    def call(**options: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=70, eos_token_id=[], **options)

    for options in ({}, {"do_sample": True, "num_return_sequences": 3}):
        assert torch.equal(call(**options), in_a_loop(lambda o=options: call(**o)))
    assert runs.count("run") == 2 * 69


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mixtral", "gpt_oss", "mistral"])
def test_other_layers_run_as_they_are(family: str, runs: list[str]) -> None:
    model, ids = build(family), tokens(1, 24)
    found = steps(model, ids, (4, *[1] * 20))
    assert not runs
    alike(found, in_a_loop(lambda: steps(model, ids, (4, *[1] * 20))))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_other_backends_run_as_they_are(attn: str, runs: list[str]) -> None:
    model, ids = build(), tokens(1, 14)
    model.set_attn_implementation(attn)
    found = steps(model, ids, (8, *[1] * 6))
    assert not runs
    alike(found, in_a_loop(lambda: steps(model, ids, (8, *[1] * 6))))


def replace_data(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 2.0


def replace_module(model: Any) -> None:
    old = model.model.layers[0].self_attn.o_proj
    model.model.layers[0].self_attn.o_proj = new = copy.deepcopy(old)
    new.weight.data.mul_(0.5)


def replace_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])


def leave_out_a_layer(model: Any) -> None:
    model.config.num_hidden_layers = 1


def replace_parameter(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach() * 3.0)


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.neg_()


def replace_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


def hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 2.0)


def switch(model: Any) -> None:
    model.set_kernels("eager")


CHANGES = (
    replace_layer, leave_out_a_layer, replace_data, replace_module, replace_parameter,
    write_in_place, replace_forward, hook, switch,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_model_is_seen(change: Callable[[Any], None], runs: list[str]) -> None:
    ids = tokens(1, 16)

    def call() -> list[Tensor]:
        model, cache, found = build(), DynamicCache(), []
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            for at in range(8, 16):
                if at == 12:
                    change(model)
                out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                found.append(out.logits)
        return found

    found = call()
    assert runs.count("run") >= 4
    expected = in_a_loop(call)
    alike(found, expected)
    assert not torch.equal(found[3], found[4])


def test_what_happens_to_a_cache_is_seen(runs: list[str]) -> None:
    model, ids = build(), tokens(2, 30)

    def call() -> list[Tensor]:
        cache, found = DynamicCache(), []

        def step(at: int, rows: Tensor = ids) -> None:
            out = model(rows[:, at : at + 1], past_key_values=cache, use_cache=True)
            found.append(out.logits)

        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            step(8), step(9)
            cache.crop(-2)
            step(10), step(11)
            cache.reorder_cache(torch.tensor([1, 0]))
            step(12)
            twin = copy.deepcopy(cache)
            step(13), step(14)
            cache = twin
            step(15)
            cache.batch_repeat_interleave(2)
            step(16, ids.repeat_interleave(2, 0))
        return found

    found = call()
    assert runs.count("run") == len(found) and runs.count("made") >= 4
    alike(found, in_a_loop(call))


def test_positions_of_each_row(runs: list[str]) -> None:
    model, ids = build(), tokens(2, 14)

    def call() -> list[Tensor]:
        cache, found = DynamicCache(), []
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            for at in range(8, 14):
                own = torch.tensor([[at], [at + 3]]) if at > 10 else None
                given = {"past_key_values": cache, "use_cache": True, "position_ids": own}
                found.append(model(ids[:, at : at + 1], **given).logits)
        return found

    found = call()
    assert runs == ["made", "run", "run", "run", "made", "run", "run", "run"]
    alike(found, in_a_loop(call))


def test_a_layer_in_training_runs_in_a_loop(runs: list[str]) -> None:
    model, ids, cache = build(), tokens(1, 12), DynamicCache()
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        model(ids[:, 8:9], past_key_values=cache, use_cache=True)
        assert runs == ["made", "run"]
        model.model.layers[1].mlp.train()
        model(ids[:, 9:10], past_key_values=cache, use_cache=True)
        assert runs == ["made", "run"]


def test_what_asks_for_more_runs_in_a_loop(runs: list[str]) -> None:
    model, ids = build(), tokens(1, 12)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        out = model(ids[:, 8:9], past_key_values=cache, use_cache=True, output_hidden_states=True)
        assert len(out.hidden_states) == 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin = DynamicCache()
        model(ids[:, :8], past_key_values=twin, use_cache=True)
        model(ids[:, 8:9], past_key_values=twin, use_cache=True)
    model(ids[:, 10:11], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert model.lm_head.weight.grad is not None and not runs


def test_results_do_not_change_with_the_next_run() -> None:
    model, ids = build(), tokens(1, 12)
    first, second = steps(model, ids, (8, 1, 1))[1:]
    kept = first.clone()
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_a_program_runs_its_steps_on_new_numbers() -> None:
    x, weight, matrix = torch.randn(3, 40), torch.randn(40), torch.randn(7, 40)
    with recording() as program:
        y = rms_norm(x, weight, implementation="cpp")
        (z,) = linear(y, [matrix], implementation="cpp")
    for seed in range(3):
        x.copy_(torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)))
        program.run()
        assert torch.equal(y, rms_norm(x, weight, implementation="cpp"))
        assert torch.equal(z, linear(y, [matrix], implementation="cpp")[0])
    assert len(program.steps) == 2


@pytest.mark.parametrize(
    "compute", [lambda x: x + 1, lambda x: x.contiguous(), lambda x: bool(x[0, 0] > 0)]
)
def test_what_torch_would_compute_cannot_be_recorded(compute: Callable[[Tensor], Any]) -> None:
    x, weight = torch.randn(40, 3).T, torch.ones(40)
    with pytest.raises(NotRecordable, match="computes"), recording():
        compute(x)
    with pytest.raises(NotRecordable, match=r"contiguous|clone"), recording():
        rms_norm(x, weight, implementation="cpp")  # a copy inside the launcher
    # nothing of it is left
    assert rms_norm(x, weight, implementation="cpp").isfinite().all()
