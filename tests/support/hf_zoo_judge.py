"""Is a treated model the same model? Outputs and every gradient, beside an fp64 run of it.

A reading is what a model computes on a few batches. Three are taken: `gold`, from a copy in fp64
in which no cast back to fp32 is obeyed; `own`, the untouched model's in fp32; and the treated
model's. Its distance to gold may be RATIO times own's distance and FLOOR of the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.hf_zoo import VOCAB, Entry

# LUCKY is for types whose own error is small by luck (hf_zoo_types.LACKS, "steady rounding")
RATIO, LUCKY, FLOOR = 8.0, 64.0, 2e-6
LENGTH, LEFT, RIGHT, STEPS = 12, 4, 3, 2
Reading = dict[str, Tensor]


class Wide(TorchFunctionMode):
    """Every fp32 that a forward asks for is fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        widened = {k: _wide(v) for k, v in (kwargs or {}).items()}
        return func(*map(_wide, args), **widened)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_fp64() -> Iterator[None]:
    """What is created inside is fp64, casts to fp32 go to fp64."""
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def noise(*size: int, seed: int = 3) -> Tensor:
    """Standard normal numbers, the same for every model of a size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def tokens(rows: int) -> Tensor:
    """Ids (rows, LENGTH) without those that mark padding and ends."""
    return torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


def padding() -> Tensor:
    """(3, LENGTH): a full row, one padded on the left and one on the right."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :LEFT] = 0
    mask[2, -RIGHT:] = 0
    return mask


def runs_of(entry: Entry, model: Any, wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of the wanted runs that the entry's model can take."""
    usual = ("plain", "padded") if entry.kind == "encoder" else tuple(RUNS)
    usual = usual if model.main_input_name == "input_ids" else ("plain",)
    return tuple(run for run in wanted if run in usual and run not in entry.lacks)


def plain(model: Any) -> Reading:
    """Two full rows without a mask, or the images or sounds that the model is for."""
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": noise(2, 3, 16, 16).to(model.dtype)}
    elif model.main_input_name == "input_features":
        inputs = {"input_features": noise(2, 8, 2 * LENGTH).to(model.dtype)}
    else:
        inputs = {"input_ids": tokens(2)}
    return _with_gradients(model, model(**inputs)[0])


def padded(model: Any) -> Reading:
    """Three rows, padded on no, the left and the right side, read where tokens are real."""
    mask = padding()
    ids = tokens(3) * mask
    out = model(input_ids=ids, attention_mask=mask)[0]
    return _with_gradients(model, out[mask.bool()])


@torch.no_grad()
def decode(model: Any) -> Reading:
    """Single tokens after a prompt that is padded on the left, through the cache."""
    mask = padding()[:2]
    ids = tokens(2) * mask
    start = LENGTH - STEPS
    out = model(input_ids=ids[:, :start], attention_mask=mask[:, :start], use_cache=True)
    made = {"prompt": out[0][mask[:, :start].bool()]}
    for t in range(start, LENGTH):
        name = next(n for n in ("past_key_values", "cache_params", "state", "mems") if n in out)
        step = {name: out[name], "attention_mask": mask[:, : t + 1], "use_cache": True}
        out = model(input_ids=ids[:, t : t + 1], **step)
        made[f"token {t}"] = out[0]
    return made


def loss(model: Any) -> Reading:
    """A training step: labels with holes, every dropout at zero."""
    ids = tokens(2)
    labels = ids.clone()
    labels[0, 3:5] = labels[1, -2:] = -100
    model.train()
    try:
        out = model(input_ids=ids, labels=labels)
        made = _gradients(model, out.loss)
    finally:
        model.eval()
    return {"loss": out.loss.detach(), **made}


RUNS: dict[str, Callable[[Any], Reading]] = {
    "plain": plain,
    "padded": padded,
    "decode": decode,
    "loss": loss,
}


def _with_gradients(model: nn.Module, out: Tensor) -> Reading:
    if not out.requires_grad:
        return {"output": out}
    return {"output": out.detach(), **_gradients(model, (out * noise(*out.shape).to(out)).sum())}


def _gradients(model: nn.Module, total: Tensor) -> Reading:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {f"d {n}": g for n, g in zip(named, found, strict=True) if g is not None}


def read(model: Any, runs: tuple[str, ...], lacks: Mapping[str, str]) -> Reading:
    """The runs' tensors by `run: name`, in eval mode without the gradients that a type lacks."""
    found = {}
    for run in runs:
        with torch.set_grad_enabled(run == "loss" or "gradients" not in lacks):
            found |= {f"{run}: {n}": v for n, v in RUNS[run](model).items()}
    return found


def read_gold(model: Any, runs: tuple[str, ...], lacks: Mapping[str, str]) -> Reading:
    """`read` in fp64, which the model is left in."""
    model.double()
    with in_fp64():
        return read(model, runs, lacks)


def differences(found: Reading, own: Reading, gold: Reading, ratio: float = RATIO) -> list[str]:
    """What in `found` is further from gold than it may be, the worst first."""
    missing = sorted(own.keys() ^ found.keys())
    if missing:
        return [f"{name} is {'gone' if name in own else 'new'}" for name in missing]
    truth = {name: gold[name].double() for name in own}
    size = {name: _rms(value) for name, value in truth.items()}
    theirs = {name: _rms(value.double() - truth[name]) for name, value in own.items()}
    # one number can be right by luck: at least what is usual in this reading is granted
    usual = median(theirs[name] / (size[name] or 1.0) for name in own)
    # a gradient that is zero but for rounding has no size of its own
    least = 0.1 * median(size[name] for name in own)
    worst = []
    for name, value in found.items():
        off, scale = _rms(value.double() - truth[name]), max(size[name], least)
        granted = max(theirs[name], usual * scale)
        allowed = ratio * granted + FLOOR * scale
        if not off <= allowed:
            text = f"{name}: off by {off:.1e} of {size[name]:.1e}, own {theirs[name]:.1e}"
            worst.append((off / (allowed or 1e-30), text))
    return [text for _, text in sorted(worst, reverse=True)]


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt()) if value.numel() else 0.0


def belongings(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Every module's class and the objects in its dict, one level into torch's own dicts."""
    found = {}
    for path, module in model.named_modules():
        held = dict(vars(module))
        for name in ("_parameters", "_buffers", "_modules"):
            held |= {f"{name}.{k}": v for k, v in held.pop(name).items()}
        found[path] = type(module), held
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """What is not the same object any more: `path`, or `path.attribute`."""
    found = set(before) ^ set(after)
    for path in before.keys() & after.keys():
        (cls, held), (other_cls, other_held) = before[path], after[path]
        found |= {path} if cls is not other_cls else set()
        gone = held.keys() ^ other_held.keys()
        same = held.keys() & other_held.keys()
        found |= {f"{path}.{n}" for n in gone}
        found |= {f"{path}.{n}" for n in same if not _same(held[n], other_held[n])}
    return found


def _same(one: Any, other: Any) -> bool:
    simple = (bool, int, float, str, type(None), tuple)
    return one is other or (isinstance(one, simple) and type(one) is type(other) and one == other)
