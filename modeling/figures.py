"""Numbers as people read them: 134.5M parameters, 268.9 MB."""

from __future__ import annotations

_COUNTS = ("", "K", "M", "B", "T")
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def count_in_words(count: int) -> str:
    """Three digits or more and a decimal unit: 134.5M, 7.24B."""
    return _scaled(count, _COUNTS, "")


def bytes_in_words(size: int) -> str:
    """Three digits or more and a decimal unit, as in max_memory: 268.9 MB."""
    return _scaled(size, _BYTES, " ")


def _scaled(value: int, units: tuple[str, ...], space: str) -> str:
    step, scaled = 0, float(value)
    while scaled >= 999.5 and step < len(units) - 1:
        step, scaled = step + 1, scaled / 1000
    digits = 0 if step == 0 else 2 if scaled < 9.995 else 1
    return f"{scaled:.{digits}f}{space}{units[step]}"
