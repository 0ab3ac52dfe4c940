"""Compiles the CUDA kernels and their host code for a CPU, into ``build/emulate/<kind>.so``."""

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
COMPILER = os.environ.get("CXX", "c++")


def commands(kind: str, source: Path, out: Path) -> dict[Path, list[str]]:
    """The objects of the library and how each is made from ``source``, which stands for ``csrc``."""
    from torch.utils.cpp_extension import include_paths

    include = cuda.fetched_toolkit() / "include"
    torchs = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    common = [COMPILER, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-g1"]
    common += [f"-I{HERE}", f"-I{include}", f"-I{include / 'cccl'}", f"-I{source}"]
    found = {}
    for name in ("host", "contracts"):
        found[out / f"{name}.o"] = [*common, *torchs, "-O0", "-ffunction-sections", str(HERE / f"{name}.cpp")]
    for path in sorted((source / "cuda").glob("*.cu")):
        if "_sm" in path.stem:  # CUTLASS's
            continue
        flags = [*SANITIZE[kind], "-O1", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", "-Wno-attributes"]
        found[out / kind / f"{path.stem}.o"] = [*common, *flags, "-include", "gpu.h", "-x", "c++", str(path)]
    # ThreadSanitizer instruments the kernels; of the fibers it knows what gpu.cpp tells it.
    flags = ["-DEMULATE_TSAN"] if kind == "tsan" else SANITIZE[kind]
    found[out / kind / "gpu.o"] = [*common, *flags, "-O2", str(HERE / "gpu.cpp")]
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def compile_and_link(kind: str, todo: dict[Path, list[str]], objects: list[Path], library: Path) -> None:
    import torch

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run([*job[1], "-c", "-o", str(job[0])]), todo.items()))
    torchs = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    options = ["-shared", "-Wl,--gc-sections", *SANITIZE[kind], "-o", str(library)]
    run([COMPILER, *options, *map(str, objects), *torchs])


def build(kind: str) -> Path:
    """The library; objects that are up to date are not compiled again."""
    source, out = ROOT / "csrc", ROOT / "build/emulate"
    (out / kind).mkdir(parents=True, exist_ok=True)
    library = out / f"{kind}.so"
    every = commands(kind, source, out)
    newest = max(p.stat().st_mtime for p in (*source.glob("*/*.*"), *HERE.glob("**/*.*")) if p.suffix != ".pyc")
    todo = {o: c for o, c in every.items() if not o.exists() or o.stat().st_mtime < newest}
    if todo or not library.exists():
        compile_and_link(kind, todo, list(every), library)
    return library
