"""The demo's figures as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.demo.compare import ROUNDS, Divergence, Figures
from bench.demo.parity import ParityRow

MB = 1e6


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def draw(line: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join((first, *others)).rstrip()

    return "\n".join([draw(header), "  ".join("-" * width for width in widths), *map(draw, rows)])


def comparison_table(figures: Sequence[Figures]) -> str:
    """One row a contender; the first is what the others are compared with."""
    on_gpu = any(f.peak_gpu for f in figures)
    header = [
        "same weights, same prompts",
        "equal tokens",
        "logits differ by",
        "in fp32 by",
        "tokens/s (range)",
        "first token",
        "load",
        "peak memory (grown)",
        *(["GPU memory"] if on_gpu else []),
    ]
    rows = []
    for index, f in enumerate(figures):
        grown = f"{(f.peak - f.memory_before) / MB:.0f}"
        rows.append(
            [
                f"{f.library} {f.attention}",
                f"{f.equal_tokens} of {f.all_tokens}" if index else "reference",
                f"{f.logit_difference:.3g}" if index else "-",
                f"{f.logit_difference_fp32:.2g}" if index else "-",
                f"{f.tokens_per_s:.1f} ({f.slowest:.1f}-{f.fastest:.1f})",
                f"{f.first_token_s * 1e3:.0f} ms",
                f"{f.load_s:.2f} s",
                f"{f.peak / MB:.0f} MB ({grown})",
                *([f"{f.peak_gpu / MB:.0f} MB"] if on_gpu else []),
            ]
        )
    return table(header, rows)


def comparison_notes(figures: Sequence[Figures], new: int, threads: int) -> str:
    """What the comparison's columns mean."""
    return (
        f"Greedy, up to {new} tokens after each prompt, compared up to the first that differs. "
        "Logits: the largest\n"
        "absolute difference over all positions of the prompts; the largest logit is "
        f"{figures[0].largest_logit:.3g}. tokens/s: median of\n"
        f"{ROUNDS} interleaved rounds of {new} tokens after the first prompt, without the first "
        f"token; {threads} CPU threads.\n"
        "load: once, the file already in memory. Peak memory: resident, mapped files included, "
        "each in its own process;\n"
        "in brackets what it grew by after its imports. Everything but the fp32 column in the "
        "chosen dtype."
    )


def divergence_lines(figures: Sequence[Figures], decode: Callable[[int], str]) -> list[str]:
    """Every place where a contender's text leaves the reference's, and how close a call it was."""
    return [_divergence(f, d, decode) for f in figures for d in f.divergences]


def _divergence(f: Figures, d: Divergence, decode: Callable[[int], str]) -> str:
    theirs, ours = decode(d.theirs), decode(d.ours)
    tie = (
        "a near tie: the gap is no larger than the logits differ on the prompts"
        if abs(d.gap_theirs) <= f.logit_difference
        else "NOT a near tie"
    )
    return (
        f"{f.library} {f.attention} leaves the reference on prompt {d.prompt + 1} at position "
        f"{d.position}: {ours!r} for {theirs!r}.\n"
        f"  There the reference puts {theirs!r} {d.gap_theirs:+.4g} above {ours!r}, this one "
        f"{d.gap_ours:+.4g}; {tie}."
    )


def parity_table(rows: Sequence[ParityRow], triton: str) -> str:
    """One row an output; `triton` says how Triton's kernels ran."""
    header = [
        "RMSNorm on layer 0 of the model",
        "backend",
        "output",
        "rms error",
        "eager's",
        "x ideal",
        "x eager",
        "bits unlike eager's",
    ]
    return table(
        header,
        [
            [
                row.case,
                f"triton ({triton})" if row.backend == "triton" else row.backend,
                row.output,
                f"{row.rms:.3g}",
                f"{row.rms_eager:.3g}",
                f"{row.rho_ideal:.3f}",
                f"{row.rho_eager:.3f}",
                f"{row.differ} of {row.elements}",
            ]
            for row in rows
        ],
    )


PARITY_NOTES = """\
Errors against fp64 on the same rounded inputs: this kernel's, the eager layer's, and their ratio
(x eager); x ideal is the ratio to fp64 rounded once. h is the sum that the fused kernel forms.
y has the two roundings of HF's LlamaRMSNorm, so it cannot be closer than eager's: equal bits are
the aim there. Gradients round once."""
