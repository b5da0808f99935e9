"""What a user may ask `patch` for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypedDict

from swathe.kernels.core.errors import did_you_mean
from swathe.kernels.core.registry import AUTO


@dataclass(frozen=True)
class Options:
    """Which forms are looked for, and the backend that is to serve them.

    The names are those that users of other patchers pass already. `backend` is "auto" or a name
    that each op must know; a module that the named backend cannot serve is left alone.
    """

    rms_norm: bool = True
    layer_norm: bool = True
    rope: bool = True
    swiglu: bool = True
    residual: bool = True
    cross_entropy: bool = False
    fused_linear_cross_entropy: bool = True
    backend: str = AUTO

    @classmethod
    def of(cls, **given: object) -> Options:
        """Options from keyword arguments; raises TypeError for unknown ones and wrong values."""
        allowed = {field.name: type(field.default) for field in fields(cls)}
        for name, value in given.items():
            if name not in allowed:
                raise TypeError(
                    f"patch: unknown option {name!r}{did_you_mean(name, allowed)}; allowed: "
                    f"{list(allowed)}"
                )
            if type(value) is not allowed[name]:
                raise TypeError(f"patch: {name}={value!r}; it must be a {allowed[name].__name__}")
        made = cls(**given)  # type: ignore[arg-type]
        if made.cross_entropy and made.fused_linear_cross_entropy and "cross_entropy" in given:
            if "fused_linear_cross_entropy" in given:
                raise ValueError(
                    "patch: cross_entropy and fused_linear_cross_entropy are two ways to compute "
                    "one loss; set one of them"
                )
            return cls(**{**given, "fused_linear_cross_entropy": False})  # type: ignore[arg-type]
        return made


class PatchOptions(TypedDict, total=False):
    """The same as keyword arguments."""

    rms_norm: bool
    layer_norm: bool
    rope: bool
    swiglu: bool
    residual: bool
    cross_entropy: bool
    fused_linear_cross_entropy: bool
    backend: str
