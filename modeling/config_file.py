"""config.json: where it is, and what to say where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swathe.modeling.errors import ConfigError
from swathe.modeling.strict_json import read_object

CONFIG_FILE = "config.json"


def read_config(path: str | Path, subfolder: str = "") -> tuple[Path, dict[str, Any]]:
    """(file, content) of the config.json at `path`, a directory or the file itself."""
    place = Path(path) / subfolder if subfolder else Path(path)
    file = place if place.is_file() else place / CONFIG_FILE
    if not file.exists():
        there = (
            f"it holds {sorted(p.name for p in place.iterdir())[:20]}"
            if place.is_dir()
            else "no such directory"
        )
        raise FileNotFoundError(
            f"no {CONFIG_FILE} at {str(path)!r}: {there}. Needed: a local directory with "
            f"{CONFIG_FILE} and model.safetensors (or its index and shards), as save_pretrained "
            "writes it; download a model from the hub first"
        )
    return file, read_object(file, ConfigError)
