"""Where tests run: Triton kernels compiled on a GPU, else interpreted by the honest interpreter.

The interpreter is chosen when Triton is first imported, so it is chosen here, before anything
else. tests/offline compiles for GPUs that are not there and needs a process without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

_OFFLINE = Path(__file__).parent / "offline"
_state = {"interpreting": False}

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True, max_examples=40)
settings.register_profile("nightly", deadline=None, print_blob=True, max_examples=800)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # several workers share the cores; OpenMP's barriers are slow where threads outnumber them
        torch.set_num_threads(1)
    paths = [Path(str(a).split("::")[0]).resolve() for a in config.args]
    offline = all(p == _OFFLINE or _OFFLINE in p.parents for p in paths)
    if torch.cuda.is_available() or offline:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from support import interpreter

    interpreter.install()
    _state["interpreting"] = True


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"triton: compiled for {torch.cuda.get_device_name()}"
    if _state["interpreting"]:
        return "triton: interpreted; tests/offline needs its own process: pytest tests/offline"
    return "triton: compiled for GPUs that are not here"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if _state["interpreting"] and collection_path == _OFFLINE else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    stats = terminalreporter.stats
    reports = [one for key in ("passed", "failed", "skipped") for one in stats.get(key, ())]
    if any(name == "zoo" for one in reports for name, _ in one.user_properties):
        from support import hf_zoo_coverage

        terminalreporter.section("models of transformers under swathe")
        for line in hf_zoo_coverage.summary(reports):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
