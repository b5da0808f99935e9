"""Which backend each module of a model runs: names from config, resolved once, and reported.

A module that calls an op is a KernelModule. It holds the resolved Choice, so that its forward looks
nothing up; it chooses again when it is moved to another device or dtype, or unpickled. KernelPolicy
says what each module is to ask for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import import_module
from itertools import chain
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from swathe.kernels.core.errors import did_you_mean
from swathe.kernels.core.registry import AUTO, Choice, registered

OPS = {
    "attn": ("attention", "swathe.kernels.attention.api"),
    "norm": ("rms_norm", "swathe.kernels.norm.api"),
    "rope": ("rotary", "swathe.kernels.rotary.api"),
    "mlp": ("gated_mlp_act", "swathe.kernels.gated_mlp_act.api"),
    "linear": ("linear", "swathe.kernels.linear.api"),
}
# the configuration's field of each op
IMPLEMENTATIONS = {op: f"{op}_implementation" for op in OPS}


class KernelModule(nn.Module):
    """A module whose forward is one call into an op; `op` is its short name, a key of OPS."""

    op: ClassVar[str]
    choice: Choice

    def pick(self, implementation: str) -> Choice:
        """The backend for this module as it is now (device, dtype, sizes); changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} must say how it chooses a backend")

    def sample(self) -> Tensor:
        """A tensor of the module's: where and in which dtype it is."""
        return next(chain(self.parameters(), self.buffers()))

    def resolve(self, implementation: str) -> Choice:
        """`pick`, but on the meta device, where nothing runs, a name is only taken down."""
        if self.sample().is_meta:
            return replace(self.pick(AUTO), asked=implementation)
        return self.pick(implementation)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.choice = self.resolve(self.choice.asked)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a backend's function may be a closure, which cannot be pickled
        return {**self.__dict__, "choice": self.choice.asked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.choice = self.resolve(state["choice"])


@dataclass(frozen=True)
class KernelPolicy:
    """Backend names by op, and by module: `overrides={"layers.0.*": {"norm": "eager"}}`.

    A pattern is matched against a module's full name, or its end after a dot; later ones win.
    """

    attn: str = AUTO
    norm: str = AUTO
    rope: str = AUTO
    mlp: str = AUTO
    linear: str = AUTO
    overrides: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, kernels: str | Mapping[str, Any] | KernelPolicy | None = None, **named: str | None
    ) -> KernelPolicy:
        """A policy from what users write; backends named for an op win over `kernels`.

        `kernels` is a backend for every op ("auto", "eager", ...), a dict of ops and module
        patterns ({"norm": "triton", "layers.0.*": "eager"}), or a policy; `named` are keys of OPS.
        Raises ValueError for unknown names of ops and backends.
        """
        if isinstance(kernels, KernelPolicy):
            policy = kernels
        elif isinstance(kernels, Mapping):
            policy = _from_mapping(kernels)
        elif kernels is None or isinstance(kernels, str):
            everywhere = dict.fromkeys(OPS, kernels or AUTO)
            if kernels not in backends_of("linear"):
                # only CPUs have projections of their own
                everywhere["linear"] = AUTO
            policy = cls(**everywhere)  # type: ignore[arg-type]
        else:
            raise TypeError(
                f"kernels is a {type(kernels).__name__}; it must be a backend's name, a dict such "
                'as {"norm": "eager", "layers.0.*": "eager"}, or a KernelPolicy'
            )
        chosen: dict[str, Any] = {op: name for op, name in named.items() if name}
        policy = replace(policy, **chosen)
        for op in OPS:
            check_backend(op, getattr(policy, op))
        for wanted in policy.overrides.values():
            for op, name in wanted.items():
                check_backend(op, name)
        return policy

    def asked(self, op: str, module: str) -> str:
        """The backend's name that `module` is to ask for."""
        name = getattr(self, op)
        for pattern, wanted in self.overrides.items():
            if op in wanted and matches(pattern, module):
                name = wanted[op]
        return name

    def apply(self, model: nn.Module) -> None:
        """Resolve every KernelModule, then set all at once: an error leaves the model as it was."""
        found = list(kernel_modules(model))
        for pattern in self.overrides:
            if not any(matches(pattern, name) for name, _ in found):
                raise ValueError(
                    f"kernels: pattern {pattern!r} matches no module that calls a kernel; they are "
                    f"{sorted({re.sub('[0-9]+', '*', name) for name, _ in found})}"
                )
        chosen = [(module, module.resolve(self.asked(module.op, name))) for name, module in found]
        for module, choice in chosen:
            module.choice = choice


def backends_of(op: str) -> list[str]:
    """The names that may be given for an op, "auto" among them."""
    full_name, home = OPS[op]
    import_module(home)
    return [AUTO, *registered(full_name)]


def check_backend(op: str, name: object) -> None:
    """Raise ValueError unless `name` is "auto" or a registered backend of `op`."""
    if op not in OPS:
        raise ValueError(f"kernels: unknown op {op!r}{did_you_mean(op, OPS)}; known: {list(OPS)}")
    allowed = backends_of(op)
    if name not in allowed:
        raise ValueError(
            f'Specified {op}_implementation="{name}" is not supported'
            f"{did_you_mean(str(name), allowed)}; allowed: {allowed}"
        )


def matches(pattern: str, module: str) -> bool:
    """Whether a glob names `module`, in full or from one of its dots on."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def kernel_modules(model: nn.Module) -> Iterator[tuple[str, KernelModule]]:
    """(name, module) of every module that holds a Choice."""
    for name, module in model.named_modules():
        if isinstance(module, KernelModule):
            yield name, module


def _for_ops_with(name: object) -> dict[str, str]:
    """The backend for each op that has it; a name that none has is left for the check."""
    having = {op: str(name) for op in OPS if name in backends_of(op)}
    return having or dict.fromkeys(OPS, str(name))


def _from_mapping(kernels: Mapping[str, Any]) -> KernelPolicy:
    ops: dict[str, str] = {}
    overrides: dict[str, Mapping[str, str]] = {}
    for key, wanted in kernels.items():
        if key in OPS:
            ops[key] = wanted
        elif "." not in key and "*" not in key:
            raise ValueError(
                f"kernels: {key!r}{did_you_mean(key, OPS)} is neither an op ({list(OPS)}) nor a "
                'module pattern such as "layers.0.*"'
            )
        else:
            overrides[key] = wanted if isinstance(wanted, Mapping) else _for_ops_with(wanted)
    return KernelPolicy(**ops, overrides=overrides)


@dataclass(frozen=True)
class KernelUse:
    """One row of the report: what a module runs, why, and which backends were passed over."""

    module: str
    op: str
    backend: str
    why: str
    skipped: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class KernelReport:
    """Every kernel module of a model; printing it gives a table, `to_json` everything."""

    rows: tuple[KernelUse, ...]

    @classmethod
    def of(cls, model: nn.Module) -> KernelReport:
        """The report of a model as it is now."""
        return cls(tuple(_use(name, m.choice) for name, m in kernel_modules(model)))

    def to_json(self) -> str:
        """One object a module, in the model's order."""
        return json.dumps([vars(row) | {"skipped": dict(row.skipped)} for row in self.rows])

    def __str__(self) -> str:
        counted: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            passed = "; ".join(f"{k}: {', '.join(v)}" for k, v in row.skipped.items())
            key = (re.sub("[0-9]+", "*", row.module), row.op, row.backend, row.why, passed)
            counted[key] = counted.get(key, 0) + 1
        header = ("module", "count", "op", "backend", "why", "skipped")
        table: list[tuple[str, ...]] = [header]
        table += [(key[0], str(n), *key[1:]) for key, n in counted.items()]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table)
        return "\n".join(line.rstrip() for line in lines)


def _use(name: str, choice: Choice) -> KernelUse:
    why = "first that serves" if choice.asked == AUTO else f"asked for {choice.asked!r}"
    return KernelUse(name, choice.op, choice.backend, why, choice.skipped)
