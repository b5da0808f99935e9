"""A training step of a whole model: transformers as it is, with Liger, and with swathe.

    python -m bench.training --out DIR [--model llama_1b] [--batch 1] [--length 4096] [--rounds 2]
                             [--steps 8] [--only NAME,NAME] [--dry-run]

Every contender trains the same model from the same weights on the same tokens (random ones), in
bf16 with AdamW, in a process of its own, so that peak memory is its own. Rounds go through all of
them in turn. One table: tokens per second, peak memory and the losses of the first steps, which
show that all train alike. Writes DIR/training.json. `--dry-run` takes a tiny model on the CPU: it
tests this code and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.record import ROOT, document, save
from bench.report import aligned

Row = dict[str, Any]
# transformers' configurations by name: the models' true shapes
MODELS: dict[str, dict[str, Any]] = {
    "llama_1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3_0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "gemma_2b": {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WARM_UPS = 3
LIMIT_S = 300.0  # of one contender's process: a kernel that hangs costs one row


def _as_it_is(model: Any) -> Any:
    return model


def _compiled(model: Any) -> Any:
    return torch.compile(model)


def _liger(model: Any) -> Any:
    patching = import_module("liger_kernel.transformers.monkey_patch")
    patching._apply_liger_kernel_to_instance(model=model)
    return model


def _patched(model: Any) -> Any:
    import swathe

    print(swathe.patch(model), file=sys.stderr)
    return model


def _own(model: Any) -> Any:
    import swathe.hf

    return swathe.hf.from_hf(model, loss_implementation="auto")


# name: attention, and what is done to the model of transformers; ours are the last two
CONTENDERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "eager": ("eager", _as_it_is),
    "sdpa": ("sdpa", _as_it_is),
    "compile": ("sdpa", _compiled),
    "liger": ("sdpa", _liger),
    "patch": ("swathe", _patched),
    "own": ("sdpa", _own),
}


def train(asked: Row) -> Row:
    """Losses, seconds of each timed step and peak bytes of one contender, in this process."""
    import transformers

    import swathe.hf  # noqa: F401  attn_implementation="swathe"

    attention, prepare = CONTENDERS[asked["contender"]]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**asked["config"])
    with torch.device(asked["device"]):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    model = prepare(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    shape = (asked["batch"], asked["length"])
    losses, seconds = [], []
    for step in range(WARM_UPS + asked["steps"]):
        ids = torch.randint(config.vocab_size, shape, generator=generator).to(asked["device"])
        if step == WARM_UPS and asked["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = _now(asked["device"])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(_now(asked["device"]) - start)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() if asked["device"] == "cuda" else 0
    return {"losses": losses, "seconds": seconds[WARM_UPS:], "peak_bytes": peak}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rows(asked: argparse.Namespace, names: list[str]) -> list[Row]:
    """A row for each contender, of all rounds."""
    config = {**MODELS[asked.model], **(TINY if asked.dry_run else {})}
    facts = {
        "config": config,
        "device": "cpu" if asked.dry_run else "cuda",
        "batch": asked.batch,
        "length": asked.length,
        "steps": asked.steps,
    }
    answers: dict[str, list[Row]] = {name: [] for name in names}
    for turn in range(asked.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            print(f"round {turn + 1} of {asked.rounds}: {name}", file=sys.stderr, flush=True)
            answers[name].append(_in_a_process({**facts, "contender": name}))
    tokens = asked.batch * asked.length
    return [_row(name, each, tokens) for name, each in answers.items()]


def _in_a_process(facts: Row) -> Row:
    command = [sys.executable, "-m", "bench.training", "--one", json.dumps(facts)]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {LIMIT_S:.0f} s"}
    if run.returncode:
        return {"error": run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "died"}
    return json.loads(run.stdout.splitlines()[-1])


def _row(name: str, answers: list[Row], tokens: int) -> Row:
    errors = [answer["error"] for answer in answers if "error" in answer]
    if errors:
        return {"contender": name, "error": errors[0]}
    seconds = [s for answer in answers for s in answer["seconds"]]
    return {
        "contender": name,
        "tokens_per_s": round(tokens / statistics.median(seconds), 1),
        "slowest": round(tokens / max(seconds), 1),
        "fastest": round(tokens / min(seconds), 1),
        "peak_mib": round(max(answer["peak_bytes"] for answer in answers) / 2**20, 1),
        "losses": [round(loss, 5) for loss in answers[0]["losses"][:4]],
    }


def table(found: list[Row]) -> str:
    """Contenders beside sdpa, or the first that ran."""
    timed = [row for row in found if "error" not in row]
    base = next((r for r in timed if r["contender"] == "sdpa"), timed[0] if timed else None)
    head = ["contender", "tokens/s", "of sdpa's", "range", "peak MiB", "first losses"]
    body = []
    for row in found:
        if "error" in row or base is None:
            body.append([row["contender"], "failed", "", "", "", row.get("error", "")[:60]])
            continue
        body.append(
            [
                row["contender"],
                f"{row['tokens_per_s']:.0f}",
                f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}",
                f"{row['slowest']:.0f} to {row['fastest']:.0f}",
                f"{row['peak_mib']:.0f}",
                " ".join(f"{loss:.3f}" for loss in row["losses"]),
            ]
        )
    return aligned(head, body)


def parse(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="folder for training.json")
    parser.add_argument("--model", choices=MODELS, default="llama_1b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by comma")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    unknown = sorted({*asked.only.split(",")} - {*CONTENDERS})
    if unknown:
        parser.error(f"--only: {unknown} unknown; allowed: {list(CONTENDERS)}")
    if asked.one is None and asked.out is None:
        parser.error("--out DIR is needed")
    if min(asked.batch, asked.length - 1, asked.rounds, asked.steps) < 1:
        parser.error("--batch, --rounds and --steps are 1 or more, --length 2 or more")
    if asked.one is None and not asked.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry-run walks the same way on the CPU")
    return asked


def main(given: list[str] | None = None) -> int:
    """Measure, write, print; 1 where one of ours failed."""
    asked = parse(given)
    if asked.one is not None:
        print(json.dumps(train(asked.one)))
        return 0
    device = "cpu" if asked.dry_run else "cuda"
    results = {
        **document("training", device, asked.commit),
        "dry_run": asked.dry_run,
        "model": asked.model,
        "batch": asked.batch,
        "length": asked.length,
        "rows": rows(asked, asked.only.split(",")),
    }
    save(results, asked.out / "training.json")
    print(table(results["rows"]))
    ours = [row for row in results["rows"] if row["contender"] in ("patch", "own")]
    return int(any("error" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
