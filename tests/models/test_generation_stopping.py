"""Stop strings: found in the text of a row's new tokens, at the token that completes them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.generating import Bytes, Counter, ids, tiny_llamas
from swathe.modeling.generation import generate as generate_module
from swathe.modeling.generation.stopping import StopStrings


def counted(*rows: list[int], stop: Any, new: int = 9, **options: Any) -> list[list[int]]:
    out = Counter().generate(
        ids(*rows), max_new_tokens=new, stop_strings=stop, tokenizer=Bytes(), **options
    )
    assert out[:, : len(rows[0])].tolist() == [*rows]
    return out[:, len(rows[0]) :].tolist()


def test_a_row_ends_with_the_token_that_completes_a_string() -> None:
    assert counted([32], stop="$%") == [list(b'!"#$%')]
    assert counted([32], stop=["x", "#", "$%"]) == [list(b'!"#')]
    assert counted([32], stop=("!",)) == [list(b"!")]
    assert counted([32], stop="%$", new=6) == [list(b'!"#$%&')]


def test_min_new_tokens_keeps_away_tokens_and_no_strings() -> None:
    assert counted([32], stop="#", min_new_tokens=6) == [list(b'!"#')]


def test_the_prompt_is_not_searched() -> None:
    assert counted([35, 36], stop=["$", "$%"], new=3) == [list(b"%&'")]


def test_rows_end_by_themselves_by_strings_and_tokens() -> None:
    rows = counted([32], [37], [35], [40], stop=["()", '"'], eos_token_id=[38], pad_token_id=0)
    assert rows == [
        [33, 34, 0, 0, 0, 0, 0, 0, 0],
        [38, 0, 0, 0, 0, 0, 0, 0, 0],
        [36, 37, 38, 0, 0, 0, 0, 0, 0],
        [41, 42, 43, 44, 45, 46, 47, 48, 49],
    ]
    assert counted([32], [37], stop=['"', "()"], pad_token_id=0) == [
        [33, 34, 0, 0],
        [38, 39, 40, 41],
    ]


def test_ends_are_looked_at_every_step_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate_module.POLL, "cpu", 8)
    model = Counter()
    got: list[list[int]] = []
    streamer = SimpleNamespace(put=lambda t: got.append(t.tolist()), end=lambda: got.append([]))
    options: dict[str, Any] = {"max_new_tokens": 9, "stop_strings": "#", "tokenizer": Bytes()}
    assert model.generate(ids([32]), **options).tolist() == [[32, 33, 34, 35]]
    assert len(model.calls) == 3
    model.generate(ids([32]), streamer=streamer, **options)
    assert got == [[[32]], [33], [34], [35], []]


def first_end(text: bytes, strings: list[str]) -> int | None:
    """The first token with which the whole text so far holds a string."""
    for end in range(1, len(text) + 1):
        if any(string in Bytes().decode(list(text[:end])) for string in strings):
            return end
    return None


def found_end(text: bytes, strings: list[str], tokenizer: Any) -> int | None:
    stop = StopStrings(strings, tokenizer, 1)
    going = torch.tensor([False])
    for end, token in enumerate(text, 1):
        if stop.met(torch.tensor([token]), going).item():
            return end
    return None


def test_long_texts_are_searched_as_if_whole() -> None:
    draw = random.Random(3)
    ends = []
    for _ in range(150):
        text = "".join(draw.choices("aé🙂 b", k=250)).encode()
        strings = ["".join(draw.choices("aé🙂 b", k=draw.randint(3, 6))) for _ in range(2)]
        ends.append(first_end(text, strings))
        assert found_end(text, strings, Bytes()) == ends[-1], (text.decode(), strings)
    found = [end for end in ends if end is not None]
    assert len(found) > 50 and len([end for end in found if end > 150]) > 10 and None in ends


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    lengths: list[int] = []

    class Measured(Bytes):
        def decode(self, tokens: list[int], **options: Any) -> str:
            lengths.append(len(tokens))
            return super().decode(tokens, **options)

    assert found_end(b"ab" * 1000 + b"stop", ["stop"], Measured()) == 2004
    assert max(lengths) < 60


def test_ended_rows_are_not_decoded() -> None:
    class Never:
        def decode(self, tokens: list[int]) -> str:
            assert tokens == [35]
            return "#"

    ended = torch.tensor([True, False])
    assert StopStrings(["#"], Never(), 2).met(torch.tensor([35, 35]), ended).tolist() == [0, 1]
    assert ended.tolist() == [True, False]
    stop = StopStrings(["#"], Never(), 2)
    assert not stop.met(torch.tensor([36, 37]), torch.tensor([True, True])).any()


def test_equal_to_transformers(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ours, theirs = tiny_llamas(tmp_path)
    prompt = torch.randint(3, 64, (3, 6))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24}
    free = ours.generate(prompt, eos_token_id=[], **options)[:, 6:]
    texts = [tokenizer.decode(row.tolist()) for row in free]
    strings = [texts[0][7:10], texts[1][14:16]]
    options |= {"stop_strings": strings, "tokenizer": tokenizer, "eos_token_id": []}
    mine = ours.generate(prompt, **options)
    assert torch.equal(mine[:1, :16], torch.cat((prompt, free), 1)[:1, :16])
    assert (mine[0, 16:] == 0).all() and mine[0, 16:].numel()
    assert torch.equal(mine, theirs.generate(prompt, do_sample=False, **options))
