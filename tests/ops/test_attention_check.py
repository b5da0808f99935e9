"""Capability records tell the truth: what a backend says that it serves runs and is right.

Over a grid of dtypes, head sizes, gradients and features, each alone and in pairs, a backend whose
check finds no reason must agree with fp64 in its result and every gradient; any other must refuse.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.tensors import DEVICE, rows
from swathe.kernels.attention.api import AttentionSpec, Mask, attention
from swathe.kernels.attention.eager import expand_heads, scores
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import registered
from swathe.kernels.core.spec import Spec

BACKENDS = ("eager", "sdpa", "triton", "cpp")
FEATURES = (
    "grouped", "dropout", "softcap", "alibi", "alibi_gradient", "sinks", "lse", "paged",
)  # fmt: skip
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
B, H, T, PAGE, PAGES = 1, 2, 5, 8, 2
DROPOUT = 0.4


class Cell(NamedTuple):
    """One square of the grid."""

    dtype: torch.dtype
    size: int
    grad: bool
    features: tuple[str, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} size {self.size} {'grad' if self.grad else ''} {' '.join(self.features)}"


def grid() -> list[Cell]:
    """Every feature alone in every dtype and direction, pairs in fp32, sizes without features."""
    alone = [(), *((name,) for name in FEATURES)]
    found = [
        Cell(dtype, size, grad, features)
        for dtype, size, grad, features in product(TOLERANCE, (16, 256, 257), (False, True), alone)
        if size == 16 or not features
    ]
    for grad, pair in product((False, True), combinations(FEATURES, 2)):
        found.append(Cell(torch.float32, 16, grad, pair))
    # slopes that learn are slopes
    return [
        c._replace(features=tuple(sorted({*c.features, "alibi"})), grad=True)
        if "alibi_gradient" in c.features
        else c
        for c in found
    ]


def asked(cell: Cell) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that may require a gradient, and the call's other arguments."""
    has = cell.features.__contains__
    K, S, dtype = 1 if has("grouped") else H, PAGE * PAGES, cell.dtype
    q, k = rows(B, H, T, cell.size, seed=1) * 3, rows(B, K, S, cell.size, seed=2)
    # with v = 1 where a feature is a key, o is the dropped weights themselves
    v = torch.eye(S, cell.size, device=DEVICE).expand(B, K, -1, -1)
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    options: dict[str, Any] = {"causal": True}
    if has("sinks"):
        tensors["sinks"] = rows(H, seed=4) + 1
    if has("alibi"):
        tensors["alibi"] = 0.5 + rows(H, seed=5).abs()
    if has("softcap"):
        options["softcap"] = 1.0
    if has("dropout"):
        options["dropout"] = DROPOUT
    if has("lse"):
        options["return_lse"] = True
    if has("paged"):
        table = torch.tensor([[3, 0]], device=DEVICE)
        options |= {"block_table": table.int(), "seq_lens": torch.full((B,), S, device=DEVICE)}
        for name in ("k", "v"):
            pages = tensors[name].unflatten(2, (PAGES, PAGE)).transpose(1, 2)
            cache = pages.new_zeros(5, *pages.shape[2:])
            cache[table] = pages
            tensors[name] = cache
    return tensors, options


def learning(cell: Cell, tensors: dict[str, Tensor]) -> list[str]:
    """Which tensors require a gradient in this cell."""
    return [n for n in tensors if cell.grad and (n != "alibi" or "alibi_gradient" in cell.features)]


def run(
    function: Any, cell: Cell, tensors: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    """o, lse where asked for, and gradients by name."""
    wanted = learning(cell, tensors)
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}
    found = function(**leaves, **options)
    outputs = dict(zip(("o", "lse"), found if isinstance(found, tuple) else (found,), strict=False))
    total = sum((t.double() * rows(*t.shape, seed=9)).sum() for t in outputs.values())
    if wanted:
        gradients = torch.autograd.grad(total, [leaves[n] for n in wanted])  # type: ignore[arg-type]
        outputs |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {n: t.detach() for n, t in outputs.items()}


def gold(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """The formulas in the tensors' dtype; `kept`: the weights that dropout left."""
    table = options.get("block_table")
    spec = AttentionSpec(
        Mask(causal=True),
        q.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        alibi=options.get("alibi"),
        block_table=table,
    )
    k, v = expand_heads(spec.gathered(k), H), expand_heads(spec.gathered(v), H)
    hidden = ~spec.mask.visible(T, k.shape[2], q.device)
    z = scores(q, k, spec).masked_fill(hidden, -torch.inf)
    sinks = options.get("sinks")
    columns = z if sinks is None else torch.cat((z, sinks.view(1, -1, 1, 1).expand(B, H, T, 1)), -1)
    lse = torch.logsumexp(columns, -1)
    p = (z - lse[..., None]).exp()
    if kept is not None:
        p = p * kept / (1 - DROPOUT)
    o = (p @ v).transpose(1, 2)
    return (o, lse) if options.get("return_lse") else o


def right(cell: Cell, name: str) -> None:
    """Run the cell on a backend and compare all that it returns."""
    tensors, options = asked(cell)
    torch.manual_seed(3)
    found = run(lambda **given: attention(**given, implementation=name), cell, tensors, options)
    kept = None
    if "dropout" in cell.features:
        kept = found["o"].transpose(1, 2)[..., : PAGE * PAGES] != 0
        share = kept[:, :, -1].float().mean()
        assert 0.2 < share < 0.95, share
    wide = {n: t.double() for n, t in tensors.items()}
    exact = run(lambda **given: gold(kept=kept, **given), cell, wide, options)
    assert found.keys() == exact.keys()
    for key, value in found.items():
        allowed = max(TOLERANCE[cell.dtype], TOLERANCE[value.dtype])
        torch.testing.assert_close(value.double(), exact[key], rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_says_that_it_serves_it_does(name: str) -> None:
    backend, refused, served = registered("attention")[name], 0, 0
    for cell in dict.fromkeys(grid()):
        x = torch.empty(1, dtype=cell.dtype, device=DEVICE)
        features = dict.fromkeys(cell.features, True)
        spec = Spec.of("attention", x, size=cell.size, grad=cell.grad, **features)
        try:
            if backend.check(spec):
                refused += 1
                tensors, options = asked(cell)
                with pytest.raises(UnsupportedFeature, match=f"'{name}' cannot serve"):
                    run(
                        lambda **given: attention(**given, implementation=name),
                        cell, tensors, options,
                    )  # fmt: skip
            else:
                served += 1
                right(cell, name)
        except BaseException as error:
            error.add_note(f"{name}: {cell}")
            raise
    assert served > 30 and (refused > 10 or name == "eager")
