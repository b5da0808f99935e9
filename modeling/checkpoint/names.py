"""What the weight files of a checkpoint are called, with a variant and without.

    model.safetensors                     model.fp16.safetensors
    model-00001-of-00002.safetensors      model.fp16-00001-of-00002.safetensors
    model.safetensors.index.json          model.safetensors.index.fp16.json

These are transformers' names for variant="fp16"; model-00001-of-00002.fp16.safetensors, as other
libraries spell a shard, is known too. While a save is under way, new weights have an `id` of twelve
digits behind "model-" (writer.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_FILE = re.compile(
    r"model(?:-(?P<id>[0-9a-f]{12}))?(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<shards>[\w-]+))?\.safetensors(?:\.index(?:\.(?P<index>[\w-]+))?\.json)?"
)
_TEMPORARY = re.compile(r"\..+\.(?P<id>[0-9a-f]{12})\.tmp")
_VARIANT = re.compile(r"(?!safetensors$|index$)[A-Za-z0-9_-]{1,64}(?<!-\d{5}-of-\d{5})")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file that save writes: of which variant, and the id of the save while it is not done."""

    variant: str | None
    id: str | None = None

    @classmethod
    def named(cls, name: str) -> Self | None:
        """What a file name says; None for files that save does not write."""
        temporary = _TEMPORARY.fullmatch(name)
        if temporary:
            return cls(None, temporary["id"])
        found = _FILE.fullmatch(name)
        return found and cls(found["variant"] or found["shards"] or found["index"], found["id"])


def require_variant(variant: str | None) -> None:
    """Raise ValueError unless it is None or can be a part of file names."""
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise ValueError(
            f"variant={variant!r} must be None or a part of file names, such as 'fp16': letters, "
            "digits, '_' and '-', at most 64 of them"
        )


def single(variant: str | None = None) -> str:
    """The file that holds all weights."""
    return f"model{_dotted(variant)}.safetensors"


def index(variant: str | None = None) -> str:
    """The file that says in which shard a tensor is."""
    return f"model.safetensors.index{_dotted(variant)}.json"


def shards(count: int, variant: str | None = None, id: str | None = None) -> list[str]:
    """The names of `count` files; with the `id` of a save, where they are staged."""
    stem = f"model{f'-{id}' if id else ''}{_dotted(variant)}"
    numbers = [f"-{i + 1:05d}-of-{count:05d}" if count > 1 else "" for i in range(count)]
    return [f"{stem}{number}.safetensors" for number in numbers]


def staged_index(variant: str | None, id: str) -> str:
    """The index of staged shards; config.json may name a file only by these last two endings."""
    return f"model-{id}{_dotted(variant)}.safetensors.index.json"


def patterns(variant: str | None = None) -> tuple[str, ...]:
    """Globs for what to download of a repository."""
    dotted = _dotted(variant)
    shard_names = f"model{dotted}-*.safetensors", f"model-*{dotted}.safetensors"
    return single(variant), *dict.fromkeys(shard_names), index(variant)


def _dotted(variant: str | None) -> str:
    return f".{variant}" if variant else ""
