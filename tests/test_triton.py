"""The Triton kernels, proved without a GPU: interpreted against float64, and compiled for the GPUs they are for."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytest.importorskip("triton", reason="Triton is not installed; it has no wheels for this platform")

# What a program may use: registers of a thread, of a multiprocessor, and shared memory in bytes (CUDA C++ Programming
# Guide, technical specifications by compute capability; AMD's CDNA3 instruction set for gfx942, its matrix registers
# among the 512).
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
REGISTER_FILE = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 131072}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


PRODUCTS = "linear_gelu_fwd_kernel", "gelu_linear_bwd_kernel"


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], env={**os.environ, **env}, capture_output=True, text=True)


def test_interpreted():
    """tests/interpreted.py, in a process whose Triton interprets."""
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "interpreted.py"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """target -> what the launchers launch there and what the compiler says of it; two processes at a time."""

    def kernels(target):
        cache = str(tmp_path_factory.mktemp(target))
        done = run(str(TESTS / "compiled.py"), target, TRITON_CACHE_DIR=cache)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED, pool.map(kernels, SHARED), strict=True))


@pytest.mark.parametrize("target", SHARED)
def test_every_kernel_fits(compiled, target):
    """No spills, and no more registers and shared memory than there are, over the whole tuning list."""
    names = {kernel["name"] for kernel in compiled[target]}
    assert names == {
        "layer_norm_fwd_kernel", "layer_norm_fwd_long_kernel", "layer_norm_bwd_kernel", "layer_norm_bwd_long_kernel",
        "linear_gelu_fwd_kernel", "gelu_bwd_kernel", "gelu_linear_bwd_kernel", "adamw_kernel",
        "adamw_scalars_kernel", "sum_rows_kernel", "norm_kernel", "scale_kernel",
    }  # fmt: skip
    for kernel in compiled[target]:
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] <= REGISTERS[target] and kernel["shared"] <= SHARED[target], kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTER_FILE[target], kernel


@pytest.mark.parametrize("target", SHARED)
def test_a_new_step_compiles_nothing(compiled, target):
    """AdamW: one kernel for each set of dtypes and flags, whatever lr, betas and step."""
    assert [kernel["name"] for kernel in compiled[target]].count("adamw_kernel") == 3


@pytest.mark.parametrize("target", SHARED)
def test_resident_programs_are_resident(compiled, target):
    """A persistent backward starts as many programs as a multiprocessor holds at once, or a second wave would wait."""
    for kernel in compiled[target]:
        if kernel["name"].startswith("layer_norm_bwd"):
            threads = kernel["resident"] * kernel["threads"]
            assert threads * kernel["registers"] <= REGISTER_FILE[target], kernel
            assert kernel["resident"] * kernel["shared"] <= SHARED[target], kernel


@pytest.mark.parametrize("target", SHARED)
def test_16_bytes_at_a_time(compiled, target):
    """Wherever rows are whole multiples of 16 bytes: loads, or copies to shared memory, and stores."""
    for kernel in compiled[target]:
        if kernel["aligned"] and kernel["name"] not in (*PRODUCTS, "adamw_scalars_kernel"):
            assert kernel["wide_loads"] > 0, kernel
            assert kernel["wide_stores"] > 0 or kernel["name"] in ("sum_rows_kernel", "norm_kernel"), kernel


@pytest.mark.parametrize("target, instruction", {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_80": "mma"}.items())
def test_matrix_instructions(compiled, target, instruction):
    """The product runs on the tensor cores as each generation wants it, fed by TMA where there is one."""
    products = [k for k in compiled[target] if k["name"] in PRODUCTS]
    assert {k["name"] for k in products} == {*PRODUCTS} and all(k["matrix"] == instruction for k in products)
    assert {k["tma"] for k in products if k["aligned"]} == {target != "sm_80"}
