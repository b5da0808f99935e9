"""qk_norm_rotary's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem, boundary_share
from swathe.kernels.core.rotation_cases import (
    Kind,
    for_each,
    kind_of,
    random_heads,
    random_tables,
    rounded_once,
    tables_in_heads_dtype,
)
from swathe.kernels.core.rotation_cases import magnitudes as rotated
from swathe.kernels.qk_norm_rotary import eager
from swathe.kernels.qk_norm_rotary.api import OP, NormCasting, qk_norm_rotary
from swathe.kernels.qk_norm_rotary.shapes import EDGES, Shape

EPS = 1e-6
# group: casting, norm_casting and the weights' offset
GROUPS: dict[str, tuple[str, NormCasting, float]] = {
    "fp32": ("fp32", "llama", 0.0),
    "llama": ("llama", "llama", 0.0),
    "gemma": ("llama", "gemma", 1.0),
}
# many small rows of the widest head: their weight gradients fill a pool
_WEIGHTS = Shape("weights", 1, 2, 1, 1, 1024, 64)


def random(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    device: str = "cpu",
    group: str = "fp32",
    **kind: Any,
) -> Problem:
    """Rows of different scales, weights around one (around zero with an offset), any Kind."""
    generator, how = torch.Generator(device).manual_seed(seed), Kind(**kind)
    B, S, H, Hk, D, R = shape[1:]
    casting, norm_casting, offset = GROUPS[group]
    # scales that differ, but not so much that one row's error is the whole pool's
    heads = random_heads(generator, B, S, D, dtype, how.heads_first, 0.5)

    def weight() -> Tensor:
        w = torch.randn(D, generator=generator, device=device)
        return (1.0 - offset + 0.2 * w).to(dtype)

    rounding = {"norm_casting": norm_casting, "casting": casting}
    tables = random_tables(generator, B, S, R, dtype, how)
    options = {"eps": EPS, "offset": offset, **rounding, **tables}
    inputs, arriving = {"q": heads(H), "q_weight": weight()}, {"yq": heads(H)}
    if Hk:
        inputs |= {"k": heads(Hk), "k_weight": weight()}
        arriving["yk"] = heads(Hk)
    else:
        options |= {"k": None, "k_weight": None}
    return Problem(inputs, arriving, options, shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape rounded once and as one family does; layouts, tables, positions in turn."""
    edges = {"fp32": EDGES, "llama": EDGES[::2], "gemma": EDGES[1::2]}
    for turn, group in enumerate(GROUPS):
        for index, shape in enumerate((*edges[group], *(_WEIGHTS,) * 10)):
            kind = kind_of(turn, index, seed, wide_tables=group == "fp32")._asdict()
            number = 1000 * seed + 100 * turn + index
            options: dict[str, Any] = {"seed": number, "device": device, "group": group}
            yield Case(group, random(shape, dtype, **options, **kind))


def hf_eager(
    q: Tensor,
    q_weight: Tensor,
    k: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    mrope_section: tuple[int, ...] | None = None,
    **o: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition under the public function's keywords."""
    norm = (o["eps"], o["offset"], o["norm_casting"], o["casting"])
    tables = (o["cos"], o["sin"], positions, mrope_section)
    pairs = (o["rotary_dim"], o["interleaved"])
    return eager.qk_norm_rotary(q, k, q_weight, k_weight, *norm, *tables, *pairs)


def gold(problem: Problem) -> Outputs:
    """fp64, rounded nowhere, on the tables as they are given."""
    return problem.to(torch.float64).given(casting="fp32").run(hf_eager)


def baseline(problem: Problem) -> Outputs:
    """HF's q_norm, k_norm and apply_rotary_pos_emb in q's dtype."""
    return tables_in_heads_dtype(problem).run(hf_eager)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas on absolute values; roundings before the last one bound no single element."""

    def bounds(name: str) -> Outputs:
        x, dy = problem.inputs[name].double(), problem.arriving[f"y{name}"].double().abs()
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        xhat = (x * rstd).abs()
        scale = abs(problem.options["offset"]) + problem.inputs[f"{name}_weight"].double().abs()
        g = rotated(problem, dy, there=False)
        mean = (g * scale * xhat).mean(-1, keepdim=True)
        y = rotated(problem, xhat * scale, there=True)
        return {
            **({f"y{name}": y} if rounded_once(problem) else {}),
            f"d{name}": rstd * (g * scale + xhat * mean),
            f"d{name}_weight": (g * xhat).sum((0, 1, 2)),
        }

    return for_each(problem, bounds)


def roundings(name: str, problem: Problem) -> int:
    """Casting "llama" rounds y as HF does, four or five times; everything else is rounded once."""
    return 4 if name.startswith("y") and problem.options["casting"] == "llama" else 1


def boundary(name: str, problem: Problem) -> float:
    """As for any op; but the elements of a row that hold one number cross a boundary together.

    A wide head of 16 bits holds some numbers a dozen times over; each is a term of two results.
    """
    rows = problem.inputs[name.removeprefix("y")].abs().flatten(0, -2)
    together = max((row.unique(return_counts=True)[1].max().item() for row in rows), default=0)
    return max(boundary_share(problem), 2 * together / max(rows.numel(), 1))


CONTRACT = Contract(
    OP,
    qk_norm_rotary,
    cases,
    gold,
    baseline,
    magnitudes,
    roundings=roundings,
    boundary=boundary,
)
