"""transformers' generate drives our models: every way of decoding gives transformers' tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swathe.hf
from support.families import FAMILIES, TINY, pair, tokens
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from swathe.modeling.generation.generate import GenerateOutput
from swathe.modeling.hf.generation import CACHE

NEW = 12
NAMED = ("llama", "qwen3", "gemma2", "mixtral")
OLD = CACHE == "past_key_values"
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_p": 0.9},
    "static": {"cache_implementation": "static"},
    "static beams": {"num_beams": 3, "cache_implementation": "static"},
    "processors": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [6, 7]],
        "min_new_tokens": 5,
        "eos_token_id": [2, 40, 41, 42],
    },
}


@lru_cache(maxsize=2)
def models(family: str) -> tuple[Any, Any]:
    """(transformers', ours with the bridge); both on eager attention."""
    theirs, ours = pair(family, "eager")
    return theirs, swathe.hf.with_generate(ours)


def left_padded() -> dict[str, Tensor]:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alike(family: str, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """What both generate, each from the same seed."""
    found = []
    for model in models(family):
        torch.manual_seed(3)
        given = {"max_new_tokens": NEW, "pad_token_id": 0} | options
        found.append(model.generate(**inputs, **{k: _for(model, v) for k, v in given.items()}))
    return found[0], found[1]


def _for(model: Any, option: Any) -> Any:
    """An option of its own for each model where a function makes it."""
    return option(model) if inspect.isfunction(option) else option


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_transformers_does(family: str, way: str) -> None:
    for inputs in (left_padded(), {"input_ids": tokens(2, 9)}):
        expected, found = alike(family, inputs, **WAYS[way])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", NAMED)
def test_everything_that_a_dict_returns(family: str) -> None:
    asked = dict.fromkeys(
        ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), True
    )
    expected, found = alike(family, left_padded(), return_dict_in_generate=True, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for mine, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    for step, (mine, other) in enumerate(
        zip(found.hidden_states, expected.hidden_states, strict=True)
    ):
        torch.testing.assert_close(mine[-1][1], other[-1][1], atol=1e-4, rtol=1e-4)
        shapes = [[w.shape for w in out.attentions[step]] for out in (found, expected)]
        assert shapes[0] == shapes[1]


def test_scores_of_beams() -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3}
    expected, found = alike("llama", left_padded(), **asked)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    theirs, ours = models("llama")
    both = [
        model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        for model, out in ((theirs, expected), (ours, found))
    ]
    torch.testing.assert_close(both[1], both[0])


def repetitive() -> dict[str, Tensor]:
    return {"input_ids": tokens(1, 5).repeat(1, 4)}


def assistant(model: Any) -> Any:
    """A smaller model with the other half's weights at random: it guesses wrong now and then."""
    return _small()[0 if isinstance(model, transformers.PreTrainedModel) else 1]


@lru_cache(maxsize=1)
def _small() -> tuple[Any, Any]:
    theirs, ours = pair("llama", "eager", num_hidden_layers=1)
    return theirs, swathe.hf.with_generate(ours)


def other_assistant(model: Any) -> Any:
    return _small()[1 if isinstance(model, transformers.PreTrainedModel) else 0]


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize(
    "speculation",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": assistant},
        {"assistant_model": other_assistant},
        {"assistant_model": assistant, "do_sample": True, "top_k": 5},
    ],
    ids=["prompt lookup", "assisted", "assisted by the other", "assisted sampling"],
)
def test_speculative_decoding(family: str, speculation: dict[str, Any]) -> None:
    if OLD and family in ("qwen3", "gemma2"):
        # this version cannot take tokens back from a cache of sliding layers, whoever's model it is
        speculation = {**speculation, CACHE: lambda model: transformers.DynamicCache()}
    expected, found = alike(family, repetitive(), eos_token_id=2, **speculation)
    assert torch.equal(found, expected)
    if not speculation.get("do_sample"):
        plain, _ = alike(family, repetitive(), eos_token_id=2)
        assert torch.equal(found, plain)


def test_guidance_calls_the_model_by_itself() -> None:
    negative = tokens(1, 3, seed=5)
    expected, found = alike(
        "llama", {"input_ids": tokens(1, 6)}, guidance_scale=1.7, negative_prompt_ids=negative
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, alike("llama", {"input_ids": tokens(1, 6)})[1])


@pytest.mark.parametrize("family", NAMED)
def test_embeddings_and_prefill_in_chunks(family: str) -> None:
    theirs, ours = models(family)
    ids = left_padded()
    embed = {m: m.get_input_embeddings()(ids["input_ids"]).detach() for m in (theirs, ours)}
    expected, found = alike(
        family,
        {"attention_mask": ids["attention_mask"]},
        inputs_embeds=lambda model: embed[model],
    )
    assert torch.equal(found, expected)
    expected, found = alike(family, ids, prefill_chunk_size=4)
    assert torch.equal(found, expected)


def test_own_processors_and_criteria_and_a_streamer() -> None:
    class Only(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(-1, torch.arange(50, 99), -torch.inf)

    class AfterFour(transformers.StoppingCriteria):
        def __call__(  # type: ignore[override]
            self, input_ids: Tensor, scores: Tensor, **kwargs: Any
        ) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 13)

    class Seen(list[Any]):
        def put(self, value: Tensor) -> None:
            self.append(value.tolist())

        def end(self) -> None:
            self.append("end")

    seen = {model: Seen() for model in models("llama")}
    expected, found = alike(
        "llama",
        {"input_ids": tokens(1, 9)},
        logits_processor=transformers.LogitsProcessorList([Only()]),
        stopping_criteria=transformers.StoppingCriteriaList([AfterFour()]),
        streamer=lambda model: seen[model],
    )
    assert torch.equal(found, expected) and found.shape == (1, 13) and found[0, 9:].max() < 50
    theirs, ours = seen.values()
    assert ours == theirs and ours[-1] == "end" and len(ours) == 6


def test_stop_strings() -> None:
    tokenizer = _letters()
    plain, _ = alike("llama", {"input_ids": tokens(1, 9)})
    stop = tokenizer.decode(plain[0, 12:14])
    expected, found = alike(
        "llama", {"input_ids": tokens(1, 9)}, stop_strings=[stop], tokenizer=tokenizer
    )
    assert torch.equal(found, expected) and found.shape[1] == 14 < plain.shape[1]


def _letters() -> transformers.PreTrainedTokenizerBase:
    """One letter for each of the 99 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(33 + i if i < 94 else 98 + i): i for i in range(99)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_static_step_is_compiled_where_transformers_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, ours = models("llama")
    compiled: list[dict[str, Any]] = []

    def compile_eagerly(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(options)
        torch.compiler.reset()
        return compile_(call, backend="eager", fullgraph=True)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    settings: Any = transformers.CompileConfig()
    settings._compile_all_devices = True
    for inputs in (left_padded(), {"input_ids": tokens(2, 9)}):
        expected, found = alike(
            "llama",
            inputs,
            cache_implementation=lambda model: "static" if model is ours else None,
            compile_config=lambda model: settings if model is ours else None,
        )
        assert torch.equal(found, expected)
    assert len(compiled) == 1 and compiled[0]["mode"] == "reduce-overhead"
    ours.generate(tokens(1, 4), max_new_tokens=2, pad_token_id=0)
    assert len(compiled) == 1  # a dynamic cache is not compiled


def test_what_is_missing_says_so() -> None:
    _, ours = models("llama")
    with pytest.raises(ValueError, match="not used by the model: \\['temprature'\\]"):
        ours.generate(tokens(), temprature=0.5)
    with pytest.raises(NotImplementedError, match="'dynamic' or 'static'"):
        ours.generate(tokens(), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(TypeError, match=r"no argument 'attn_mask'.*did you mean 'attention_mask'"):
        ours(tokens(), attn_mask=None)


def test_a_file_decides_as_it_does_in_transformers(tmp_path: Path) -> None:
    made, _ = pair("llama", "eager")
    made.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.8, eos_token_id=[3, 4, 70], pad_token_id=9
    )
    made.save_pretrained(tmp_path)
    theirs: Any = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    ours = swathe.hf.with_generate(LlamaForCausalLM.from_pretrained(tmp_path, kernels="eager"))
    assert ours.generation_config == theirs.generation_config
    found = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        found.append(model.generate(tokens(3, 6), max_length=30))
    assert torch.equal(*found)


def test_saving_is_unaffected(tmp_path: Path) -> None:
    plain = _plain()
    for step, own in enumerate((None, {"eos_token_id": [3, 4], "temperature": 0.5})):
        if own is not None:
            file = tmp_path / "0" / "generation_config.json"
            file.write_text(transformers.GenerationConfig(**own, do_sample=True).to_json_string())
            plain = LlamaForCausalLM.from_pretrained(file.parent)
        before, after, changed = (tmp_path / name for name in (str(step), f"b{step}", f"c{step}"))
        plain.save_pretrained(before)
        bridged = swathe.hf.with_generate(plain)
        bridged.save_pretrained(after)
        assert sorted(p.name for p in after.iterdir()) == sorted(p.name for p in before.iterdir())
        assert all(p.read_bytes() == (before / p.name).read_bytes() for p in after.iterdir())
        bridged.generation_config.max_new_tokens = 17
        bridged.save_pretrained(changed)
        again = transformers.GenerationConfig.from_pretrained(changed)
        assert again.max_new_tokens == 17 and again == bridged.generation_config
        swathe.hf.without_generate(bridged)


def _plain(**changes: Any) -> Any:
    """A model without the bridge."""
    return LlamaForCausalLM(LlamaConfig(**TINY, **changes)).eval()


def test_the_model_stays_what_it_is_and_comes_back() -> None:
    model = _plain(pad_token_id=0)
    expected = model.generate(tokens(), max_new_tokens=4)
    before = str(model)
    bridged = swathe.hf.with_generate(model)
    assert bridged is model and isinstance(bridged, LlamaForCausalLM) and str(model) == before
    assert swathe.hf.with_generate(model) is model
    assert isinstance(model.generate, Callable) and "num_beams" not in vars(model)
    assert torch.equal(model.generate(tokens(), max_new_tokens=4), expected)
    out = model(tokens(), use_cache=True)
    again = model(tokens(2, 1), cache=out.cache)
    assert again.cache is out.past_key_values is again["past_key_values"] is again.get("cache")
    assert out.get("nothing", 5) == 5 and out.get("loss") is None

    copied = copy.deepcopy(model)
    beams = {"num_beams": 2, "max_new_tokens": 4}
    assert torch.equal(copied.generate(tokens(), **beams), model.generate(tokens(), **beams))
    assert swathe.hf.without_generate(model) is model and type(model) is LlamaForCausalLM
    assert swathe.hf.without_generate(model) is model and model.generation_config is None
    assert isinstance(model.generate(tokens(), max_new_tokens=4, return_dict=True), GenerateOutput)
    assert type(copied) is not LlamaForCausalLM  # a copy keeps the bridge


def test_a_pickled_model_keeps_the_bridge(tmp_path: Path) -> None:
    _, ours = models("llama")
    torch.save(ours, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    asked = {"num_beams": 2, "max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens(), **asked), ours.generate(tokens(), **asked))
    assert type(swathe.hf.without_generate(loaded)) is LlamaForCausalLM


def test_only_language_models_of_swathe() -> None:
    theirs, _ = models("llama")
    others: list[Any] = [theirs, LlamaModel(LlamaConfig(**TINY)), torch.nn.Linear(2, 2)]
    for other in others:
        with pytest.raises(TypeError, match=f"given a {type(other).__name__}; it takes"):
            swathe.hf.with_generate(other)
