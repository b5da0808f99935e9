"""README tells the truth: its examples run, its tables are those of the committed results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bench import readme
from bench.plot import pictures

README = readme.README.read_text()


@pytest.mark.parametrize("name", readme.PARTS)
def test_figures_are_the_committed_results(name: str) -> None:
    made = readme.PARTS[name]()
    assert readme.part(README, name) == made, "run python -m bench.readme, which writes it anew"


def test_every_generated_part_is_made() -> None:
    assert set(re.findall(r"<!-- (?!end)(.*?) -->", README)) == set(readme.PARTS)
    assert readme.renewed(README) == README
    changed = README.replace("<!-- norm table -->\n", "<!-- norm table -->\nold\n")
    assert changed != README and readme.renewed(changed) == README


def test_pictures_are_of_the_committed_results() -> None:
    found = {f"{picture.name}.svg": picture for picture in pictures(readme.RESULTS)}
    drawn = {file.name: file for file in readme.RESULTS.glob("*.svg")}
    assert drawn.keys() == found.keys(), "run make docs, and delete what is of no results"
    stale = [name for name, file in drawn.items() if not found[name].is_drawn(file)]
    assert not stale, "run make docs, which draws them anew"
    assert max(file.stat().st_size for file in drawn.values()) < 100_000
    assert all((readme.ROOT / path).exists() for path in re.findall(r"\]\((bench/[^)]+)\)", README))


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import swathe

    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    config = swathe.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    swathe.LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README example {number}", "exec"), {})


def test_the_benchmarks_readme_names_what_there_is() -> None:
    from bench.measure import row_keys
    from bench.record import SCHEMA, document
    from bench.subject import subject

    text = (readme.ROOT / "bench" / "README.md").read_text()
    first = " ".join(re.findall(r"^\|(.*?)\|", text, re.MULTILINE))
    _, _, facts = text.partition("A row of `benchmarks` has")
    named = {*re.findall(r"`(\w+)`", first + facts.partition("either")[0])}
    assert row_keys(subject("attention")) | document("rms_norm", "cpu").keys() <= named
    assert f"have the present one ({SCHEMA})" in text.replace("\n", " ")
    for module in re.findall(r"python -m (bench\.\w+)", text + README):
        assert importlib.util.find_spec(module), module


def test_every_function_is_listed_and_every_listed_one_exists() -> None:
    import swathe
    from bench.subject import OPS

    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(listed) == set(OPS)
    named = re.findall(r"`swathe\.(\w+)", README)
    assert all(hasattr(swathe, name) for name in (*listed, *named))
