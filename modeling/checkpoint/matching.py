"""Which checkpoint tensor goes to which parameter, decided from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from swathe.modeling.checkpoint.errors import LISTED, CheckpointError
from swathe.modeling.checkpoint.header import TensorInfo
from swathe.modeling.checkpoint.report import LoadReport, nearest

Strict = Literal["head"] | bool
# buffers that old checkpoints carry and every model computes for itself
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
# names that checkpoints converted from TensorFlow carry; transformers reads them for every model
_OLD_NAMES = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}


@dataclass(slots=True)
class Match:
    """`plan` maps a parameter to its stored tensor; `both_tied` maps tied parameters to theirs."""

    plan: dict[str, TensorInfo] = field(default_factory=dict)
    both_tied: dict[str, TensorInfo] = field(default_factory=dict)
    report: LoadReport = field(default_factory=LoadReport)


def match(
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, TensorInfo],
    *,
    directory: Path,
    tied: Mapping[str, str],
    prefix: str,
    renames: Mapping[str, str] = MappingProxyType({}),
    head_parts: Sequence[str] = (),
    ignore_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    strict: Strict = "head",
    ignore_mismatched_sizes: bool = False,
) -> Match:
    """Assign stored tensors to the names in `wanted`; raise one CheckpointError with every problem.

    `strict="head"` lets tensors outside the body (`prefix`), and those in it that `head_parts`
    names, be missing or unexpected, `True` lets none, `False` lets all. `renames` are patterns of
    older names and what to write instead, besides those of every model.
    Codes: E_KEYS, E_ARCHITECTURE, E_SHAPE, E_DTYPE, E_DUPKEY.
    """
    result = Match()
    modern = {key: _modern(key, wanted, {**_OLD_NAMES, **renames}) for key in stored}
    names = _rename(wanted, stored, modern, prefix, directory, result.report)
    extra: list[str] = []
    for key, info in stored.items():
        name = names[key]
        if name not in wanted:
            computed = _COMPUTED.search(key) or _matches(key, ignore_unexpected)
            (result.report.ignored if computed else extra).append(key)
        elif name in tied and tied[name] in wanted:
            result.both_tied[name] = info
        else:
            result.plan[name] = info
    _resolve_ties(result, wanted, tied)
    # of a tie, either end will do; where both are absent, both are missing
    ends = {name: (name, result.report.tied.get(name, name)) for name in wanted}
    absent = [name for name in wanted if result.plan.keys().isdisjoint(ends[name])]
    result.report.missing = [name for name in absent if not _matches(name, ignore_missing)]
    result.report.ignored += [name for name in absent if _matches(name, ignore_missing)]
    result.report.unexpected = extra

    problems = _key_problems(result, wanted, names, prefix, strict, head_parts)
    if result.report.missing and not result.plan and strict is not False:
        problems.insert(0, ("E_ARCHITECTURE", "", "no tensor of the checkpoint fits this model"))
    elif len(extra) > len(stored) / 2 and strict is not False:
        problems.insert(
            0, ("E_ARCHITECTURE", "", f"{len(extra)} of {len(stored)} tensors have no place in it")
        )
    lenient = ignore_mismatched_sizes or strict is False
    problems += _shape_problems(result, wanted, drop=lenient)
    problems += _dtype_problems(result, wanted)
    if problems:
        _raise(directory, problems)
    return result


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _modern(key: str, wanted: Mapping[str, Tensor], renames: Mapping[str, str]) -> str:
    if key in wanted:
        return key
    for pattern, name in renames.items():
        key = re.sub(pattern, name, key)
    return key


def _rename(
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, TensorInfo],
    modern: Mapping[str, str],
    prefix: str,
    directory: Path,
    report: LoadReport,
) -> dict[str, str]:
    """Names in the model for names in the checkpoint: as they are, or one prefix added or removed.

    The choice that places most tensors wins; a name that already fits is never changed.
    """
    dotted = f"{prefix}." if prefix else ""
    ways = {
        "": dict(modern),
        f"prefix {dotted!r} added": {
            k: name if name in wanted else dotted + name for k, name in modern.items()
        },
        f"prefix {dotted!r} removed": {
            k: name if name in wanted else name.removeprefix(dotted) for k, name in modern.items()
        },
    }
    fits = {way: sum(name in wanted for name in names.values()) for way, names in ways.items()}
    report.prefix = max(fits, key=lambda way: fits[way])
    names = ways[report.prefix]
    taken: dict[str, str] = {}
    for key, name in names.items():
        if name in wanted and name in taken:
            raise CheckpointError(
                "E_DUPKEY",
                f"{directory}: {taken[name]!r} and {key!r} both mean the parameter {name!r} "
                f"({report.prefix}); remove one of them from the checkpoint",
                file=stored[key].file,
                key=key,
            )
        taken[name] = key
    return names


def _resolve_ties(result: Match, wanted: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """A tied parameter takes its source's tensor; where only it is stored, the source takes its."""
    for name, source in tied.items():
        if name not in wanted or source not in wanted:
            continue
        result.report.tied[name] = source
        if source not in result.plan and name in result.both_tied:
            result.plan[source] = result.both_tied.pop(name)


Problem = tuple[str, str, str]


def _key_problems(
    result: Match,
    wanted: Mapping[str, Tensor],
    names: Mapping[str, str],
    prefix: str,
    strict: Strict,
    head_parts: Sequence[str],
) -> list[Problem]:
    if strict is False:
        return []
    dotted = f"{prefix}." if prefix else ""
    model_has_head = bool(dotted) and any(name.startswith(dotted) for name in wanted)
    file_has_head = bool(dotted) and any(key.startswith(dotted) for key in names)

    def is_body(name: str) -> bool:
        if strict is True:
            return True
        own = not model_has_head or name.startswith(dotted)
        return own and not _matches(name, head_parts)

    def is_stored_body(key: str) -> bool:
        if strict is True:
            return True
        if _matches(names[key], head_parts):
            return False
        if model_has_head:
            return names[key].startswith(dotted)
        return not file_has_head or key.startswith(dotted)

    missing = [name for name in result.report.missing if is_body(name)]
    unexpected = [key for key in result.report.unexpected if is_stored_body(key)]
    pairs = [
        *(("missing", name, unexpected) for name in missing),
        *(("unexpected", key, missing) for key in unexpected),
    ]
    return [
        # the rest is only counted, and difflib takes milliseconds a name
        ("E_KEYS", name, f"{what} {name!r}{_near(name, others) if i < LISTED else ''}")
        for i, (what, name, others) in enumerate(pairs)
    ]


def _near(name: str, others: Collection[str]) -> str:
    close = nearest(name, others)
    return f" (nearest: {close!r})" if close else ""


def _shape_problems(result: Match, wanted: Mapping[str, Tensor], *, drop: bool) -> list[Problem]:
    problems = []
    for name, info in [*result.plan.items(), *result.both_tied.items()]:
        shape = tuple(wanted[name].shape)
        if info.shape == shape:
            continue
        if drop:
            result.report.mismatched.append((name, info.shape, shape))
            result.plan.pop(name, None)
            result.both_tied.pop(name, None)
        else:
            text = f"{name!r} in {info.file.name} has shape {info.shape}, the model needs {shape}"
            problems.append(("E_SHAPE", name, text))
    return problems


def _dtype_problems(result: Match, wanted: Mapping[str, Tensor]) -> list[Problem]:
    problems = []
    for name, info in [*result.plan.items(), *result.both_tied.items()]:
        target = wanted[name].dtype
        if target.is_floating_point:
            # 8-bit floats need scales that a plain cast would drop
            fits, need = (
                info.dtype.is_floating_point and info.dtype.itemsize > 1,
                "a 16 to 64 bit float",
            )
        else:
            fits, need = info.dtype == target, str(target).removeprefix("torch.")
        if not fits:
            was = str(info.dtype).removeprefix("torch.")
            problems.append(
                ("E_DTYPE", name, f"{name!r} in {info.file.name} is {was}, the model needs {need}")
            )
    return problems


def _raise(directory: Path, problems: list[Problem]) -> None:
    code = problems[0][0]
    lines = [text for _, _, text in problems]
    shown = "\n  ".join(lines[:LISTED])
    more = f"\n  ... and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    fix = {
        "E_ARCHITECTURE": "this looks like a different architecture: load it with its own class",
        "E_KEYS": "use the model class and config of this checkpoint, ignore_missing=[...] or "
        "ignore_unexpected=[...] for names that may differ, or strict=False to accept anything",
        "E_SHAPE": "make config.json agree with the weights",
        "E_DTYPE": "quantised checkpoints are not supported: save it in float32 or bfloat16",
    }[code]
    keys = [key for _, key, _ in problems if key]
    raise CheckpointError(
        code,
        f"{directory}: the weights do not fit the model; nothing was loaded.\n"
        f"  {shown}{more}\n{fix}",
        file=directory,
        key=keys[0] if keys else None,
    )
