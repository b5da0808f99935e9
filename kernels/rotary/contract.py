"""rotary's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
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
from swathe.kernels.rotary import eager
from swathe.kernels.rotary.api import CASTINGS, OP, rotary
from swathe.kernels.rotary.shapes import EDGES, Shape


def random(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    device: str = "cpu",
    casting: str = "fp32",
    **kind: Any,
) -> Problem:
    """Rows of different scales, any Kind of angles; tensors lie as projections leave them."""
    generator, how = torch.Generator(device).manual_seed(seed), Kind(**kind)
    B, S, H, Hk, D, R = shape[1:]
    heads = random_heads(generator, B, S, D, dtype, how.heads_first, 1.0)
    options = {**random_tables(generator, B, S, R, dtype, how), "casting": casting}
    inputs, arriving = {"q": heads(H)}, {"yq": heads(H)}
    if Hk:
        inputs["k"], arriving["yk"] = heads(Hk), heads(Hk)
    else:
        options["k"] = None
    return Problem(inputs, arriving, options, shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape in both castings, with layouts, tables and positions in turn."""
    for turn, casting in enumerate(CASTINGS):
        for index, shape in enumerate(EDGES):
            kind = kind_of(turn, index, seed, wide_tables=casting == "fp32")._asdict()
            number = 1000 * seed + 100 * turn + index
            options: dict[str, Any] = {"seed": number, "device": device, "casting": casting}
            yield Case(casting, random(shape, dtype, **options, **kind))


def hf_eager(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor | None = None,
    positions: Tensor | None = None,
    mrope_section: tuple[int, ...] | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition under the public function's keywords."""
    R, interleaved, casting = (options[o] for o in ("rotary_dim", "interleaved", "casting"))
    return eager.rotary(q, k, cos, sin, positions, mrope_section, R, interleaved, casting)


def gold(problem: Problem) -> Outputs:
    """fp64, rounded nowhere, on the tables as they are given."""
    return problem.to(torch.float64).given(casting="fp32").run(hf_eager)


def baseline(problem: Problem) -> Outputs:
    """HF's apply_rotary_pos_emb in q's dtype."""
    return tables_in_heads_dtype(problem).run(hf_eager)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas on absolute values; roundings before the last one bound no single element."""

    def bounds(name: str) -> Outputs:
        x, dy = (t.double().abs() for t in (problem.inputs[name], problem.arriving[f"y{name}"]))
        y = {f"y{name}": rotated(problem, x, there=True)} if rounded_once(problem) else {}
        return {**y, f"d{name}": rotated(problem, dy, there=False)}

    return for_each(problem, bounds)


def roundings(name: str, problem: Problem) -> int:
    """Casting "llama" rounds y three times, as HF does; everything else is rounded once."""
    return 3 if name.startswith("y") and problem.options["casting"] == "llama" else 1


CONTRACT = Contract(OP, rotary, cases, gold, baseline, magnitudes, roundings=roundings)
