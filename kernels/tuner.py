"""The offline tuner: times every candidate of an op's kernels on this GPU and writes the table.

    python -m swathe tune [--op rms_norm ...] [--dtypes bfloat16,float32] [--out DIR]

A candidate is timed only after its results were held to the op's contract. Without --out the table
goes beside the op's kernels, where it is found again.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from swathe.kernels.catalog import OPS
from swathe.kernels.core.contract import Case, Contract, Problem, measure
from swathe.kernels.core.testing import Report
from swathe.kernels.core.tune import SCHEMA, Blocks, Tunable, device_slug, read, tunables, use

Timer = Callable[[Callable[[], object]], float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, from a cold L2."""
    from triton.testing import do_bench

    median: Any = do_bench(call, warmup=20, rep=80, return_mode="median")
    return 1e3 * float(median)


def tune(
    op: str, dtypes: Sequence[str], *, device: str = "cuda", timer: Timer = microseconds
) -> list[dict[str, Any]]:
    """Rows of the table: for each kernel, row length and element size, the fastest right blocks."""
    contract = contract_of(op)
    assert contract.tuning is not None, f"the contract of {op} says how a kernel is tuned"
    import_module(f"{OPS[op].removesuffix('.api')}._triton")  # makes the op's tunables known
    rows = []
    for kernel, tunable in tunables[op].items():
        for N in contract.tuning_sizes:
            for name in dtypes:
                problem = contract.tuning(N, DTYPES[name], device)
                best = _fastest(contract, tunable, problem, N, timer)
                if best is None:
                    continue
                blocks, us, at_first = best
                facts = {"kernel": kernel, "columns_up_to": N, "itemsize": DTYPES[name].itemsize}
                rows.append({**facts, "blocks": list(blocks), "us": round(us, 2)})
                gain = f"{at_first / us:.2f}x of the heuristic's speed"
                print(f"{op} {kernel} {N} {name}: {tuple(blocks)} {us:.1f} us, {gain}", flush=True)
    return rows


def _fastest(
    contract: Contract, tunable: Tunable, problem: Problem, N: int, timer: Timer
) -> tuple[Blocks, float, float] | None:
    function = contract.on("triton")
    call = problem.call(function, backward=not tunable.kernel.startswith("forward"))
    # what a candidate is checked on need not be large; its rows are as long
    small = problem.map(lambda t: t[:64] if t.dim() > 1 else t)
    first = tunable.heuristic(N)
    times: dict[Blocks, float] = {}
    for blocks in dict.fromkeys((first, *tunable.candidates(N))):
        with tunable.forced(blocks):
            report = Report(contract.op)
            measure(contract, report, Case("", small), "triton")
            if report.misses:
                print(f"{contract.op} {tunable.kernel} {N} {tuple(blocks)}: {report.misses[0]}")
                continue
            times[blocks] = timer(call)
    if first not in times:
        return None
    best = min(times, key=times.__getitem__)
    return best, times[best], times[first]


def contract_of(op: str) -> Contract:
    """The contract of an op."""
    return import_module(f"{OPS[op].removesuffix('.api')}.contract").CONTRACT


def home(op: str) -> Path:
    """Where an op's tables lie."""
    return Path(str(import_module(OPS[op]).__file__)).parent / "configs"


def tunable_ops() -> list[str]:
    """Ops whose contracts say how they are tuned."""
    return sorted(
        op
        for op in OPS
        if (home(op).parent / "contract.py").exists() and contract_of(op).tuning is not None
    )


def use_tuned(path: str | Path) -> None:
    """Take the tuned blocks of an op from a file that `python -m swathe tune` wrote.

    It replaces what ships for that op, on every device, until the process ends. Raises ValueError
    for a file that is no such table or names an op without tunable kernels.
    """
    rows, op = read(Path(path)), json.loads(Path(path).read_text())["op"]
    known = tunable_ops()
    if op not in known:
        raise ValueError(f"{path} is for op {op!r}; ops with tunable kernels: {known}")
    use(op, rows)


def arguments(given: Sequence[str] | None) -> Namespace:
    """The command line, checked."""
    parser = ArgumentParser("python -m swathe tune", description=__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--op", action="append", help="an op; may be repeated; all without it")
    names = partial(str.split, sep=",")
    parser.add_argument("--dtypes", type=names, default=["bfloat16", "float32"], help="by comma")
    parser.add_argument("--out", type=Path, help="folder for <op>/<device>.json")
    asked = parser.parse_args(given)
    known = tunable_ops()
    for what, chosen, allowed in (
        ("--op", asked.op or [], known),
        ("--dtypes", asked.dtypes, list(DTYPES)),
    ):
        unknown = sorted(set(chosen) - set(allowed))
        if unknown:
            parser.error(f"{what} {unknown} unknown; allowed: {allowed}")
    asked.op = asked.op or known
    return asked


def main(given: Sequence[str] | None = None) -> int:
    """Tune, write, print; returns the exit status."""
    asked = arguments(given)
    if not torch.cuda.is_available():
        print(
            "tune: torch sees no GPU here, so there is nothing to time; run it on the machine that "
            "the table is for. Without a table, the heuristics beside the kernels choose.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    for op in asked.op:
        folder = asked.out / op if asked.out else home(op)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{device_slug(device)}.json"
        path.write_text(json.dumps(table(op, device, tune(op, asked.dtypes)), indent=1) + "\n")
        print(f"wrote {path}; swathe.use_tuned(path) takes it, and a new process finds it at home")
    return 0


def table(op: str, device: torch.device, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document around the rows: of which op, where, when and with what they were measured."""
    from triton import __version__ as triton_version

    return {
        "schema": SCHEMA,
        "op": op,
        "device": torch.cuda.get_device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton_version,
        "rows": list(rows),
    }
