"""Prompts to token ids, and text to the screen while swathe generates it."""

from __future__ import annotations

from typing import Any

import torch

import swathe


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text."""
    return list(tokenizer(text)["input_ids"])


def encode_chat(tokenizer: Any, message: str) -> list[int]:
    """Token ids of one user's message in the model's chat template, up to the assistant's turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stream(
    model: Any, tokenizer: Any, ids: list[int], new: int, *, skip_prompt: bool = False
) -> None:
    """Print greedy text as it comes."""
    streamer = swathe.TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    prompt = torch.tensor([ids], device=model.device)
    model.generate(prompt, max_new_tokens=new, streamer=streamer)
