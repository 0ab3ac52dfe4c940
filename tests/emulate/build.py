"""Compiles the CUDA kernels and their host code for a CPU: ``python tests/emulate/build.py asan|tsan|plain``, into
``build/emulate/<kind>.so``, whose path it prints. What is up to date is left alone."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import compile as cuda  # noqa: E402

SANITIZE = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}


def build(kind: str, source: Path = ROOT / "csrc", out: Path = ROOT / "build/emulate") -> Path:
    """The library, built from ``source`` in the place of ``csrc``."""
    import torch
    from torch.utils.cpp_extension import include_paths

    include = cuda.fetched_toolkit() / "include"
    folder = out / kind
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-g1", f"-I{include}", f"-I{include / 'cccl'}"]
    kernels = sorted(p for p in (source / "cuda").glob("*.cu") if "_sm" not in p.stem)
    jobs = {}
    for path in kernels:
        flags = [*SANITIZE[kind], "-O1", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", "-Wno-attributes"]
        jobs[folder / f"{path.stem}.o"] = [*common, *flags, "-include", str(HERE / "gpu.h"), "-x", "c++", str(path)]
    jobs[folder / "gpu.o"] = [*common, *SANITIZE[kind], "-O2", str(HERE / "gpu.cpp")]
    torchs = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    for name in ("host", "contracts"):
        flags = ["-O0", "-ffunction-sections", f"-I{HERE}", f"-I{source}", *torchs]
        jobs[out / f"{name}.o"] = [*common, *flags, str(HERE / f"{name}.cpp")]
    newest = max(p.stat().st_mtime for p in (*source.glob("*/*.*"), *HERE.glob("**/*.*")) if p.suffix != ".pyc")

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")

    todo = [
        [compiler, *flags, "-c", "-o", str(path)]
        for path, flags in jobs.items()
        if not path.exists() or path.stat().st_mtime < newest
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, reversed(todo)))  # the host code, which takes the longest, first
    library = out / f"{kind}.so"
    if todo or not library.exists():
        run([compiler, "-shared", "-Wl,--gc-sections", *SANITIZE[kind], "-o", str(library), *map(str, jobs),
             f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"])  # fmt: skip
    return library


if __name__ == "__main__":
    print(build(*sys.argv[1:2]))
