"""The house: every op has its stem in every layer, so that one `git ls-files '*layer_norm*'` shows its whole room."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from common import rows_of_tables

ROOT = Path(__file__).parents[1]

# What an op must have, by its stem.
ROOMS = ["csrc/ops/{}.cpp", "csrc/cpu/{}.cpp", "csrc/cpu/{}.h", "csrc/cuda/{}.cpp", "csrc/cuda/{}.cu"]
ROOMS += ["kernels/{}.py", "tests/test_{}.py", "benchmarks/bench_{}.py"]
# How many rows of the contract each letter has.
ROWS = (("L", 11), ("G", 7), ("A", 11), ("C", 2), ("N", 2), ("E", 1), ("O", 3), ("S", 2), ("X", 3), ("K", 3))

# The arithmetic of these is torch's, and only where their results lie is ours.
MEMORY_ALONE = {"embedding"}
# On a GPU the calls of these ops are torch's; and of these, where there are no CUDA kernels but Triton's.
CPU_ONLY = {"attention", "cross_entropy", "linear"} | MEMORY_ALONE
NO_TRITON = CPU_ONLY | {"rmsprop", "sgd"}
# What optimizers share is one file.
ELSEWHERE = {f"tests/test_{stem}.py": "tests/test_optimizers.py" for stem in ("rmsprop", "sgd")}
ELSEWHERE |= {f"benchmarks/bench_{s}.py": "benchmarks/bench_optimizers.py" for s in ("clip_grad", "rmsprop", "sgd")}

# Of csrc/cpu, what the kernels share.
SHARED = "simd", "attention_backward", "tiles", "gemm", "elementary", "kernels", "isa", "optimizer"


def stems():
    return sorted(p.stem for p in (ROOT / "csrc/ops").glob("*.cpp") if p.stem not in ("op", "optimizer"))


def test_the_ops():
    assert set(stems()) == {"adamw", "clip_grad", "layer_norm", "linear_gelu"} | NO_TRITON


@pytest.mark.parametrize("stem", stems())
@pytest.mark.parametrize("room", ROOMS)
def test_every_layer_has_every_op(stem, room):
    torchs = CPU_ONLY if room.startswith("csrc/cuda") else NO_TRITON if room.startswith("kernels") else ()
    if room.startswith(("csrc/cpu", "benchmarks")):
        torchs = MEMORY_ALONE
    path = room.format(stem)
    assert (ROOT / ELSEWHERE.get(path, path)).is_file() != (stem in torchs)


def test_nothing_without_a_contract():
    """No kernel of an op that has no schema."""
    for path in (ROOT / "kernels").glob("*.*"):
        assert path.stem in {*stems(), "__init__", "shared"}, path
    for path in (ROOT / "csrc/cuda").glob("*.c*"):
        assert (
            path.name in ("device.cuh", "optimizer.cuh")
            or path.stem.removesuffix("_sm90a").removesuffix("_backward") in stems()
        ), path


def test_no_torch_in_kernel_files():
    """Torch's headers cost seconds a file, and its inline functions must not be compiled for AVX-512."""
    kernels = [*(ROOT / "csrc/math").glob("*.h"), *(ROOT / "csrc/cpu").glob("avx*.cpp")]
    kernels += [*(ROOT / "csrc/cuda").glob("*.cu*"), ROOT / "csrc/cuda/kernels.h"]
    kernels += [ROOT / "csrc/cpu" / f"{name}.h" for name in (*stems(), *SHARED) if name not in MEMORY_ALONE]
    for path in kernels:
        includes = re.findall(r'#include [<"](.+?)[>"]', path.read_text())
        assert not [i for i in includes if i.startswith(("ATen", "torch", "c10"))], path


@pytest.fixture(scope="module")
def kernel_objects(tmp_path_factory):
    """The objects of the instruction sets, as they were built or as setup.py would build them, by instruction set."""
    sources = sorted((ROOT / "csrc/cpu").glob("avx*.cpp"))
    built = {s.stem: max(ROOT.glob(f"build/temp*/csrc/cpu/{s.stem}.o"), default=None) for s in sources}
    if not all(built.values()):
        if not (compiler := shutil.which("c++")):
            pytest.skip("no C++ compiler here, and no objects from a build")
        folder = tmp_path_factory.mktemp("objects")
        for source in sources:
            built[source.stem] = folder / f"{source.stem}.o"
            flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"]
            subprocess.run([compiler, *flags, "-c", source, "-o", built[source.stem]], check=True)
    return built


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("nm"), reason="nm lists an x86-64 object here")
def test_no_function_leaks_from_an_instruction_set(kernel_objects):
    """A shared inline function compiled for AVX-512 could be the copy that the linker keeps for every CPU."""
    assert len(kernel_objects) == 3
    for name, path in kernel_objects.items():
        listed = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        functions = re.findall(r"^\w+ [TWuV] (.+)$", listed, re.MULTILINE)
        assert functions, path
        assert not [f for f in functions if f"nnfast::{name}::" not in f and not f.startswith("DW.ref.")], path


def test_every_row_of_the_contract_has_its_tests():
    """The map in README.md is whole, and every test that it names is there."""
    rows = [*rows_of_tables()]
    mapped = {row for _, first, _ in rows for row in re.findall(r"\b[LGACNEOSXK]\d+\b", first)}
    assert mapped == {f"{op}{i}" for op, count in ROWS for i in range(1, count + 1)}
    for _, first, tests in rows:
        assert tests, f"no test of: {first}"
        for file, test in tests:
            text = (ROOT / "tests" / file).read_text()
            assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), f"{file}::{test}"
