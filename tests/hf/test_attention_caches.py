"""Caches of transformers that move or round what they hold, under attention of swathe.

Neither is for a CPU: offloading needs streams to copy on, and quantisation libraries that are
rarely there. Both are run here with the missing part stood in for, all else being transformers'.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

import pytest
import torch
import transformers
from torch import Tensor
from transformers import cache_utils

import swathe
from support.families import tokens
from support.hf_attention import attention_of, made, padding

FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")  # newer than 5.10
NEW = 9


class Stream:
    """A stream on which everything has happened already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, _: Stream) -> None:
        """Nothing to wait for."""


class Rounded(cache_utils.QuantizedLayer):
    """Keys and values as 8 bits for each head's feature, which is what the libraries do, slowly."""

    rounds = 0

    def __init__(self, *_: Any) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        Rounded.rounds += 1
        scale = tensor.abs().amax(2, keepdim=True).clamp(min=1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0] * q_tensor[1]


def generated(model: Any, **options: Any) -> Any:
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(tokens(3), attention_mask=padding("left"), **fixed, **out, **options)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What layers were asked to do, where no accelerator has streams."""
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
    seen: list[str] = []
    for name in ("offload", "prefetch"):
        own = getattr(cache_utils.CacheLayerMixin, name)

        def watched(self: Any, name: str = name, own: Any = own) -> Any:
            seen.append(name)
            return own(self)

        monkeypatch.setattr(cache_utils.CacheLayerMixin, name, watched)
    return seen


@pytest.mark.parametrize("patched", [False, True], ids=["", "patched"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_offloaded(name: str, kind: str, patched: bool, moved: list[str]) -> None:
    model = made(name)
    expected = generated(model)
    with attention_of(model, "swathe"):
        if patched:
            assert swathe.patch(model).patched
        try:
            found = generated(model, cache_implementation=kind, disable_compile=True)
        finally:
            swathe.unpatch(model)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert set(moved) == {"offload", "prefetch"}


def backends() -> list[Any]:
    """transformers' names of quantisers; "quanto" is a double of ours where it is not installed."""
    hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="needs hqq")
    fp8 = pytest.mark.skipif(not FP8, reason=f"not in transformers {transformers.__version__}")
    return [
        "quanto",
        pytest.param("hqq", marks=hqq),
        pytest.param("fp8", marks=fp8),
    ]


@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.parametrize("backend", backends())
def test_quantized(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = backend == "quanto" and find_spec("optimum") is None
    if doubled:
        monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Rounded)
    model = made(name)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    plain = torch.stack(generated(model).logits)
    expected = torch.stack(generated(model, **options).logits)
    before = Rounded.rounds
    with attention_of(model, "swathe"):
        found = torch.stack(generated(model, **options).logits)
    assert not doubled or Rounded.rounds > before + 8
    lost = (expected - plain).square().mean().sqrt().item()
    assert lost > 1e-4  # something was quantised
    # a rounding apart may be a step of the quantisation apart
    assert (found - expected).square().mean().sqrt().item() < 0.5 * lost
