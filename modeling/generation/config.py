"""generation_config.json: the special tokens, and whatever else a checkpoint's author put there."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from swathe.modeling.checkpoint import json_object
from swathe.modeling.checkpoint.errors import CheckpointError, CheckpointWarning
from swathe.modeling.checkpoint.files import CONFIG_CAP, read_small, resolve_inside

FILE_NAME = "generation_config.json"


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_tokens(value: Any) -> bool:
    return _is_token(value) or (isinstance(value, list) and all(map(_is_token, value)))


_KNOWN = {"bos_token_id": _is_token, "eos_token_id": _is_tokens, "pad_token_id": _is_token}


@dataclass(kw_only=True)
class GenerationConfig:
    """Special tokens that `generate` uses unless it is given others; `extra` keeps all other keys.

    Sampling options of the file are kept but not applied: `generate` does what its call says.
    """

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self | None:
        """What generation_config.json in `directory` says; None where there is no such file.

        A file that cannot be used is reported with a CheckpointWarning and taken as absent. Absent
        stays absent on saving: an empty file would hide config.json's EOS from transformers.
        """
        directory = Path(directory)
        path = directory / FILE_NAME
        if not path.exists():
            return None
        try:
            data = read_small(resolve_inside(directory, FILE_NAME), CONFIG_CAP, "E_CONFIG")
            found = json_object.parse(
                data, code="E_CONFIG", file=path, expected="a JSON object", constants=True
            )
        except CheckpointError as error:
            _warn(f"{error}. It is ignored; special tokens come from config.json")
            return None
        known = {}
        for name, fits in _KNOWN.items():
            value = found.pop(name, None)
            if value is not None and not fits(value):
                _warn(f"{path}: {name} is {value!r}, not a token id; it is ignored")
            else:
                known[name] = value
        return cls(**known, extra=found)

    def to_json_string(self) -> str:
        """The text of a generation_config.json; keys that are None are left out."""
        own = {name: getattr(self, name) for name in _KNOWN}
        present = {name: value for name, value in own.items() if value is not None}
        return json.dumps(self.extra | present, indent=2, sort_keys=True) + "\n"


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)
