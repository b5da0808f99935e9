"""Which transformers is installed, and is it new enough? Read without importing it."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST = (5, 10)


def version() -> tuple[int, int] | None:
    """(major, minor) of the transformers that is installed, None without one."""
    try:
        text = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None
    major, minor = (int(re.match(r"\d*", part)[0] or 0) for part in f"{text}.0".split(".")[:2])  # type: ignore[index]
    return major, minor


def require() -> None:
    """Raise ImportError, with what to install, unless transformers is OLDEST or newer."""
    found = version()
    if found is None or found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        there = "none is installed" if found is None else f"{found[0]}.{found[1]} is installed"
        raise ImportError(
            f"swathe.hf needs transformers {wanted} or newer; {there}. Use pip install "
            f"'swathe[hf]', or pip install --upgrade 'transformers>={wanted}'. swathe's own models "
            "load, train and generate without it"
        )
