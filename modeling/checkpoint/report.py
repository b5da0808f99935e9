"""What a load did: missing, unexpected, mismatched, tied, cast and ignored tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from swathe.modeling.checkpoint.errors import LISTED, listing

Shape = tuple[int, ...]


def nearest(name: str, others: Collection[str]) -> str | None:
    """The name among `others` that this one may have been meant to be."""
    if len(others) > 2000:  # difflib is quadratic; so many names are not typing errors
        return None
    return next(iter(get_close_matches(name, others, n=1, cutoff=0.8)), None)


@dataclass(slots=True, repr=False)
class LoadReport:
    """Names as the model has them, except `unexpected` and `ignored`: as the checkpoint has them.

    `mismatched` holds (name, shape in the checkpoint, shape in the model); `tied` maps a name to
    the one whose memory it shares; `cast` maps a name to (stored dtype, loaded dtype); `converted`
    maps one to the stored tensors it was made of. What is missing of such a parameter is named as
    the checkpoint should have it.
    """

    loaded: int = 0
    prefix: str = ""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    cast: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The dict that transformers returns for `output_loading_info=True`."""
        return {
            "missing_keys": set(self.missing),
            "unexpected_keys": set(self.unexpected),
            "mismatched_keys": set(self.mismatched),
            "error_msgs": [],
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}"

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded" + (f", {self.prefix}" if self.prefix else "")]
        mismatched = [f"{name} {was} -> {now}" for name, was, now in self.mismatched]
        for what, names in (
            ("missing (left for initialisation)", self.missing),
            ("unexpected (not used)", self.unexpected),
            ("mismatched (left for initialisation)", mismatched),
            ("ignored", self.ignored),
        ):
            if names:
                lines.append(f"{what}: {listing(names)}")
        # the rest is only counted, and difflib takes milliseconds a name
        near = {key: nearest(key, self.missing) for key in self.unexpected[:LISTED]}
        renamed = [f"{key} -> {name}" for key, name in near.items() if name]
        if renamed:
            lines.append(f"renamed, it seems: {listing(renamed)}")
        if self.tied:
            lines.append("tied: " + ", ".join(f"{k} -> {v}" for k, v in self.tied.items()))
        if self.converted:
            used = {name for names in self.converted.values() for name in names}
            lines.append(f"converted: {len(used)} tensors to {len(self.converted)} parameters")
        kinds = sorted({f"{was} -> {now}" for was, now in self.cast.values()})
        if kinds:
            lines.append(f"cast: {len(self.cast)} tensors, {', '.join(kinds)}")
        return "\n".join(lines).replace("torch.", "")
