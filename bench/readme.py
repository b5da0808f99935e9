"""README's figures, made from the committed results: `python -m bench.readme` writes them anew.

A part of README between `<!-- NAME -->` and `<!-- end -->` is generated; PARTS says by what.
`make docs` also draws the pictures that stand there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from bench import overview
from bench.plot import pictures
from bench.record import ROOT
from bench.report import line, markdown, read

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "cpu"


def norm_table() -> str:
    """rms_norm in bf16, forward and with backward, at every size."""
    results = read(RESULTS / "rms_norm.json")
    results["benchmarks"] = [r for r in results["benchmarks"] if r["dtype"] == "bfloat16"]
    return markdown(results, variants=["forward", "forward+backward"])


def ops_table() -> str:
    """Every op beside its peers."""
    return overview.markdown(overview.documents(RESULTS))


def demo_table() -> str:
    """SmolLM2 beside transformers."""
    figures = json.loads((RESULTS / "demo.json").read_text())["comparison"]
    lines = [
        [
            "",
            "equal tokens, bf16",
            "logits off, fp32",
            "tokens/s",
            "of memory's speed",
            "512 tokens read",
            "load",
            "peak memory",
        ],
        ["---", *["---:"] * 7],
    ]
    for f in figures:
        bf16, fp32 = f["agreement"]["bfloat16"], f["agreement"]["float32"]
        lines.append(
            [
                f"{f['library']}, {f['attention']}",
                f"{bf16['equal_tokens']} of {bf16['all_tokens']}",
                f"{fp32['logit_difference']:.1e}",
                f"{f['tokens_per_s']:.1f}",
                f"{f['of_read']:.2f} of {f['read_gbps']:.0f} GB/s",
                f"{f['prefill_s'] * 1e3:.0f} ms",
                f"{f['load_s']:.2f} s",
                f"{f['peak'] / 1e6:.0f} MB",
            ]
        )
    return "\n".join(map(line, lines))


def picture_links() -> str:
    """The pictures that say most, and where the others are."""
    found = pictures(RESULTS)
    folder = RESULTS.relative_to(ROOT).as_posix()
    shown = [f"![{text}]({folder}/{name}.svg)" for name, text in SHOWN.items()]
    rows = [["op", "every cell"], ["---", "---"]]
    for op in dict.fromkeys(one.results[0]["op"] for one in found[1:]):
        kinds = [one.kind for one in found[1:] if one.results[0]["op"] == op]
        rows.append([f"`{op}`", ", ".join(f"[{kind}]({folder}/{op}-{kind}.svg)" for kind in kinds)])
    return "\n\n".join([*shown, "\n".join(map(line, rows))])


# pictures in README, with the text for those who cannot see them
SHOWN = {
    "peers": "Time of each peer over ours, every cell of every op",
    "attention-roofline": "attention under the roofs that the same run measured",
    "rms_norm-sizes": "rms_norm, GB/s against bytes, beside a copy",
}

PARTS: dict[str, Callable[[], str]] = {
    "demo table": demo_table,
    "ops table": ops_table,
    "norm table": norm_table,
    "pictures": picture_links,
}


def part(text: str, name: str) -> str:
    """What stands between the marks of a generated part."""
    found = _marked(name).search(text)
    assert found, f"README has no part {name!r}"
    return found.group(2).strip()


def renewed(text: str) -> str:
    """The text with every part made anew."""
    for name, make in PARTS.items():
        before, opening, _, closing, after = _marked(name).split(text)
        text = f"{before}{opening}\n{make()}\n{closing}{after}"
    return text


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->)\n(.*?)\n(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite README."""
    README.write_text(renewed(README.read_text()))


if __name__ == "__main__":
    main()
