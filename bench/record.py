"""Facts about the machine and the code that a results file carries, and how the file is written."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import swathe
from swathe.kernels import installation
from swathe.kernels.core.cpp import isa, why_unavailable

SCHEMA = 2
ROOT = Path(__file__).parents[1]
_CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
_PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "numpy")
_PACKAGES += ("flash-attn", "flash-attn-3", "flash-attn-4")


def document(op: str, device: str, commit: str | None = None) -> dict[str, Any]:
    """An empty results document: where, with what and of which commit it is."""
    return {
        "schema": SCHEMA,
        "op": op,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or commit_here() or "unknown",
        "device": gpu() if device == "cuda" else cpu(),
        "versions": versions(),
    }


def cpu() -> dict[str, Any]:
    """The CPU: model, cores in use, instruction set that the C++ backend takes.

    `load` is how many processes wanted a core in the minute before: a busy machine's numbers are
    worthless, since two threads that meet at a barrier wait for the scheduler.
    """
    return {
        "kind": "cpu",
        "name": installation.cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "mhz": mhz(),
        "isa": why_unavailable() or isa(),
    }


def gpu() -> dict[str, Any]:
    """The current GPU: name, architecture, multiprocessors, memory and L2."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "kind": "cuda",
        "name": facts.name,
        "arch": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "l2_mib": round(facts.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda or torch.version.hip,
        "clocks": clocks(),
        "host_cpu": installation.cpu_model(),
        "host_cores": os.cpu_count(),
    }


def clocks() -> str:
    """What nvidia-smi says of the card now: clocks, power, temperature; its error without it."""
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return run.stdout.strip()


def mhz() -> list[int] | None:
    """The clock of each core now, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return [round(float(line.partition(":")[2])) for line in lines if line.startswith("cpu MHz")]


def versions() -> dict[str, str]:
    """Versions of what took part; a package that is not installed is left out."""
    return {"swathe": swathe.__version__, **installation.versions(_PACKAGES)}


def commit_here() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None where git cannot tell."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def save(results: dict[str, Any], path: Path) -> None:
    """Write JSON aside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(path)
