"""Greedy decoding of whole models: transformers in several ways, Liger, and swathe.

    python -m bench.decoding --out DIR [--models llama_1b,qwen3_0.6b] [--batch 1] [--length 512]
                             [--new 128] [--rounds 3] [--only NAME,NAME] [--device cpu] [--dry-run]

Every contender continues the same random prompts of `--length` tokens by `--new` tokens with the
`generate` of its library, from the same random weights, in a process of its own; rounds go through
all of them in turn. One table a model: tokens per second after the first, their range over the
rounds, the share of memory's measured speed (weights and cache that a step reads), milliseconds to
the first token (the prompt is read), seconds of the first call (which compiles), peak memory.
Writes DIR/decoding.json. `--dry-run` takes tiny models on the CPU: it tests this code and measures
nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from bench import model_options
from bench.demo.contender import Stopwatch, resident_bytes
from bench.model_contenders import DECODING, built
from bench.models import cache_bytes, counts
from bench.turns import Row, Task

LOOKED_AT = 64  # tokens of the prompt whose loss shows that all compute alike


class Speaker:
    """One contender's model, in this process."""

    def build(self, **facts: Any) -> Row:
        """Make the model and generate twice: seconds of the first call, the loss of the prompt."""
        contender = DECODING[facts["contender"]]
        self.device, self.new = facts["device"], facts["new"]
        self.model = built(contender, facts["shape"], facts["dtype"], self.device).eval()
        self.options = {"max_new_tokens": self.new, "do_sample": False}
        self.options |= self._of_library(contender.options)
        generator = torch.Generator().manual_seed(1)
        shape = (facts["batch"], facts["length"])
        vocabulary = facts["shape"]["vocab_size"]
        self.prompt = torch.randint(vocabulary, shape, generator=generator).to(self.device)
        start = self._now()
        self._generate()
        first = self._now() - start
        self._generate()
        with torch.no_grad():
            looked_at = self.prompt[:, :LOOKED_AT]
            loss = self.model(input_ids=looked_at, labels=looked_at, use_cache=False).loss.item()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"first_s": first, "loss": loss}

    def _of_library(self, options: dict[str, Any]) -> dict[str, Any]:
        """What this library's generate takes besides."""
        import transformers

        if not isinstance(self.model, transformers.PreTrainedModel):
            on_gpu = {"cache_implementation": "static"} if self.device == "cuda" else {}
            return {"eos_token_id": [], **on_gpu}
        if "cache_implementation" in options:
            compiling = transformers.CompileConfig()
            # transformers compiles on GPUs only, unless it is told
            compiling._compile_all_devices = self.device == "cpu"
            options = {**options, "compile_config": compiling}
        return options

    def measure(self, **_: Any) -> Row:
        """When each token came."""
        watch = self._generate()
        prompt, *tokens = watch.times
        assert len(tokens) == self.new, "every contender makes as many tokens"
        on_gpu = self.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
        seconds = [later - sooner for sooner, later in pairwise(tokens)]
        return {"first_token_s": tokens[0] - prompt, "seconds": seconds, "peak_bytes": peak}

    def _generate(self) -> Stopwatch:
        watch = Stopwatch()
        options = {"attention_mask": torch.ones_like(self.prompt), **self.options}
        self.model.generate(self.prompt, streamer=watch, **options)
        return watch

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def figures(facts: Row, built: Row, answers: list[Row], ceiling: Row) -> Row:
    """Figures of one contender's rounds."""
    batch, size = facts["batch"], getattr(torch, facts["dtype"]).itemsize
    rates = [batch / statistics.mean(answer["seconds"]) for answer in answers]
    median = statistics.median(rates)
    held = cache_bytes(facts["shape"], batch, facts["length"] + facts["new"] // 2, size)
    read = counts(facts["shape"]).read * size + held
    fastest = max(ceiling["read_gbps"], ceiling["copy_gbps"])
    first_tokens = [answer["first_token_s"] for answer in answers]
    return {
        "tokens_per_s": round(median, 2),
        "slowest": round(min(rates), 2),
        "fastest": round(max(rates), 2),
        "rounds": [round(rate, 2) for rate in rates],
        "token_us": [round(1e6 * s, 1) for answer in answers for s in answer["seconds"]],
        "bytes_a_step": read,
        "of_memory": float(f"{read * median / batch / 1e9 / fastest:.3g}"),
        "first_token_s": round(statistics.median(first_tokens), 5),
        "first_tokens_s": [round(s, 5) for s in first_tokens],
        "first_s": round(built["first_s"], 3),
        "peak_mib": round(max(answer["peak_bytes"] for answer in answers) / 2**20, 1),
        "loss": round(built["loss"], 5),
    }


def cells(row: Row) -> list[str]:
    """The columns of a table's line after the rate."""
    return [
        f"{row['of_memory']:.2f}",
        f"{1e3 * row['first_token_s']:.1f}",
        f"{row['first_s']:.1f}",
        f"{row['peak_mib']:.0f}",
    ]


COLUMNS = ("of memory", "first token ms", "first call s", "peak MiB")
TASK = Task("decoding", DECODING, Speaker, figures, COLUMNS, cells, training=False)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 where one of ours failed."""
    if model_options.serving(TASK, given):
        return 0
    parser = model_options.parser(TASK, __doc__, length=512, told="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    asked = model_options.checked(parser, TASK, given)
    if asked.new < 2:
        parser.error(f"--new {asked.new}: give two or more, since the first is timed apart")
    each = [model_options.facts_of(asked, model, new=asked.new) for model in asked.models]
    return model_options.ran(TASK, asked, each)


if __name__ == "__main__":
    sys.exit(main())
