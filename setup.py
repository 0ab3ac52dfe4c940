"""Builds nnfast._C, the compiled kernels, against the torch that is installed.

pip install --no-build-isolation .                      with native kernels
NNFAST_BACKEND=torch pip install --no-build-isolation . without: every call is then torch's own

Where that torch is one for CUDA and a CUDA toolkit is there, the CUDA kernels are built too, for the architectures that
csrc/cuda/compile.py lists or those of NNFAST_CUDA_ARCH, like "90a" or "80;90a".
"""

import glob
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "csrc/cuda"))
import compile as cuda  # noqa: E402

WITHOUT = "install without native kernels: NNFAST_BACKEND=torch pip install --no-build-isolation ."


def cuda_toolkit(torch):
    """The toolkit to build the CUDA kernels with, or None where they are not built."""
    asked = "NNFAST_CUDA_ARCH" in os.environ
    if torch.version.cuda is None:
        if asked:
            sys.exit(f"NNFAST_CUDA_ARCH is set, and torch {torch.__version__} was built without CUDA")
        return None
    root = cuda.toolkit()
    if root is None:
        said = f"no CUDA toolkit (CUDA_HOME, nvcc): torch {torch.__version__} wants CUDA {torch.version.cuda}"
        if asked:
            sys.exit(f"NNFAST_CUDA_ARCH is set, and there is {said}")
        print(f"nnfast: {said}; building without CUDA kernels", file=sys.stderr)
        return None
    if cuda.release(root).split(".")[0] != torch.version.cuda.split(".")[0]:
        sys.exit(f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, and the toolkit at {root} is "
                 f"{cuda.release(root)}: set CUDA_HOME to one of the same major version")  # fmt: skip
    if "90a" in cuda.archs() and cuda.cutlass() is None:
        sys.exit(f"nnfast's kernels for sm_90a need CUTLASS's headers: pip install --no-deps {cuda.CUTLASS}")
    return root


def native():
    """The extension and its build command, or nothing where the user asked for none."""
    if os.environ.get("NNFAST_BACKEND") == "torch":
        return {}
    try:
        import torch
    except ImportError as e:
        sys.exit(f"nnfast compiles against the torch it will run with, and there is none here ({e}).\n"
                 f"Install torch first and pass --no-build-isolation to pip.")  # fmt: skip
    toolkit = cuda_toolkit(torch)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # read by torch when its build commands are imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

    compiler = get_cxx_compiler()
    if not shutil.which(compiler):
        sys.exit(f"nnfast needs a C++ compiler and found no '{compiler}': install one (Debian: g++), or {WITHOUT}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(f"nnfast needs Python's headers, Python.h: install them (Debian: python3-dev), or {WITHOUT}")

    class Build(BuildExtension):
        """Compiles the CUDA kernels, and leaves beside the extension the version of the torch it was built for
        (nnfast/backend.py reads it)."""

        def build_extensions(self):
            if toolkit:
                out = Path(self.build_temp, "csrc/cuda")
                out.mkdir(parents=True, exist_ok=True)
                # <op>.cpp is there as well, and becomes <op>.o
                objects = {source: out / f"{source.name}.o" for source in cuda.sources(cuda.archs())}
                newest = max(Path(f).stat().st_mtime for f in glob.glob("csrc/cuda/*.*") + glob.glob("csrc/math/*.h"))
                jobs = {
                    source: cuda.command(toolkit, source, each, objects[source], ptx=True)
                    for source, each in cuda.sources(cuda.archs()).items()
                    if not objects[source].exists() or objects[source].stat().st_mtime < newest
                }
                for source, done, seconds in cuda.run_all(jobs, int(os.environ.get("MAX_JOBS") or os.cpu_count())):
                    if done.returncode:
                        sys.exit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
                    print(f"nvcc: {source.name} for {', '.join(cuda.archs())}, {seconds:.0f} s")
                self.extensions[0].extra_objects += map(str, objects.values())
            super().build_extensions()

        def run(self):
            super().run()
            for built in self.get_outputs():
                Path(built).with_name("_built_for.txt").write_text(torch.__version__)

        def copy_extensions_to_source(self):  # an editable install
            super().copy_extensions_to_source()
            Path("nnfast", "_built_for.txt").write_text(torch.__version__)

    rooms = ["ops", "gate", "cpu"] + ["cuda"] * bool(toolkit)
    sources = [source for room in rooms for source in glob.glob(f"csrc/{room}/*.cpp")]
    extension = (CUDAExtension if toolkit else CppExtension)(
        "nnfast._C",
        sorted(sources),
        define_macros=[("NNFAST_SM90A", None)] if toolkit and "90a" in cuda.archs() else [],
        # OpenMP's runtime is torch's own, found at load time: linking another would bring a second pool of threads.
        extra_compile_args=["-O3", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wno-maybe-uninitialized"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=["nnfast", "nnfast.nn", "nnfast.nn.utils", "nnfast.optim", "nnfast.kernels", "nnfast.benchmarks"],
    package_dir={"nnfast": "nnfast", "nnfast.kernels": "kernels", "nnfast.benchmarks": "benchmarks"},
    package_data={"nnfast": ["py.typed"]},
    **native(),
)
