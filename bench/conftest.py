"""`pytest bench/`: which cells it runs, and on what."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cells",
        choices=("issue", "all"),
        default="issue",
        help="issue: without the residual's cells, a few minutes; all: every variant",
    )


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"benchmarks: triton and its peers on {torch.cuda.get_device_name()}"
    return f"benchmarks: cpp and its peers on a CPU, {torch.get_num_threads()} threads"
