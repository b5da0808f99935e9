"""generate: transformers' tokens, ends and padding, sampling that is what it says, text streams."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.generating import Bytes, Counter, V, both, ids, tiny_llamas
from swathe.modeling.checkpoint.errors import CheckpointWarning
from swathe.modeling.generation import generate as generate_module
from swathe.modeling.generation.config import GenerationConfig
from swathe.modeling.generation.generate import GenerateOutput
from swathe.modeling.generation.streamer import TextStreamer


def test_one_forward_a_token() -> None:
    model = Counter()
    out = model.generate(ids([5, 6], [20, 30]), max_new_tokens=4)
    assert out.tolist() == [[5, 6, 7, 8, 9, 10], [20, 30, 31, 32, 33, 34]]
    assert [tuple(call["input_ids"].shape) for call in model.calls] == [(2, 2), *[(2, 1)] * 3]
    assert [call["position_ids"].tolist() for call in model.calls] == [
        [[0, 1]],
        [[2]],
        [[3]],
        [[4]],
    ]
    first = model.calls[0]
    assert first["use_cache"] is True and first["logits_to_keep"] == 1
    assert first["attention_mask"] is None
    assert all(call["past_key_values"] is first["past_key_values"] for call in model.calls)


def test_rows_end_by_themselves_and_are_padded() -> None:
    prompt = ids([5, 6], [1, 2], [30, 31])
    expected = [[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6], [30, 31, 32, 33, 34, 0]]
    out = Counter().generate(prompt, max_new_tokens=4, eos_token_id=[8, 34], pad_token_id=0)
    assert out.tolist() == expected
    ended = Counter().generate(prompt[::2], max_new_tokens=9, eos_token_id=[8, 34], pad_token_id=0)
    assert ended.tolist() == [[5, 6, 7, 8, 0], [30, 31, 32, 33, 34]]
    assert Counter().generate(ids([5]), max_new_tokens=9, eos_token_id=7).tolist() == [[5, 6, 7]]
    without_pad = Counter().generate(prompt, max_new_tokens=4, eos_token_id=8)
    assert without_pad[0].tolist() == [5, 6, 7, 8, 8, 8]


def test_looking_now_and_then_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Counter, new: int) -> list[list[int]]:
        options: Any = {"max_new_tokens": new, "eos_token_id": [8, 34], "pad_token_id": 0}
        return model.generate(ids([5, 6], [30, 31]), **options).tolist()

    often = [run(Counter(), new) for new in (1, 2, 3, 4, 20)]
    monkeypatch.setitem(generate_module.POLL, "cpu", 8)
    model = Counter()
    assert [run(Counter(), new) for new in (1, 2, 3, 4)] + [run(model, 20)] == often
    assert len(model.calls) == 8


def test_special_tokens_come_from_call_then_generation_config_then_config() -> None:
    model = Counter(eos_token_id=9, pad_token_id=3)
    assert model.generate(ids([5]), max_new_tokens=9)[0, -1] == 9
    model.generation_config = GenerationConfig(eos_token_id=[7, 8])
    assert model.generate(ids([5]), max_new_tokens=9)[0, -1] == 7
    assert model.generate(ids([5]), max_new_tokens=9, eos_token_id=6)[0, -1] == 6
    assert model.generate(ids([5]), max_new_tokens=9, eos_token_id=[]).shape == (1, 10)
    assert model.generate(ids([5], [9]), max_new_tokens=3)[0].tolist() == [5, 6, 7, 3]


def test_impossible_tokens_in_a_config_are_no_tokens() -> None:
    model = Counter(eos_token_id=[V, 8], pad_token_id=-1)
    assert model.generate(ids([5], [9]), max_new_tokens=4)[0].tolist() == [5, 6, 7, 8, 8]


def test_min_new_tokens_and_return_dict() -> None:
    out = Counter().generate(
        ids([5]), max_new_tokens=5, min_new_tokens=3, eos_token_id=[6, 9], return_dict=True
    )
    assert isinstance(out, GenerateOutput) and out.sequences is not None
    assert not {6, 9} & set(out.sequences[0, 1:4].tolist())


def test_left_padding_reaches_the_model() -> None:
    model = Counter()
    model.generate(
        ids([0, 0, 4], [5, 6, 7]), max_new_tokens=2, pad_token_id=0,
        attention_mask=ids([0, 0, 1], [1, 1, 1]),
    )  # fmt: skip
    assert model.calls[0]["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert model.calls[0]["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2]]
    assert model.calls[1]["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert model.calls[1]["position_ids"].tolist() == [[1], [3]]


def test_the_result_can_be_trained_on() -> None:
    out = Counter().generate(ids([5]), max_new_tokens=2)
    assert not out.is_inference() and out.is_contiguous()
    nn.Embedding(V, 2)(out).sum().backward()


GOOD = ids([5, 6])
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no ids": ({"input_ids": None}, TypeError, "input_ids is a NoneType"),
    "a list": ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list"),
    "floats": ({"input_ids": torch.ones(1, 2)}, TypeError, r"torch.float32.*\.long\(\)"),
    "one dimension": ({"input_ids": GOOD[0]}, ValueError, r"input_ids\[None\]"),
    "empty prompt": ({"input_ids": GOOD[:, :0]}, ValueError, "empty prompt.*bos_token_id"),
    "no rows": ({"input_ids": GOOD[:0]}, ValueError, "empty prompt"),
    "id too large": ({"input_ids": ids([V])}, ValueError, f"from 50 to 50.*0 to {V - 1}"),
    "negative id": ({"input_ids": ids([-1])}, ValueError, "from -1"),
    "other device": ({"input_ids": GOOD.to("meta")}, ValueError, "on meta, the model on cpu"),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
    "half a token": ({"max_new_tokens": 1.5}, ValueError, "max_new_tokens is 1.5"),
    "no limit": ({"max_new_tokens": None}, TypeError, "needs max_new_tokens, or max_length"),
    "two limits": ({"max_length": 9}, ValueError, "max_new_tokens=3 and max_length=9.*one of them"),
    "no room": (
        {"max_new_tokens": None, "max_length": 2}, ValueError, "max_length is 2.*at least 3"),
    "half a length": (
        {"max_new_tokens": None, "max_length": 4.5}, ValueError, "max_length is 4.5"),
    "min above length": (
        {"max_new_tokens": None, "max_length": 5, "min_new_tokens": 4}, ValueError,
        "min_new_tokens is 4.*from 0 to 3, which max_length=5 leaves"),
    "stop strings, no tokenizer": ({"stop_strings": "a"}, TypeError, "tokenizer is a NoneType"),
    "empty stop string": (
        {"stop_strings": ["a", ""], "tokenizer": Bytes()}, ValueError, "none of them empty"),
    "no stop strings": ({"stop_strings": [], "tokenizer": Bytes()}, ValueError, "is \\[\\]"),
    "stop strings as ids": ({"stop_strings": [3], "tokenizer": Bytes()}, ValueError, "is \\[3\\]"),
    "tokenizer alone": ({"tokenizer": Bytes()}, ValueError, "pass stop_strings or leave tokenizer"),
    "stop strings of rows, no pad token": (
        {"input_ids": ids([1], [3]), "stop_strings": "a", "tokenizer": Bytes()},
        ValueError, "different steps.*pass pad_token_id"),
    "min above max": ({"min_new_tokens": 4}, ValueError, "min_new_tokens is 4.*max_new_tokens=3"),
    "temperature 0": ({"do_sample": True, "temperature": 0.0}, ValueError, "do_sample=False"),
    "temperature -1": ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature is -1"),
    "top_k 0": ({"do_sample": True, "top_k": 0}, ValueError, "top_k is 0"),
    "top_p 0": ({"do_sample": True, "top_p": 0.0}, ValueError, "top_p is 0.0"),
    "top_p 1.1": ({"do_sample": True, "top_p": 1.1}, ValueError, "top_p is 1.1"),
    "min_p 1.1": ({"do_sample": True, "min_p": 1.1}, ValueError, "min_p is 1.1.*from 0 to 1"),
    "min_p -0.1": ({"do_sample": True, "min_p": -0.1}, ValueError, "min_p is -0.1"),
    "min_p without do_sample": ({"min_p": 0.1}, ValueError, "so min_p would do nothing"),
    "penalty 0": ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0.*above 0"),
    "no sequences": (
        {"do_sample": True, "num_return_sequences": 0}, ValueError, "num_return_sequences is 0"),
    "equal sequences": (
        {"num_return_sequences": 2}, ValueError, "would give equal rows.*pass do_sample=True"),
    "sampling without do_sample": ({"top_k": 5}, ValueError, "pass do_sample=True"),
    "eos beyond vocabulary": ({"eos_token_id": [3, V]}, ValueError, "eos_token_id is 50"),
    "negative pad": ({"pad_token_id": -1}, ValueError, "pad_token_id is -1"),
    "mask of another shape": (
        {"attention_mask": ids([1])}, ValueError, r"attention_mask is \(1, 1\).*\(1, 2\)"),
    "mask as a list": ({"attention_mask": [[1, 1]]}, ValueError, "attention_mask is list"),
    "mask of 2": ({"attention_mask": ids([1, 2])}, ValueError, "other than 0 and 1"),
    "a row of padding": (
        {"input_ids": ids([1, 2], [3, 4]), "attention_mask": ids([1, 0], [0, 0])},
        ValueError, "0 on all of row 1.*at least one token"),
    "unequal padding, no pad token": (
        {"input_ids": ids([1, 2], [3, 4]), "attention_mask": ids([0, 1], [1, 1])},
        ValueError, "pass pad_token_id"),
    "transformers' name": ({"inputs": GOOD}, TypeError, "it is called input_ids"),
    "misspelt option": ({"do_sampel": True}, TypeError, "'do_sampel'.*'do_sample'"),
    "generator elsewhere": (
        {"do_sample": True, "generator": SimpleNamespace(device=torch.device("cuda"))},
        ValueError, r"generator is on cuda.*torch.Generator\('cpu'\)"),
    "beam search": ({"num_beams": 2}, TypeError, "num_beams.*transformers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    options, kind, message = BAD_CALLS[case]
    model = Counter()
    with pytest.raises(kind, match=f"(?s){message}"):
        model.generate(**{"input_ids": GOOD, "max_new_tokens": 3, **options})
    assert not model.calls


def test_warning_about_padding_without_mask() -> None:
    model = Counter(pad_token_id=0)
    with pytest.warns(UserWarning, match="padding token 0.*no attention_mask"):
        model.generate(ids([0, 5]), max_new_tokens=1)
    model.generate(ids([0, 5]), max_new_tokens=1, attention_mask=ids([1, 1]))
    model.generate(ids([4, 5]), max_new_tokens=1)
    same_as_eos = Counter(pad_token_id=9, eos_token_id=9)
    same_as_eos.generate(ids([4, 9, 5]), max_new_tokens=1)  # the end of an earlier turn
    with pytest.warns(UserWarning, match="padding token 9"):
        same_as_eos.generate(ids([9, 4, 5]), max_new_tokens=1)


class Words:
    """A tokenizer whose first token loses its leading space, as sentencepiece's does."""

    words = (" one", " two", " three", "<eos>")

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        kept = [t for t in tokens if not (skip_special_tokens and t == 3)]
        return "".join(self.words[t] for t in kept).removeprefix(" ")


class Log(io.StringIO):
    """A file that remembers what each write brought."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def stream(streamer: TextStreamer, prompt: list[int], tokens: list[int]) -> None:
    streamer.put(torch.tensor([prompt]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()


def test_only_whole_characters_are_printed() -> None:
    text = "né €🙂 ok"
    log = Log()
    stream(TextStreamer(Bytes(), file=log), list(b"> "), list(text.encode()))
    assert log.getvalue() == f"> {text}\n"
    assert [w for w in log.writes if w] == ["> ", *text, "\n"]


def test_an_unfinished_character_is_printed_at_the_end() -> None:
    log = Log()
    stream(TextStreamer(Bytes(), file=log), list(b"a"), list("é".encode())[:1])
    assert log.getvalue() == "a\ufffd\n"


def test_streamed_spacing_and_skipping() -> None:
    log = Log()
    streamer = TextStreamer(Words(), skip_prompt=True, file=log, skip_special_tokens=True)
    stream(streamer, [0, 1], [2, 0, 3])
    stream(streamer, [1], [0])
    assert log.getvalue() == " three one\n one\n"


def test_streamer_takes_one_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1\).*one sequence"):
        Counter().generate(ids([5], [6]), max_new_tokens=2, streamer=TextStreamer(Bytes()))
    model = Counter(eos_token_id=7)
    model.generate(ids([33]), max_new_tokens=3, streamer=TextStreamer(Bytes()))
    assert capsys.readouterr().out == '!"#$\n'


def test_transformers_streamer_fits(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer as Theirs

    Counter().generate(ids([33]), max_new_tokens=3, streamer=Theirs(Bytes()))
    assert capsys.readouterr().out == '!"#$\n'


def test_generation_config(tmp_path: Path) -> None:
    assert GenerationConfig.from_pretrained(tmp_path) is None
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.6}')
    config = GenerationConfig(eos_token_id=[1, 2], pad_token_id=0, extra={"temperature": 0.6})
    assert GenerationConfig.from_pretrained(tmp_path) == config
    path.write_text(config.to_json_string())
    assert GenerationConfig.from_pretrained(tmp_path) == config

    path.write_text('{"eos_token_id": "</s>", "bos_token_id": 4}')
    with pytest.warns(CheckpointWarning, match="generation_config.json: eos_token_id is '</s>'"):
        assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(bos_token_id=4)
    for garbage in ("{", "[]", '{"a": 1, "a": 2}'):
        path.write_text(garbage)
        with pytest.warns(CheckpointWarning, match=r"generation_config.json.*ignored"):
            assert GenerationConfig.from_pretrained(tmp_path) is None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_llamas(tmp_path_factory.mktemp("llama"))


def test_greedy_equals_transformers(pair: tuple[Any, Any]) -> None:
    prompt = torch.randint(3, 64, (4, 9))
    ours, theirs = both(pair, prompt)
    assert torch.equal(ours, theirs) and ours.shape[1] > 12


def test_left_padding_equals_transformers_and_single_rows(pair: tuple[Any, Any]) -> None:
    prompt = torch.randint(3, 64, (3, 9))
    mask = torch.ones_like(prompt)
    mask[0, :4] = mask[1, :8] = 0
    prompt[mask == 0] = 0
    ours, theirs = both(pair, prompt, attention_mask=mask, eos_token_id=[])
    assert torch.equal(ours, theirs) and ours.shape == (3, 33)
    for row, skip in ((0, 4), (1, 8)):
        alone = pair[0].generate(prompt[row : row + 1, skip:], max_new_tokens=24, eos_token_id=[])
        assert torch.equal(alone[0], ours[row, skip:])


def test_eos_list_equals_transformers(pair: tuple[Any, Any]) -> None:
    prompt = torch.randint(3, 64, (4, 5))
    free = pair[0].generate(prompt, max_new_tokens=20, eos_token_id=[])
    ends = [int(free[0, 8]), int(free[1, 12]), int(free[2, 15])]
    ours, theirs = both(pair, prompt, eos_token_id=ends, min_new_tokens=2)
    assert torch.equal(ours, theirs)
    assert (ours == 0).any()


def test_streamed_text_equals_the_result(pair: tuple[Any, Any]) -> None:
    log = Log()
    prompt = torch.randint(32, 64, (1, 5))
    out = pair[0].generate(prompt, max_new_tokens=12, streamer=TextStreamer(Bytes(), file=log))
    assert log.getvalue() == Bytes().decode(out[0].tolist()) + "\n"
