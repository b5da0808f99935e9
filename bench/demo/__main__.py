"""`python -m bench.demo`: a real checkpoint through swathe, beside transformers.

Converts SmolLM2-135M-Instruct once, generates from a prompt and a chat, compares tokens, logits,
speed and memory with transformers, and checks each kernel on the model's own activations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import swathe
from bench.demo.checkpoint import MissingPackage, draw_bar, ensure_checkpoint
from bench.demo.compare import Comparison, ContenderFailed, Figures
from bench.demo.generate import encode_chat, encode_text, stream
from bench.demo.parity import ParityRow, capture, fused_backends, in_own_process
from bench.demo.tables import (
    PARITY_NOTES,
    comparison_notes,
    comparison_table,
    divergence_lines,
    parity_table,
)

PROMPT = "The capital of France is"
CHAT = "Explain in two sentences why the sky is blue."


@dataclass
class Demo:
    """The model, its tokenizer and what was asked for."""

    options: argparse.Namespace
    directory: Path
    device: str
    attention: str
    model: Any
    tokenizer: Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: %(default)r)")
    parser.add_argument("--chat", default=CHAT, help="a user's message (default: %(default)r)")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=24, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="default: %(default)s",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument(
        "--no-compare", action="store_true", help="leave the comparison with transformers out"
    )
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.resolve().parent}")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as problem:
        parser.error(f"--device {options.device}: {problem}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: allowed are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here; use --device cpu")
    options.device = str(device)
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 2")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run it all; the status for the shell."""
    start = time.perf_counter()
    options = parse(arguments)
    try:
        directory = ensure_checkpoint(advance=draw_bar)
        report = _run(options, directory)
    except (MissingPackage, ContenderFailed) as problem:
        print(f"bench.demo: {problem}", file=sys.stderr)
        return 1
    report["seconds"] = time.perf_counter() - start
    print(f"\n{report['seconds']:.0f} s after the first imports.")
    if options.json is not None:
        aside = options.json.with_name(f".{options.json.name}.{os.getpid()}")
        aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        aside.replace(options.json)
    return 0


def _run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    attention = attention_for(options.device)
    contenders = [("transformers", "sdpa"), ("transformers", "eager"), ("swathe", attention)]
    with ExitStack() as stack:
        comparison = None
        if not options.no_compare:
            comparison = stack.enter_context(
                Comparison(contenders, directory, options.device, options.dtype)
            )
        demo = _load(options, directory, attention)
        prompts = _generate(demo)
        rows = _parity(demo, prompts[-1])
        figures = _compare(demo, comparison, prompts) if comparison else []
    return {
        "checkpoint": directory.name,
        "device": options.device,
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
        "prompts": {"text": options.prompt, "chat": options.chat},
        "versions": {
            "swathe": swathe.__version__,
            **{name: version(name) for name in ("torch", "transformers", "gguf")},
        },
        "kernels": json.loads(demo.model.kernel_report().to_json()),
        "comparison": [f.to_json() for f in figures],
        "parity": [row.to_json() for row in rows],
    }


def attention_for(device: str) -> str:
    """ "triton" on a GPU where that backend exists, else "auto"."""
    exists = swathe.backends("attention")["attention"].get("triton") == "ok"
    return "triton" if exists and device.startswith("cuda") else "auto"


def _load(options: argparse.Namespace, directory: Path, attention: str) -> Demo:
    from transformers import AutoTokenizer

    model = swathe.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, options.dtype),
        device_map=options.device,
        attn_implementation=attention,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Demo(options, directory, options.device, attention, model, tokenizer)


def _generate(demo: Demo) -> list[list[int]]:
    options = demo.options
    prompts = [
        encode_text(demo.tokenizer, options.prompt),
        encode_chat(demo.tokenizer, options.chat),
    ]
    print(f"swathe, {demo.directory.name}, {options.dtype} on {demo.device}, greedy\n")
    stream(demo.model, demo.tokenizer, prompts[0], options.max_new_tokens)
    print(f"\nuser: {options.chat}\nassistant: ", end="", flush=True)
    stream(demo.model, demo.tokenizer, prompts[1], options.max_new_tokens, skip_prompt=True)
    print(f'\nattn_implementation="{demo.attention}":\n{demo.model.kernel_report()}')
    return prompts


def _parity(demo: Demo, ids: list[int]) -> list[ParityRow]:
    captured = capture(demo.model, torch.tensor([ids], device=demo.device))
    rows = in_own_process(captured, demo.device)
    how = "compiled" if demo.device.startswith("cuda") else "interpreted"
    print(f"\n{parity_table(rows, how)}\n{PARITY_NOTES}")
    for name, state in fused_backends(demo.device).items():
        if state != "ok":
            print(f"Backend {name} was left out: {state}.")
    return rows


def _compare(demo: Demo, comparison: Comparison, prompts: list[list[int]]) -> list[Figures]:
    figures = comparison.run(prompts, demo.options.max_new_tokens)
    notes = comparison_notes(figures, demo.options.max_new_tokens, torch.get_num_threads())
    print(f"\n{comparison_table(figures, demo.options.dtype)}\n{notes}")
    for line in divergence_lines(figures, lambda token: demo.tokenizer.decode([token])):
        print(line)
    return figures


if __name__ == "__main__":
    sys.exit(main())
