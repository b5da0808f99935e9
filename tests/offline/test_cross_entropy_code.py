"""Every configuration of the row kernels of cross-entropy, compiled for GPUs that are not here."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from support.gate import Configuration, covered, verify
from support.machine_code import TARGETS
from swathe.kernels.core import logits

OP = "cross_entropy"
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FLOATS = ("smoothing", "softcap", "scale", "z_loss")
# bytes of label, statistics and arriving gradient, which every thread loads, and of `rest`
READ_SCALARS, WRITTEN_SCALARS = 20, 8


def configuration(
    kernel: str,
    V: int,
    dtype: str,
    flags: dict[str, bool],
    *,
    out: str | None = None,
    labels: str = "*i64",
    aligned: bool = True,
) -> Configuration:
    """The specialisation that `forward` or `write_gradients` launches for rows of V classes."""
    jitted: Any = getattr(logits, f"_{kernel}")
    columns, warps = logits.block(V)
    constants = {**flags, "BLOCK_V": columns}
    types = {}
    for name in jitted.arg_names:
        if name in constants:
            continue
        if name == "x_ptr":
            types[name] = TYPES[dtype]
        elif name == "dx_ptr":
            types[name] = TYPES[out or dtype]
        elif name == "label_ptr":
            types[name] = labels
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    divisible = {n for n in types if n.endswith("_ptr")}
    if aligned:
        divisible |= {"x_stride", "V"}
    gradients = kernel == "gradients"
    on = "".join(f"-{name.lower()}" for name, value in flags.items() if value)
    kind = dtype if out in (None, dtype) else f"{dtype}-to-{out}"
    label = f"{kernel}-{columns}-{kind}{on}{'' if aligned else '-odd'}{labels.strip('*i')}"
    threads = 32 * warps
    return Configuration(
        label,
        jitted,
        types,
        constants,
        frozenset(divisible),
        warps,
        reads=columns * BYTES[dtype] + READ_SCALARS * threads if aligned else None,
        writes=columns * BYTES[out or dtype] + WRITTEN_SCALARS * threads
        if gradients and aligned
        else None,
        # the losses store three numbers a row; their loads are looked at below
        wide=aligned and gradients,
    )


def shipped() -> list[Configuration]:
    """What the launchers choose from, over every block size, type and option."""
    found = []
    for V, dtype, capped in product((1024, 128_256), ("bf16", "fp32"), (False, True)):
        if V == 1024 and not capped:
            continue  # the smaller tile with more in it
        for smooth in (False, True):
            flags = {"SOFTCAP": capped, "SMOOTH": smooth}
            found.append(configuration("losses", V, dtype, flags))
        flags = {"SOFTCAP": capped, "REST": False}
        found.append(configuration("gradients", V, dtype, flags))
        # a chunk's fp32 logits become gradients for the matrix units
        if dtype == "fp32":
            flags = {"SOFTCAP": capped, "REST": True}
            found.append(configuration("gradients", V, dtype, flags, out="bf16"))
    plain, rest = {"SOFTCAP": False, "SMOOTH": False}, {"SOFTCAP": True, "REST": True}
    # fp16 takes the same instructions as bf16: one of each kernel shows that it compiles
    found.append(configuration("losses", 128_256, "fp16", plain))
    found.append(configuration("gradients", 128_256, "fp32", rest, out="fp16"))
    found.append(configuration("losses", 128_256, "bf16", plain, labels="*i32"))
    for V, dtype in product((1000, 50_257), ("bf16", "fp32")):
        found.append(configuration("losses", V, dtype, plain | {"SMOOTH": True}, aligned=False))
        flags = {"SOFTCAP": True, "REST": False}
        found.append(configuration("gradients", V, dtype, flags, aligned=False))
    return found


CONFIGURATIONS = shipped()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify(OP, configuration, target)
    if configuration.reads is not None:
        assert configuration.compile(target).loads.get(128, 0) >= 1, "no 16-byte load"


def test_every_configuration_has_a_baseline() -> None:
    assert covered(OP, CONFIGURATIONS) == []
