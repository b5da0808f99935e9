"""README tells the truth: its examples run, its tables are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.report import markdown, read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results" / "cpu"


def block(name: str) -> str:
    """What stands between the marks of a generated part."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert found, f"README has no part {name!r}"
    return found.group(1).strip()


def norm_table() -> str:
    results = read(RESULTS / "rms_norm.json")
    results["benchmarks"] = [r for r in results["benchmarks"] if r["dtype"] == "bfloat16"]
    return markdown(results, variants=["forward", "forward+backward"])


def demo_table() -> str:
    figures = json.loads((RESULTS / "demo.json").read_text())["comparison"]
    lines = [
        ["", "equal tokens, bf16", "logits off, fp32", "tokens/s", "load", "peak memory"],
        ["---", *["---:"] * 5],
    ]
    for f in figures:
        bf16, fp32 = f["agreement"]["bfloat16"], f["agreement"]["float32"]
        lines.append(
            [
                f"{f['library']}, {f['attention']}",
                f"{bf16['equal_tokens']} of {bf16['all_tokens']}",
                f"{fp32['logit_difference']:.1e}",
                f"{f['tokens_per_s']:.1f}",
                f"{f['load_s']:.2f} s",
                f"{f['peak'] / 1e6:.0f} MB",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@pytest.mark.parametrize(("name", "made"), [("norm table", norm_table), ("demo table", demo_table)])
def test_tables_are_the_committed_results(name: str, made: object) -> None:
    assert callable(made)
    assert block(name) == made(), f"replace README's {name} with:\n{made()}"


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


def test_every_function_is_listed_and_every_listed_one_exists() -> None:
    import swathe
    from bench.subject import OPS

    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(listed) == set(OPS)
    named = re.findall(r"`swathe\.(\w+)", README)
    assert all(hasattr(swathe, name) for name in (*listed, *named))
