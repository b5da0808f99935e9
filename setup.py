"""The C++ library of csrc/, compiled when the package is built; all else is in pyproject.toml.

It is no Python module: kernels/core/cpp.py loads it with ctypes. It is compiled with GNU OpenMP but
linked to no OpenMP runtime, so that its symbols bind to the runtime that torch has loaded. Other
compilers call another runtime than torch's wheels carry; their build works on one thread.
"""

import os
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup


def compiler_is_gcc() -> bool:
    """Whether the compiler that setuptools will call says that it is GCC."""
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    return "Free Software Foundation" in said


flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
link = []
if compiler_is_gcc():
    # the others are about the compiler's own intrinsics
    flags += ["-fopenmp", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
if sys.platform == "darwin":
    link = ["-undefined", "dynamic_lookup"]

setup(
    ext_modules=[
        Extension(
            "swathe._csrc",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc"],
            language="c++",
            extra_compile_args=flags,
            extra_link_args=link,
            # without a compiler the package installs all the same, and "cpp" says why it is absent
            optional=True,
        )
    ]
)
