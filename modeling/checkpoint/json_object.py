"""JSON where a repeated key, NaN or absurd nesting is an error instead of a silent choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from swathe.modeling.checkpoint.errors import CheckpointError


def parse(
    data: bytes, *, code: str, file: Path, expected: str, constants: bool = False
) -> dict[str, Any]:
    """The JSON object in `data`; anything else is a CheckpointError with `code`, naming `file`.

    `constants` admits bare NaN and Infinity, which old config files hold.
    """

    def refuse(reason: str, key: str | None = None) -> NoReturn:
        raise CheckpointError(code, f"{file}: {reason}; expected {expected}", file=file, key=key)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    refuse(f"key {key!r} appears twice", key)
                seen.add(key)
        return found

    def constant(name: str) -> float:
        return float(name) if constants else refuse(f"{name} is not JSON")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=constant)
    except CheckpointError:
        raise
    except RecursionError:
        refuse("nested too deeply")
    except ValueError as error:
        refuse(f"not valid JSON ({error})")
    if not isinstance(value, dict):
        refuse(f"holds a JSON {type(value).__name__}")
    return value
