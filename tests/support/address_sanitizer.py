"""csrc/ under GCC's address and undefined-behaviour sanitizers: `make sanitize`.

    python -m support.address_sanitizer        from tests/

Builds the library apart from the installed one, runs part of the contract on it with every
instruction set, and then plants faults in copies of the sources, each of which must be caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "sanitizers"
CXX = os.environ.get("CXX", "g++")
# -O1: at -O0 helpers that must be inlined are slow, -O2 takes three times as long to compile
FLAGS = (
    *("-O1", "-g1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fopenmp", "-Wno-psabi", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
# every op's contract on the widest set, in the type with most conversions on the narrower ones too;
# caches and pages; threads, forks, unaligned rows
CHECK = (
    "tests/ops",
    "-k",
    "cpp and (test_contract or cpp_library or threads or caches or decode)"
    " and not (narrower and (torch.float32 or torch.float16))",
)
SMALLEST = ("tests/ops/test_cpp_ops.py", "-k", "rotary and bfloat16")


class Plant(NamedTuple):
    """A fault: `old` in `header` becomes `new`, which must end the tests with `report`."""

    header: str
    old: str
    new: str
    report: str


# in what rotary.cpp includes, the quickest to compile
PLANTS = (
    Plant(
        "vec.h",
        "std::memcpy(padded, p, count * sizeof(T));",
        "std::memcpy(padded, p, (count + 1) * sizeof(T));",
        "heap-buffer-overflow",
    ),
    Plant(
        "vec.h",
        "  std::memcpy(&half, p, sizeof half);\n",
        "  half = *reinterpret_cast<const vh*>(reinterpret_cast<const char*>(p) + 1);\n",
        "misaligned address",
    ),
)


def why_not() -> str | None:
    """Why sanitizers cannot be used here, or None."""
    try:
        said = subprocess.run([CXX, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"no C++ compiler: {error}; set CXX to GCC's g++"
    if "Free Software Foundation" not in said:
        return f"{CXX} is not GCC, whose sanitizers this is written for; set CXX to g++"
    if not runtime().is_file():
        return f"{CXX} has no libasan.so; install the package that holds it (libasan, libsanitizer)"
    return None


def runtime() -> Path:
    """GCC's library that must be loaded before anything that allocates."""
    found = subprocess.run(
        [CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return Path(found.stdout.strip())


def compiled(sources: Iterable[Path], folder: Path) -> list[Path]:
    """Objects of C++ files, two compilers at a time."""

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([CXX, *FLAGS, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def linked(objects: Iterable[Path], library: Path) -> Path:
    """The library of some objects."""
    command = [CXX, "-shared", "-fsanitize=address,undefined", "-o", str(library)]
    subprocess.run([*command, *map(str, objects)], check=True)
    return library


def tested(library: Path, check: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """pytest with `check` on a library; what sanitizers report is in its stdout."""
    environment = {
        "SWATHE_CSRC": str(library),
        "LD_PRELOAD": str(runtime()),
        # Python itself frees little when it ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # on a busy machine threads that spin for each other take three times as long
        "OMP_WAIT_POLICY": "passive",
    }
    # pytest must leave file descriptors alone, or a report is lost with the process
    options = ("-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:faulthandler")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *check],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def planted(plant: Plant, objects: Iterable[Path], folder: Path) -> Path:
    """A library whose rotary.cpp has the fault."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder)
    text = (folder / plant.header).read_text()
    assert text.count(plant.old) == 1, f"{plant.header} has not one line {plant.old!r}"
    (folder / plant.header).write_text(text.replace(plant.old, plant.new))
    altered = compiled([folder / "rotary.cpp"], folder)
    others = [o for o in objects if o.name != "rotary.o"]
    return linked([*others, *altered], folder / "_csrc.so")


def main() -> int:
    """Build, test, plant; returns the exit status."""
    if reason := why_not():
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    objects = compiled(sorted((ROOT / "csrc").glob("*.cpp")), OUT)
    library = linked(objects, OUT / "_csrc.so")
    run = tested(library, CHECK)
    print(run.stdout, flush=True)
    if run.returncode != 0:
        return 1
    for number, plant in enumerate(PLANTS):
        run = tested(planted(plant, objects, OUT / f"plant{number}"), SMALLEST)
        if run.returncode == 0 or plant.report not in run.stdout:
            print(f"{run.stdout}\nsanitize: the planted {plant.report} was not caught")
            return 1
        print(f"planted {plant.report}: caught", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
