"""`pytest bench/`: which cells it runs, and on what."""

from __future__ import annotations

import pytest
import torch

from bench.cells import CHOICES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cells",
        choices=CHOICES,
        default="quick",
        help="; ".join(f"{name}: {what}" for name, what in CHOICES.items()),
    )
    parser.addoption("--quick", action="store_const", const="quick", dest="cells")


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"benchmarks: triton and its peers on {torch.cuda.get_device_name()}"
    return f"benchmarks: cpp and its peers on a CPU, {torch.get_num_threads()} threads"
