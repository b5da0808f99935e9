"""attention's side of the contract: its cases, gold, baseline and magnitudes.

Unlike the other ops' results, o and the gradients are made of values that were rounded before: p
and ds, and o within delta. So an element may be off by 4 u of its magnitude (u: the unit roundoff
of q's dtype), lse by 1e-5 of 1 + the largest score of its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.attention.api import OP, AttentionSpec, Mask, attention
from swathe.kernels.attention.eager import expand_heads, scores
from swathe.kernels.attention.shapes import EDGES, Shape
from swathe.kernels.attention.validation import placed
from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.core.testing import UNIT

_PARTS = frozenset(f.name for f in fields(Mask) if f.init)
# the largest number that a weight or a slope may lose by underflow
_LOST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
# what a problem asks for, and the group that rounds like it
KINDS = {
    "plain": "masks",
    "causal": "masks",
    "window": "masks",
    "gqa": "masks",
    "packed": "masks",
    "scores": "scores",
    "bias": "bias",
}
GROUPS = tuple(dict.fromkeys(KINDS.values()))
# large enough that the errors of every output fill a pool
_FULL = Shape("full", 1, 2, 2, 84, 90, 64, 64)
_GROUPED = Shape("full_grouped", 1, 3, 1, 70, 90, 128, 128)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, implementation: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """(o, lse) of `attention`, with the parts of a Mask as keywords of their own."""
    mask = Mask(**{name: options.pop(name) for name in _PARTS & options.keys()})
    return attention(q, k, v, mask, return_lse=True, implementation=implementation, **options)


def spec_of(problem: Problem) -> AttentionSpec:
    """What backends are given for a call of `attend`."""
    options = dict(problem.options)
    q, k = problem.inputs["q"], problem.inputs["k"]
    parts = {name: options.pop(name) for name in _PARTS & options.keys()}
    mask = Mask(bias=problem.inputs.get("bias"), **parts)
    table = options.get("block_table")
    S = k.shape[2] * (1 if table is None else table.shape[1])
    located = [options.pop(name, None) for name in ("cu_seqlens", "seq_lens", "block_table")]
    if any(t is not None for t in located):
        mask = placed(mask, q, k, S, *located)
    scale = options.pop("scale", None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sinks = problem.inputs.get("sinks")
    return AttentionSpec(mask, scale, sinks=sinks, lse=True, block_table=table, **options)


class Drawn(NamedTuple):
    """Random tensors of one problem, all from one generator."""

    generator: torch.Generator
    dtype: torch.dtype
    device: str

    def normal(self, *size: int) -> Tensor:
        """Normal numbers in fp32."""
        return torch.randn(size, generator=self.generator, device=self.device)

    def heads(self, B: int, heads: int, rows: int, width: int) -> Tensor:
        """(B, heads, rows, width) as projections leave them: heads within a row."""
        return self.normal(B, rows, heads, width).to(self.dtype).transpose(1, 2)

    def borders(self, length: int, documents: int) -> Tensor:
        """Where documents of any lengths, 0 included, begin and end in a row."""
        at = torch.rand(documents - 1, generator=self.generator, device=self.device)
        inner = (at * (length + 1)).int().sort().values
        return torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), length)))

    def share(self, part: float, *size: int) -> Tensor:
        """True with this probability."""
        return torch.rand(size, generator=self.generator, device=self.device) < part


def random(
    shape: Shape, dtype: torch.dtype, *, seed: int, device: str = "cpu", kind: str = "plain"
) -> Problem:
    """Normal q, k and v with what the kind asks for, one of KINDS."""
    drawn = Drawn(torch.Generator(device).manual_seed(seed), dtype, device)
    if kind == "packed":
        shape = shape._replace(B=1)
    _, B, H, K, T, S, D, E = shape
    inputs = {
        "q": drawn.heads(B, H, T, D),
        "k": drawn.heads(B, K, S, D),
        "v": drawn.heads(B, K, S, E),
    }
    arriving = {"o": drawn.normal(B, T, H, E).to(dtype), "lse": drawn.normal(B, H, T)}
    options: dict[str, Any] = {}
    if kind not in ("plain", "bias"):
        options["causal"] = kind != "window" or seed % 2 == 0
    if kind == "window":
        options["window"] = 8 + seed % 41
        if not options["causal"]:
            options["ahead"] = seed % 23
    elif kind == "scores":
        options |= {"softcap": 20.0, "alibi": 2.0 ** -torch.arange(2.0, 2 + H, device=device)}
        inputs["sinks"] = drawn.normal(H)
    elif kind == "bias":
        bias = drawn.normal(B, H, T, S)
        inputs["bias"] = bias.masked_fill(drawn.share(0.2, B, 1, T, S), -torch.inf).to(dtype)
    elif kind == "packed":
        borders = drawn.borders(T, 3)
        options["cu_seqlens"] = borders if T == S else (borders, drawn.borders(S, 3))
    return Problem(inputs, arriving, options, f"{shape.name} {kind}")


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape plain, some and one that fills a pool with all else."""
    for turn, (kind, group) in enumerate(KINDS.items()):
        edges = EDGES[turn + 1 :: 6] if turn else EDGES
        full = _GROUPED if kind == "gqa" else _FULL
        for index, shape in enumerate((*edges, full)):
            if kind == "gqa":
                shape = shape._replace(H=3 * shape.K)
            number = 1000 * seed + 100 * turn + index
            yield Case(group, random(shape, dtype, seed=number, device=device, kind=kind))


def gold(problem: Problem) -> Outputs:
    """The eager formula in fp64."""
    return baseline(problem.to(torch.float64))


def baseline(problem: Problem) -> Outputs:
    """The eager formula with Hugging Face's roundings, in the problem's own dtypes."""
    return problem.run(partial(attend, implementation="eager"))


def magnitudes(problem: Problem) -> Outputs:
    """The formulas on absolute values, inside delta too; lse: 1 + a row's largest score.

    They include what the fp32 arithmetic of scores moves a weight by, in units of u.
    """
    exact = problem.to(torch.float64)
    spec = spec_of(exact)
    q, k, v = exact.inputs["q"], *(spec.gathered(exact.inputs[name]) for name in ("k", "v"))
    K, H = k.shape[1], q.shape[1]
    k, v = expand_heads(k, H), expand_heads(v, H)
    z, lse, size = _scores_and_sizes(q, k, spec)
    p, near = _weights(z, lse, size, problem.inputs["q"].dtype)
    do = exact.arriving["o"].abs().transpose(1, 2)
    o = near @ v.abs()
    delta = (do * o).sum(-1) + exact.arriving["lse"].abs()
    dz = near * (do @ v.abs().mT + delta[..., None])
    ds = abs(spec.scale) * dz * _slope(q, k, size, spec, problem.inputs["q"].dtype)
    largest = z.abs().where(p > 0, 0.0).amax(-1) if z.shape[-1] else torch.zeros_like(lse)
    found = {
        "o": o.transpose(1, 2),
        "dq": ds @ k.abs(),
        "dk": _of_groups(ds.mT @ q.abs(), K),
        "dv": _of_groups(near.mT @ do, K),
    }
    if spec.sinks is not None:
        sinks = spec.sinks.view(-1, 1)
        largest = torch.maximum(largest, sinks.abs())
        found["dsinks"] = ((sinks - lse).exp() * delta).sum((0, 2))
    if spec.mask.bias is not None:
        found["dbias"] = dz.sum_to_size(spec.mask.bias.shape)
    return {**found, "lse": 1.0 + largest}


def _scores_and_sizes(q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """z, -inf where hidden; lse, 0 where a row sees nothing; and the size of z's terms."""
    T, S = q.shape[2], k.shape[2]
    visible = spec.mask.visible(T, S, q.device)
    z = scores(q, k, spec).masked_fill(~visible, -torch.inf)
    columns = z
    if spec.sinks is not None:
        sinks = spec.sinks.view(1, -1, 1, 1).expand(*z.shape[:3], 1)
        columns = torch.cat((z, sinks), -1)
    lse = torch.logsumexp(columns, -1)
    size = abs(spec.scale) * (q.abs() @ k.abs().mT)
    if spec.alibi is not None:
        distance = torch.arange(S, device=q.device) - spec.mask.rows(T, S, q.device)[..., None]
        size = size + (spec.alibi.view(-1, q.shape[1], 1, 1) * distance[:, None]).abs()
    if spec.mask.bias is not None:
        size = size + spec.mask.bias.abs().masked_fill(~visible, 0.0)
    return z, lse.masked_fill(lse.isinf(), 0.0), size


def _weights(z: Tensor, lse: Tensor, size: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """p, and p with what fp32 arithmetic and underflow may move it by, in units of u."""
    p = (z - lse[..., None]).exp()
    arithmetic = 2.0**-24 / UNIT[dtype]
    moved = p * (1.0 + size + lse.abs()[..., None])
    moved = moved + p * moved.sum(-1, keepdim=True)
    lost = (z > -torch.inf) * (_LOST[dtype] / UNIT[dtype])
    return p, p + arithmetic * moved + lost


def _slope(
    q: Tensor, k: Tensor, size: Tensor, spec: AttentionSpec, dtype: torch.dtype
) -> Tensor | float:
    """What the softcap multiplies a gradient by, and what fp32 arithmetic moves that by."""
    if spec.softcap is None:
        return 1.0
    t = torch.tanh(spec.scale * (q @ k.mT) / spec.softcap)
    slope = 1.0 - t.square()
    # t moves with its score, and 1 - t^2 is a difference of numbers around 1
    moved = 2.0 * (slope * size / spec.softcap + t.square())
    return slope + 2.0**-24 / UNIT[dtype] * moved


def _of_groups(t: Tensor, K: int) -> Tensor:
    """Sums over the query heads of each key head."""
    B, H, S, D = t.shape
    return t.view(B, K, H // K, S, D).sum(2)


def share(name: str, problem: Problem) -> float:
    """4 u for what is made of rounded values."""
    return 1e-5 if name == "lse" else 4 * UNIT[problem.inputs["q"].dtype]


CONTRACT = Contract(
    OP,
    attend,
    cases,
    gold,
    baseline,
    magnitudes,
    share=share,
    bounds=lambda name: f"attention.{'dq' if name == 'dbias' else name}",
    pooled=lambda name: name not in ("lse", "dsinks"),
)
