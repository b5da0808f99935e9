"""A training step of whole models: transformers in several ways, Liger, and swathe.

    python -m bench.training --out DIR [--models llama_1b,qwen3_0.6b] [--batch 1] [--length 4096]
                             [--rounds 3] [--steps 8] [--only NAME,NAME] [--device cpu] [--dry-run]

Every contender trains the same model from the same random weights on the same random tokens with
AdamW, in a process of its own, so that peak memory is its own; rounds go through all of them in
turn. One table a model: tokens per second, their range over all steps, the share of a measured
matrix product's flops, seconds of the first step (which compiles), peak memory, and the losses of
the first steps, which show that all train alike. Writes DIR/training.json. `--dry-run` takes tiny
models on the CPU: it tests this code and measures nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench import model_options
from bench.demo.contender import resident_bytes
from bench.model_contenders import TRAINING, built
from bench.models import training_flops
from bench.turns import Row, Task

WARM_UPS = 3


class Trainer:
    """One contender's model and optimiser, in this process."""

    def build(self, **facts: Any) -> Row:
        """Make the model and take WARM_UPS steps: seconds of the first, and their losses."""
        contender = TRAINING[facts["contender"]]
        self.device, self.steps = facts["device"], facts["steps"]
        self.shape = facts["batch"], facts["length"]
        self.vocabulary = facts["shape"]["vocab_size"]
        self.model = built(contender, facts["shape"], facts["dtype"], self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.generator = torch.Generator().manual_seed(1)
        warm = [self._step() for _ in range(WARM_UPS)]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses = [loss for loss, _ in warm]
        return {"first_s": warm[0][1], "loss": losses[0], "losses": losses}

    def measure(self, **_: Any) -> Row:
        """Seconds of each timed step, and the most memory since the warm-up."""
        seconds = [self._step()[1] for _ in range(self.steps)]
        if self.device == "cuda":
            return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}
        return {"seconds": seconds, "peak_bytes": resident_bytes("VmHWM")}

    def _step(self) -> tuple[float, float]:
        """Loss and seconds."""
        ids = torch.randint(self.vocabulary, self.shape, generator=self.generator)
        ids = ids.to(self.device)
        start = self._now()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = self._now() - start
        return loss.item(), seconds

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def figures(facts: Row, built: Row, answers: list[Row], ceiling: Row) -> Row:
    """Figures of one contender's rounds."""
    rounds = [answer["seconds"] for answer in answers]
    seconds = [s for each in rounds for s in each]
    tokens = facts["batch"] * facts["length"]
    median = statistics.median(seconds)
    flops = training_flops(facts["shape"], facts["batch"], facts["length"])
    return {
        "tokens_per_s": round(tokens / median, 1),
        "slowest": round(tokens / max(seconds), 1),
        "fastest": round(tokens / min(seconds), 1),
        "rounds": [round(tokens / statistics.median(each), 1) for each in rounds],
        "flops": flops,
        "of_product": float(f"{flops / median / 1e12 / ceiling['product_tflops']:.3g}"),
        "first_s": round(built["first_s"], 3),
        "peak_mib": round(max(answer["peak_bytes"] for answer in answers) / 2**20, 1),
        "losses": [round(loss, 5) for loss in built["losses"]],
    }


def cells(row: Row) -> list[str]:
    """The columns of a table's line after the rate."""
    return [
        f"{row['of_product']:.2f}",
        f"{row['first_s']:.1f}",
        f"{row['peak_mib']:.0f}",
        " ".join(f"{loss:.3f}" for loss in row["losses"]),
    ]


COLUMNS = ("of product", "first step s", "peak MiB", "first losses")
TASK = Task("training", TRAINING, Trainer, figures, COLUMNS, cells, training=True)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 where one of ours failed."""
    if model_options.serving(TASK, given):
        return 0
    parser = model_options.parser(TASK, __doc__, length=4096, told="tokens of a row")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    asked = model_options.checked(parser, TASK, given)
    if asked.steps < 1:
        parser.error(f"--steps {asked.steps}: give one or more")
    each = [model_options.facts_of(asked, model, steps=asked.steps) for model in asked.models]
    return model_options.ran(TASK, asked, each)


if __name__ == "__main__":
    sys.exit(main())
