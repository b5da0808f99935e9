"""Which cells of an op a run measures on a device: a few that stand for all, or more, or all."""

from __future__ import annotations

from bench.cases import Cell
from bench.contenders import Contender, contenders
from bench.subject import subject

CHOICES = {
    "quick": "two or three shapes an op, in the plain form: under three minutes for all ops",
    "issue": "every shape, in the plain form",
    "all": "every shape in every form",
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


def cells(op: str, device: str, which: str, dtypes: tuple[str, ...] | None = None) -> list[Cell]:
    """An op's cells in the order of a report; none where it has no backend for the device."""
    of = subject(op)
    if not any(one.ours for one in contenders(of, device)):
        return []
    shapes = of.cpu if device == "cpu" else of.gpu
    dtypes = dtypes or DTYPES[device]
    if which == "quick":
        names = of.quick if device == "cpu" else of.second_look
        shapes = tuple(of.shape(name) for name in names)
    return [
        Cell.of(op, shape, dtype, variant)
        for shape in shapes
        # a second dtype says little of another shape
        for dtype in (dtypes[-1:] if which == "quick" and shape is not shapes[0] else dtypes)
        for variant in of.variants_of(shape)
        # one model shows what the other forms cost; the rest takes minutes to compile
        if which == "all"
        or variant.form == of.forms[0]
        or (which == "issue" and shape.name == "llama_1b")
    ]


def contenders_of(cell: Cell, device: str, which: str) -> list[Contender]:
    """Everyone; in a quick run torch.compile in one shape and dtype of an op, as a user calls it.

    Compiling takes longer there than all of the rest.
    """
    of = cell.subject
    first = of.quick[:1] if device == "cpu" else of.second_look[:1]
    compiled = cell.shape in first and cell.dtype == DTYPES[device][-1] and not cell.kind.alone
    return contenders(of, device, compiled=which != "quick" or compiled)
