"""The command line that training and decoding share, and the process that answers for them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import models
from bench.ceilings import ceilings
from bench.model_contenders import import_libraries
from bench.record import save
from bench.remote import serve_here
from bench.turns import LIMIT_S, Row, Task, Turns, document_of, fine, printed, usual


def parser(task: Task, doc: str | None, *, length: int, told: str) -> argparse.ArgumentParser:
    """The options that every task has."""
    found = argparse.ArgumentParser(prog=f"python -m bench.{task.name}", description=doc)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("--out", type=Path, help=f"folder for {task.name}.json")
    found.add_argument(
        "--models", default="llama_1b", help=f"by comma, of {', '.join(models.MODELS)}"
    )
    found.add_argument("--batch", type=int, default=1)
    found.add_argument("--length", type=int, default=length, help=told)
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--only", help=f"by comma, of {', '.join(task.contenders)}")
    found.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    found.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    found.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one answer")
    found.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    found.add_argument("--commit", help="the commit measured, where git cannot tell")
    return found


def checked(
    found: argparse.ArgumentParser, task: Task, given: Sequence[str] | None
) -> argparse.Namespace:
    """The command line, checked; `names` and `models` as lists."""
    asked = found.parse_args(given)
    asked.names = asked.only.split(",") if asked.only else usual(task, dry=asked.dry_run)
    asked.models = asked.models.split(",")
    for option, chosen, allowed in (
        ("--only", asked.names, task.contenders),
        ("--models", asked.models, models.MODELS),
    ):
        unknown = sorted({*chosen} - {*allowed})
        if unknown:
            found.error(f"{option}: {unknown} unknown; allowed: {list(allowed)}")
    if asked.out is None:
        found.error("--out DIR is needed")
    if min(asked.batch, asked.length - 1, asked.rounds) < 1:
        found.error("--batch and --rounds are 1 or more, --length 2 or more")
    seen = torch.cuda.is_available()
    if asked.device is None:
        asked.device = "cuda" if seen and not asked.dry_run else "cpu"
        if not seen and not asked.dry_run:
            found.error(
                "torch sees no GPU here; --device cpu measures a CPU, --dry-run only tests the code"
            )
    elif asked.device == "cuda" and (asked.dry_run or not seen):
        found.error("--device cuda: a dry run is on the CPU, and a run needs a GPU that torch sees")
    return asked


def facts_of(asked: argparse.Namespace, model: str, **more: Any) -> Row:
    """What a process is told of one model."""
    return {
        "model": model,
        "shape": models.shape_of(model, tiny=asked.dry_run),
        "batch": asked.batch,
        "length": asked.length,
        "dtype": asked.dtype,
        "device": asked.device,
        **more,
    }


def ran(task: Task, asked: argparse.Namespace, facts: Sequence[Row]) -> int:
    """Measure, write, print; 1 where a contender failed."""
    ceiling = ceilings(asked.device, asked.dtype, dry=asked.dry_run)
    results = document_of(task, asked.device, ceiling, dry=asked.dry_run, commit=asked.commit)
    for each in facts:
        turns = Turns(task, each, asked.names, limit_s=asked.limit)
        results["rows"] += turns.run(asked.rounds, ceiling)
        save(results, asked.out / f"{task.name}.json")
    print(printed(task, results))
    return int(not all(fine(row) for row in results["rows"] if row["ours"]))


def serving(task: Task, given: Sequence[str] | None) -> bool:
    """Whether this process was started to answer, which it then has done."""
    if list(sys.argv[1:] if given is None else given) != ["--serve"]:
        return False
    import_libraries()
    serve_here(task.worker())
    return True
