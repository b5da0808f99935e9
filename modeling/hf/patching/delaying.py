"""The source of an attention, in which norms of q and k wait for the rotary function.

                                     waits = ready(self.q_norm, self.k_norm)
    q = self.q_norm(q)               q = later(waits, self.q_norm, q)
    k = self.k_norm(k)            -> k = later(waits, self.k_norm, k)
    q, k = rotate(q, k, c, s)        q, k = turn(waits, self.q_norm, self.k_norm, q, k, c, s)

`later` gives its argument back where the norm waits, and the norm of it otherwise. What is normed
must be a name that nothing else reads before the rotary function; between both only axes may be
exchanged, and both must stand in one block. With a q alone, the second norm is None.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from swathe.modeling.hf.patching.sources import blocks, compiled, parsed, self_call

_PREFIX = "_swathe"


@dataclass(frozen=True)
class Site:
    """A call of the rotary function `function`, and the norms of what it turns, in its order."""

    function: str
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Calls:
    """What stands in at a site."""

    ready: Callable[..., Any]  # (*norms)
    later: Callable[..., Any]  # (waits, norm, x)
    turn: Callable[..., Any]  # (waits, q_norm, k_norm or None, *args, **kwargs)


# for each rotary function, the names of all its parameters and how many of them it turns
Turned = tuple[tuple[str, tuple[str, ...], int], ...]


@cache
def sites(function: FunctionType, turned: Turned) -> tuple[Site, ...]:
    """Every call of a rotary function all of whose q and k are norms until then.

    Raises Unreadable where there is no source.
    """
    return tuple(found.site for found in _found(parsed(function), turned))


def rewritten(
    function: FunctionType,
    turned: Turned,
    calls: Mapping[Site, Calls],
    stand_ins: Mapping[str, Callable[..., Any]],
    title: str,
) -> FunctionType:
    """`function` with the sites in `calls` rewritten, and `stand_ins` for other rotary calls."""
    tree = parsed(function)
    used: dict[str, Any] = {}
    first: list[ast.stmt] = []
    for number, found in enumerate(list(_found(tree, turned))):
        if found.site in calls:
            names = {part: f"{_PREFIX}_{part}_{number}" for part in ("ready", "later", "turn")}
            used |= {name: getattr(calls[found.site], part) for part, name in names.items()}
            waits = f"{_PREFIX}_waits_{number}"
            ready = ast.Call(_read(names["ready"]), _norms(found.site), [])
            first.append(ast.Assign([ast.Name(waits, ast.Store())], ready))
            found.delay(names["later"], names["turn"], waits)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name in stand_ins:
                node.func = _read(f"{_PREFIX}_{name}")
                used[f"{_PREFIX}_{name}"] = stand_ins[name]
    tree.body[:0] = first
    return compiled(tree, function, used, title)


@dataclass
class _Found:
    site: Site
    normed: list[ast.Call]
    rotary: ast.Call

    def delay(self, later: str, turn: str, waits: str) -> None:
        """Change the tree that the site was found in."""
        for call in self.normed:
            call.args = [_read(waits), call.func, *call.args]
            call.func = _read(later)
        self.rotary.func = _read(turn)
        self.rotary.args[:0] = [_read(waits), *_norms(self.site)]


def _found(tree: ast.FunctionDef, turned: Turned) -> Iterator[_Found]:
    known = {name: (parameters, count) for name, parameters, count in turned}
    for block, _ in blocks(tree):
        for i, statement in enumerate(block):
            call = getattr(statement, "value", None)
            if not isinstance(statement, ast.Assign) or not isinstance(call, ast.Call):
                continue
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            if name not in known or any(isinstance(a, ast.Starred) for a in call.args):
                continue
            parameters, count = known[name]
            given = dict(zip(parameters, call.args, strict=False))
            given |= {k.arg: k.value for k in call.keywords if k.arg is not None}
            heads = [given.get(parameter) for parameter in parameters[:count]]
            normed = [_norm_of(head, block[:i]) for head in heads]
            names = [self_call(norm) for norm in normed if norm is not None]
            if len(names) == count and all(names):
                yield _Found(Site(name, tuple(map(str, names))), normed, call)  # type: ignore[arg-type]


def _norm_of(head: ast.expr | None, before: list[ast.stmt]) -> ast.Call | None:
    """The call of a norm that `head`, a name, was last assigned, if nothing has read it since."""
    if not isinstance(head, ast.Name):
        return None
    for statement in reversed(before):
        if not any(isinstance(n, ast.Name) and n.id == head.id for n in ast.walk(statement)):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or targets[0].id != head.id:
            return None
        value: Any = statement.value  # type: ignore[attr-defined]
        if ast.unparse(value).endswith(".transpose(1, 2)") and isinstance(value, ast.Call):
            value = value.func.value
        return value if self_call(value) is not None else None
    return None


def _norms(site: Site) -> list[ast.expr]:
    own = [ast.Attribute(_read("self"), name, ast.Load()) for name in site.norms]
    return [*own, *([ast.Constant(None)] if len(own) == 1 else [])]


def _read(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())
