"""Where files and parameters differ: stored tensors renamed, stacked, joined, cut or transposed.

    "block_sparse_moe.experts.{expert}.w1.weight"   (I, H), E of them
    "block_sparse_moe.experts.{expert}.w3.weight"   (I, H), E of them
      -> "mlp.experts.gate_up_proj"                 (E, 2I, H)   operations=(Concatenate(dim=1),)

A transform only moves elements. One side of it is one tensor, and every tensor of the other side is
a view of a part of that one, so the inverse is exact by construction: loading copies what it reads
to its place, saving writes views. Nothing but one tensor of the many sides is held twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from swathe.modeling.checkpoint.errors import CheckpointError

MOST_STACKED = 1 << 16  # a configuration must not make us list more names than any model has
_INDEX = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class Concatenate:
    """One stored tensor a source, side by side along `dim` of the parameter.

    `sizes` are their lengths along it; None means equal ones.
    """

    dim: int
    sizes: tuple[int, ...] | None = None

    def undo(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """The `count` parts of one tensor, as views."""
        return _cut(tensors[0], self.dim, self.sizes, count)


@dataclass(frozen=True, slots=True)
class Split:
    """The stored tensor cut along `dim` into one parameter a target; `sizes` as in Concatenate."""

    dim: int
    sizes: tuple[int, ...] | None = None

    def do(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """The `count` parts of one tensor, as views."""
        return _cut(tensors[0], self.dim, self.sizes, count)

    def undo(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """The parts joined again, in new memory."""
        return [torch.cat(list(tensors), self.dim)]


@dataclass(frozen=True, slots=True)
class Transpose:
    """Two dimensions of each tensor swapped: the last two, unless said otherwise."""

    dim0: int = -2
    dim1: int = -1

    def do(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """Each tensor transposed, as a view."""
        return [tensor.transpose(self.dim0, self.dim1) for tensor in tensors]

    undo = do


Operation = Concatenate | Split | Transpose


@dataclass(frozen=True)
class WeightTransform:
    """Stored tensors named by `sources` are the parameters named by `targets`.

    A pattern is the end of a name, from one of its dots on; `{layer}` in it is a number. Sources
    may hold one number that the target lacks: their tensors are stacked along a new first
    dimension. `operations` then run in the order given, and backwards when saving. Several sources
    need one Concatenate, several targets one Split. `legacy` transforms are for reading alone:
    they apply where a file has the old names, and are never written.
    Raises ValueError for a declaration that is no such thing.
    """

    sources: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    legacy: bool = False
    stacks: bool = field(init=False)

    def __post_init__(self) -> None:
        sources, targets = _several(self.sources), _several(self.targets)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "targets", targets)
        stacked = _numbers(self, sources) - _numbers(self, targets)
        object.__setattr__(self, "stacks", bool(stacked))
        joins = [op for op in self.operations if isinstance(op, Concatenate)]
        cuts = [op for op in self.operations if isinstance(op, Split)]
        if len(sources) > 1 and len(targets) > 1:
            _refuse(self, "has several sources and several targets; one side must be one tensor")
        if len(joins) != (len(sources) > 1):
            _refuse(self, f"has {len(sources)} sources and {len(joins)} Concatenate; join several "
                    "sources with one, a single source with none")  # fmt: skip
        if len(cuts) != (len(targets) > 1):
            _refuse(self, f"has {len(targets)} targets and {len(cuts)} Split; cut for several "
                    "targets with one, for a single target with none")  # fmt: skip
        if (
            len(stacked) > 1
            or (stacked and cuts)
            or _numbers(self, targets) - _numbers(self, sources)
        ):
            _refuse(self, "needs every number of a target in its sources, and at most one more "
                    "there, which a single target stacks")  # fmt: skip
        for op in joins + cuts:
            if op.sizes is not None and len(op.sizes) != max(len(sources), len(targets)):
                _refuse(self, f"has {op}; give one size a tensor, or None for equal sizes")

    @property
    def renames_only(self) -> bool:
        """Whether the stored tensor is the parameter, under another name."""
        return not self.operations and not self.stacks

    def to_stored(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The stored tensors of these parameters: views of a single one, else one new tensor.

        A stack is in the order of its numbers, and for each number in the order of `sources`.
        """
        tensors = list(parameters)
        for op in reversed(self.operations):
            tensors = op.undo(tensors, len(self.sources))
        if not self.stacks:
            return tensors
        return [tensor[i] for i in range(self._height(tensors)) for tensor in tensors]

    def to_parameters(self, stored: Tensor) -> list[Tensor]:
        """The parameters that one stored tensor holds, as views of it."""
        tensors = [stored]
        for op in self.operations:
            assert not isinstance(op, Concatenate)
            tensors = op.do(tensors, len(self.targets))
        return tensors

    def _height(self, tensors: Sequence[Tensor]) -> int:
        count = tensors[0].shape[0]
        if count > MOST_STACKED:
            raise CheckpointError(
                "E_SHAPE",
                f"{self.targets[0]!r} would stack {count} stored tensors {self.sources[0]!r}; at "
                f"most {MOST_STACKED} are allowed: make config.json agree with the weights",
                key=self.targets[0],
            )
        return count

    def group_of(self, name: str, tensors: Mapping[str, Tensor]) -> Group | None:
        """The parameters among `tensors` that share stored tensors with `name`; None if not ours.

        Raises ValueError where `tensors` lacks one of them.
        """
        found = next(filter(None, (_pattern(t).fullmatch(name) for t in self.targets)), None)
        if found is None:
            return None
        numbers = found.groupdict()
        prefix = numbers.pop("prefix_")
        parameters = tuple(prefix + target.format(**numbers) for target in self.targets)
        lacking = [p for p in parameters if p not in tensors]
        if lacking:
            raise ValueError(
                f"{name!r} is stored in one tensor with {lacking}, which are not among the "
                "model's; give all of them"
            )
        shapes = [torch.empty_like(tensors[p], device="meta") for p in parameters]
        count = len(self.to_stored(shapes)) // len(self.sources)
        return Group(self, parameters, tuple(self._stored_names(prefix, numbers, count)))

    def _stored_names(self, prefix: str, numbers: Mapping[str, str], count: int) -> list[str]:
        names = []
        for i in range(count):
            for source in self.sources:
                known = {n: numbers.get(n, str(i)) for n in _INDEX.findall(source)}
                names.append(prefix + source.format(**known))
        return names


@dataclass(frozen=True)
class Group:
    """One use of a transform: the `parameters` that the tensors named `stored` make up."""

    transform: WeightTransform
    parameters: tuple[str, ...]
    stored: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """A tensor that is put together from `parts` only when it is written."""

    transform: WeightTransform
    parts: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.numel() * self.itemsize

    def numel(self) -> int:
        """Elements of all."""
        return math.prod(self.shape)

    def assemble(self) -> Tensor:
        """The tensor itself, in memory of its own."""
        return self.transform.to_stored(self.parts)[0]


def find_groups(
    tensors: Mapping[str, Tensor],
    transforms: Sequence[WeightTransform],
    present: Callable[[str], bool] | None = None,
) -> dict[str, Group]:
    """Which group each of the parameters `tensors` belongs to; those stored as they are have none.

    `present` says which names a file has: a transform with a source there wins, a parameter that is
    there under its own name is taken as it is. Without it the first that is not legacy applies.
    """
    groups: dict[str, Group] = {}
    for name in tensors:
        if name in groups:
            continue
        candidates = [g for t in transforms if (g := t.group_of(name, tensors)) is not None]
        usual = next((g for g in candidates if not g.transform.legacy), None)
        if present is not None:
            there = next((g for g in candidates if any(map(present, g.stored))), None)
            usual = there or (None if present(name) else usual)
        if usual is not None:
            groups.update(dict.fromkeys(usual.parameters, usual))
    return groups


def to_stored(
    tensors: Mapping[str, Tensor], transforms: Sequence[WeightTransform]
) -> dict[str, Tensor | Joined]:
    """A state dict under the names and in the shapes that files have; nothing is copied yet.

    Raises ValueError where two tensors would get one name, a group is incomplete, or parameters
    that share a stored tensor differ in dtype.
    """
    groups = find_groups(tensors, transforms)
    result: dict[str, Tensor | Joined] = {}
    for name, tensor in tensors.items():
        group = groups.get(name)
        if group is None:
            new: list[tuple[str, Tensor | Joined]] = [(name, tensor)]
        elif name != group.parameters[0]:
            continue
        else:
            parts = [tensors[p] for p in group.parameters]
            new = list(zip(group.stored, _stored_tensors(group, parts), strict=True))
        for key, value in new:
            if key in result:
                raise ValueError(
                    f"{name!r} would be stored as {key!r}, which another tensor is; rename one"
                )
            result[key] = value
    return result


def _stored_tensors(group: Group, parts: Sequence[Tensor]) -> Sequence[Tensor | Joined]:
    if len(parts) == 1:
        return group.transform.to_stored(parts)
    dtypes = {str(part.dtype).removeprefix("torch.") for part in parts}
    if len(dtypes) > 1:
        raise ValueError(
            f"{list(group.parameters)} are stored in one tensor {group.stored[0]!r}, but are "
            f"{sorted(dtypes)}; convert them to one dtype"
        )
    whole = group.transform.to_stored([torch.empty_like(p, device="meta") for p in parts])[0]
    return [Joined(group.transform, tuple(parts), whole.shape, whole.dtype)]


def _several(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _numbers(transform: WeightTransform, patterns: Sequence[str]) -> set[str]:
    """The numbers that all of `patterns` hold."""
    found = [set(_INDEX.findall(pattern)) for pattern in patterns]
    if not found or any(one != found[0] for one in found):
        _refuse(transform, "needs sources with the same numbers, and targets with the same numbers")
    return found[0]


def _refuse(transform: WeightTransform, why: str) -> None:
    raise ValueError(f"WeightTransform({transform.sources} -> {transform.targets}) {why}")


@cache
def _pattern(text: str) -> re.Pattern[str]:
    parts = _INDEX.split(text)  # every second one is a number's name
    body = (rf"(?P<{p}>0|[1-9]\d*)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    return re.compile(rf"(?P<prefix_>(?:.+\.)?){''.join(body)}")


def _cut(tensor: Tensor, dim: int, sizes: tuple[int, ...] | None, count: int) -> list[Tensor]:
    length = tensor.shape[dim]
    if sizes is None and length % count:
        raise ValueError(f"{tuple(tensor.shape)} cannot be cut into {count} along dim {dim}")
    if sizes is not None and sum(sizes) != length:
        raise ValueError(f"{tuple(tensor.shape)} cannot be cut into {sizes} along dim {dim}")
    return list(tensor.split(list(sizes or [length // count] * count), dim))
