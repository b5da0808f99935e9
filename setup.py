"""The C++ library of csrc/, compiled when the package is built; everything else is in pyproject.toml.

It is no Python module: kernels/core/cpp.py loads it with ctypes. It is compiled with OpenMP but
linked to no OpenMP runtime, so that its symbols bind to the runtime that torch has loaded.
"""

import sys
from glob import glob

from setuptools import Extension, setup

flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
flags.append("-Wno-maybe-uninitialized")  # of the compiler's own intrinsics
link = []
if sys.platform == "darwin":
    link = ["-undefined", "dynamic_lookup"]
else:
    flags.append("-fopenmp")

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
            # without a compiler the package still installs; backend "cpp" then says why it is absent
            optional=True,
        )
    ]
)
