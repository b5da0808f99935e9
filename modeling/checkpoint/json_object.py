"""A checkpoint's JSON: what strict_json refuses, as an error with the file's code and name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swathe.modeling import strict_json
from swathe.modeling.checkpoint.errors import CheckpointError


def parse(
    data: bytes, *, code: str, file: Path, expected: str, constants: bool = False
) -> dict[str, Any]:
    """The JSON object in `data`; anything else is a CheckpointError with `code`, naming `file`.

    `constants` admits bare NaN and Infinity, which old config files hold.
    """
    try:
        return strict_json.parse(data, constants=constants)
    except strict_json.JsonRefused as refused:
        message = f"{file}: {refused}; expected {expected}"
        raise CheckpointError(code, message, file=file, key=refused.key) from None
