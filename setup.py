"""Builds nnfast._C, the compiled kernels, against the torch that is installed.

pip install --no-build-isolation .                      with native kernels
NNFAST_BACKEND=torch pip install --no-build-isolation . without: every call is then torch's own
"""

import glob
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

WITHOUT = "install without native kernels: NNFAST_BACKEND=torch pip install --no-build-isolation ."


def native():
    """The extension and its build command, or nothing where the user asked for none."""
    if os.environ.get("NNFAST_BACKEND") == "torch":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as e:
        sys.exit(f"nnfast compiles against the torch it will run with, and there is none here ({e}).\n"
                 f"Install torch first and pass --no-build-isolation to pip.")  # fmt: skip
    compiler = get_cxx_compiler()
    if not shutil.which(compiler):
        sys.exit(f"nnfast needs a C++ compiler and found no '{compiler}': install one (Debian: g++), or {WITHOUT}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(f"nnfast needs Python's headers, Python.h: install them (Debian: python3-dev), or {WITHOUT}")

    class Build(BuildExtension):
        """Leaves beside the extension the version of the torch it was built for (nnfast/backend.py reads it)."""

        def run(self):
            super().run()
            for built in self.get_outputs():
                Path(built).with_name("_built_for.txt").write_text(torch.__version__)

        def copy_extensions_to_source(self):  # an editable install
            super().copy_extensions_to_source()
            Path("nnfast", "_built_for.txt").write_text(torch.__version__)

    extension = CppExtension(
        "nnfast._C",
        sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")),
        # OpenMP's runtime is torch's own, found at load time: linking another would bring a second pool of threads.
        extra_compile_args=["-O3", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wno-maybe-uninitialized"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=["nnfast", "nnfast.nn", "nnfast.optim", "nnfast.kernels", "nnfast.benchmarks"],
    package_dir={"nnfast": "nnfast", "nnfast.kernels": "kernels", "nnfast.benchmarks": "benchmarks"},
    package_data={"nnfast": ["py.typed"]},
    **native(),
)
