"""JSON files read strictly and written whole: duplicate keys, deep nesting, torn writes.

Infinity and NaN are stored as HF stores them, `{"__float__": "Infinity"}`, because bare they are
not JSON.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class JsonRefused(ValueError):
    """Why a text is not the JSON object that was wanted; `key` is the key at fault, if one is."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.key = key


def parse(text: str | bytes, *, constants: bool = True) -> dict[str, Any]:
    """The JSON object in `text`; JsonRefused for anything else, repeated keys and deep nesting.

    `constants` admits bare NaN and Infinity, which old configuration files hold.
    """

    def constant(name: str) -> float:
        if not constants:
            raise JsonRefused(f"{name} is not JSON")
        return _FLOATS[name]

    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except JsonRefused:
        raise
    except RecursionError:
        raise JsonRefused(f"nested too deeply; expected at most {MAX_DEPTH} levels") from None
    except ValueError as problem:
        raise JsonRefused(f"not valid JSON ({problem})") from None
    if not isinstance(value, dict):
        raise JsonRefused(f"expected a JSON object, got a {type(value).__name__}")
    if _depth(value) > MAX_DEPTH:
        raise JsonRefused(f"nested too deeply; expected at most {MAX_DEPTH} levels")
    return value


def read_object(file: Path, error: type[ValueError]) -> dict[str, Any]:
    """The JSON object in `file`; raises `error` naming the file for anything else."""
    size = file.stat().st_size
    if not file.is_file() or size > MAX_BYTES:
        raise error(f"{file}: expected a regular file of at most {MAX_BYTES} bytes, got {size}")
    try:
        return parse(file.read_bytes())
    except JsonRefused as problem:
        raise error(f"{file}: {problem}; correct or download the file again") from None


def dumps(value: dict[str, Any]) -> str:
    """JSON text as HF writes it: sorted, indented by two, with a final newline."""
    return json.dumps(_encoded(value), indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write aside, then rename: readers see the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    aside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _unique(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonRefused(f"key {twice!r} appears twice", twice)
    if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
        return _FLOATS[value["__float__"]]
    return value


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        children = (
            item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        )
        stack.extend((child, depth + 1) for child in children)
    return deepest


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _encoded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {
            "__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        }
    return value
