"""What the contracts of rotating ops share: kinds of rotation, random heads and tables, bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.core.contract import Outputs, Problem
from swathe.kernels.core.rotation import Members, members, turned


class Kind(NamedTuple):
    """How a problem's pairs lie, where its angles come from, how its heads lie in memory."""

    interleaved: bool = False
    compact: bool = False
    sequences: bool = False  # tables of their own for each sequence of the batch
    positions: bool = False
    mrope: bool = False
    table_dtype: torch.dtype | None = None
    heads_first: bool = False  # (B, H, S, D) in memory, not the (B, S, H, D) of projections


_FORMS = (
    Kind(),
    Kind(interleaved=True),
    Kind(compact=True, positions=True),
    Kind(mrope=True),
    Kind(interleaved=True, compact=True),
    Kind(positions=True, mrope=True),
    Kind(sequences=True),
    Kind(interleaved=True, mrope=True, positions=True),
)


def kind_of(turn: int, index: int, seed: int, wide_tables: bool) -> Kind:
    """The kind for case `index` of group `turn`: every form meets every shape as seeds go on."""
    kind = _FORMS[(index + 3 * turn + seed) % len(_FORMS)]
    wide = torch.float32 if wide_tables and index % 3 == 0 else None
    return kind._replace(table_dtype=wide, heads_first=index % 4 == 1)


def random_heads(
    generator: torch.Generator,
    B: int,
    S: int,
    D: int,
    dtype: torch.dtype,
    first: bool,
    scale: float,
) -> Callable[[int], Tensor]:
    """Makes (B, H, S, D) for a given H, tokens of scales that differ by exp(`scale` * normal).

    In memory heads come `first`, or tokens, as projections leave them.
    """
    device = generator.device

    def heads(count: int) -> Tensor:
        x = torch.randn(B, S, count, D, generator=generator, device=device)
        sizes = torch.randn(B, S, count, 1, generator=generator, device=device)
        x = (x * sizes.mul_(scale).exp_()).to(dtype).transpose(1, 2)
        return x.contiguous() if first else x

    return heads


def random_tables(
    generator: torch.Generator, B: int, S: int, R: int, dtype: torch.dtype, kind: Kind
) -> dict[str, Any]:
    """The op's options cos, sin, rotary_dim, interleaved, and positions and sections if asked for.

    The angles of the two members of a pair differ, unless the tables are compact.
    """
    device = generator.device
    lead: tuple[int, ...] = (3, 1) if kind.mrope else (B,) if kind.sequences else ()
    rows = (3 * S + 5,) if kind.positions else (*lead, S)
    width = R // 2 if kind.compact else R
    angles = 3.0 * torch.randn(*rows, width, generator=generator, device=device)
    options: dict[str, Any] = {
        "cos": angles.cos().to(kind.table_dtype or dtype),
        "sin": angles.sin().to(kind.table_dtype or dtype),
        "rotary_dim": R,
        "interleaved": kind.interleaved,
    }
    if kind.positions:
        shared = generator.initial_seed() % 2 == 0
        size = (3, B, S) if kind.mrope else (S,) if shared else (B, S)
        options["positions"] = torch.randint(rows[0], size, generator=generator, device=device)
    if kind.mrope:
        pairs = R // 2
        options["mrope_section"] = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    return options


def tables_in_heads_dtype(problem: Problem) -> Problem:
    """The problem as HF runs it: with casting "llama", its tables cast to q's dtype."""
    dtype = problem.inputs["q"].dtype
    tables = {name: problem.options[name].to(dtype) for name in ("cos", "sin")}
    return problem.given(casting="llama", **tables)


def magnitudes(problem: Problem, x: Tensor, there: bool) -> Tensor:
    """The rotation of x >= 0 (or, if not `there`, its transpose) with every term made positive."""
    o = problem.options
    where = (o.get("positions"), o.get("mrope_section"), o["rotary_dim"], o["interleaved"])
    c1, c2 = (t.double().abs() for t in members(o["cos"], *where))
    s1, s2 = (t.double().abs() for t in members(o["sin"], *where))
    angles: Members = (c1, -s1, c2, s2) if there else (c1, -s2, c2, s1)
    return turned(x, angles, o["interleaved"])


def rounded_once(problem: Problem) -> bool:
    """Whether one rounding bounds each element of y: not where casting "llama" rounds before."""
    return problem.options["casting"] == "fp32" or problem.inputs["q"].dtype == torch.float32


def for_each(problem: Problem, bounds: Callable[[str], Outputs]) -> Outputs:
    """The bounds of q and, where there is one, of k."""
    return {n: t for name in ("q", "k") if name in problem.inputs for n, t in bounds(name).items()}
