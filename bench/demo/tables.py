"""The demo's figures as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.demo.compare import EXACT, PREFILL, Agreement, Divergence, Figures
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


def comparison_table(figures: Sequence[Figures], dtype: str) -> str:
    """A column for each contender; the first is what the others are compared with."""
    header = ["same weights, same prompts", *(f"{f.library} {f.attention}" for f in figures)]
    rows = [
        row
        for kind in dict.fromkeys((dtype, EXACT))
        for row in (
            [f"equal tokens, {kind}", *_against_first(figures, kind, _tokens)],
            [f"largest logit difference, {kind}", *_against_first(figures, kind, _difference)],
        )
    ]
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("rms distance of logits from fp32's", lambda f: f"{f.logit_error:.3g}"),
        ("tokens/s, median", lambda f: f"{f.tokens_per_s:.1f}"),
        ("tokens/s, range", lambda f: f"{f.slowest:.1f} to {f.fastest:.1f}"),
        ("weights read, GB/s", lambda f: f"{f.read_gbps * f.of_read:.1f}"),
        ("  of what the machine reads", lambda f: f"{f.of_read:.2f}"),
        (f"prefill of {PREFILL} tokens", lambda f: f"{f.prefill_s * 1e3:.0f} ms"),
        ("prompt to first token", lambda f: f"{f.first_token_s * 1e3:.0f} ms"),
        ("load", lambda f: f"{f.load_s:.2f} s"),
        ("peak memory of the process", lambda f: f"{f.peak / MB:.0f} MB"),
        ("  beyond its imports", lambda f: f"{(f.peak - f.memory_before) / MB:.0f} MB"),
    ]
    if any(f.peak_gpu for f in figures):
        columns.append(("peak memory on the GPU", lambda f: f"{f.peak_gpu / MB:.0f} MB"))
    rows += [[name, *map(value, figures)] for name, value in columns]
    return table(header, rows)


def _against_first(
    figures: Sequence[Figures], kind: str, value: Callable[[Agreement], str]
) -> list[str]:
    return ["reference", *(value(f.agreement[kind]) for f in figures[1:])]


def _tokens(agreement: Agreement) -> str:
    if not agreement.all_tokens:
        return "-"
    return f"{agreement.equal_tokens} of {agreement.all_tokens}"


def _difference(agreement: Agreement) -> str:
    return f"{agreement.logit_difference:.3g}"


def comparison_notes(figures: Sequence[Figures], new: int, threads: int) -> str:
    """What the comparison's rows mean."""
    largest, rounds, reads = figures[0].largest_logit, figures[0].rounds, figures[0].read_gbps
    return f"""\
Greedy, up to {new} tokens after each prompt, equal up to the first that differs. Logits at every
position of the prompts; the largest is {largest:.3g}. Distance from fp32's: from transformers' own
in fp32. tokens/s: {rounds} interleaved rounds of {new} tokens after the first prompt, first token
not counted; threads: {threads}. A token reads the weights once; the machine reads memory at
{reads:.1f} GB/s. load: once, the file in the page cache. Memory: resident, mapped
files included, each contender in a process of its own, before its fp32 run."""


def divergence_lines(figures: Sequence[Figures], decode: Callable[[int], str]) -> list[str]:
    """Every place where a contender's text leaves the reference's, and how close a call it was."""
    return [
        _divergence(f, agreement.logit_difference, d, decode)
        for f in figures
        for agreement in f.agreement.values()
        for d in agreement.divergences
    ]


def _divergence(f: Figures, difference: float, d: Divergence, decode: Callable[[int], str]) -> str:
    one, other = decode(d.reference_token), decode(d.other_token)
    tie = (
        "a near tie (logits differ by more on the prompts)"
        if abs(d.gap_in_reference) <= difference
        else "NOT a near tie"
    )
    return (
        f"{f.library} {f.attention}, {d.dtype}, prompt {d.prompt + 1}: "
        f"after {d.equal_before} equal tokens {other!r} where the reference has {one!r}.\n"
        f"  The reference puts {one!r} {d.gap_in_reference:.4g} above {other!r}, "
        f"this one {d.gap_in_other:.4g}: {tie}."
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
