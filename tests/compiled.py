"""Compiles what the launchers launch on a GPU of a given kind, on a machine without one: run by test_triton.py.

    python tests/compiled.py sm_90

Triton's driver is replaced by one that names the GPU, tensors have shapes and no memory, and every launch compiles its
kernel and goes no further. One line of JSON for each tells what came out.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from machine import Machine
from triton.runtime import JITFunction, driver

from nnfast.kernels import adamw, clip_grad, layer_norm, linear_gelu

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

aligned = True  # whether the rows of the tensors at hand are whole multiples of 16 bytes


def describe(name: str, compiled) -> dict:
    said = {
        "name": name, "aligned": aligned,
        "threads": compiled.metadata.num_warps * compiled.metadata.target.warp_size,
        "resident": max(1, layer_norm.WARPS_PER_PROCESSOR // compiled.metadata.num_warps),
        "shared": compiled.metadata.shared,
    }  # fmt: skip
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        vgprs, spills = re.search(r"\.vgpr_count: +(\d+)", code), re.findall(r"gpr_spill_count: +(\d+)", code)
        loads = re.findall(r"(?:global|buffer|flat)_(load|store)_dwordx4", code)
        said.update(registers=int(vgprs[1]), spills=sum(map(int, spills)))
        said.update(wide_loads=loads.count("load"), wide_stores=loads.count("store"))
        return said
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx))
    matrix = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    said.update(registers=used["REG"], spills=used["STACK"] + used["LOCAL"])
    said.update(wide_loads=copies + len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)))
    said.update(wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32", ptx)))
    said.update(matrix=matrix and matrix[0].partition(".")[0], tma="cp.async.bulk.tensor" in ptx)
    return said


def compile_instead(run=JITFunction.run, seen=set()):  # noqa: B006
    def launch(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(json.dumps(describe(self.__name__, compiled)))

    JITFunction.run = launch


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_layer_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = empty(4096, size, dtype=dtype), empty(size, dtype=dtype)
    y, stats = layer_norm.layer_norm_triton(x, [size], weight, weight, 1e-5)
    layer_norm.layer_norm_backward_triton(y, x, [size], stats, weight, weight, [True, True, True])


def launch_linear_gelu(depth: int, cols: int, approximate: str) -> None:
    x, weight, bias = (empty(*s, dtype=torch.bfloat16) for s in ((4096, depth), (cols, depth), (cols,)))
    linear_gelu._tuned.clear()  # so that every tile of the list is tried
    y, pre = linear_gelu.linear_gelu_triton(x, weight, bias, approximate=approximate)
    linear_gelu.gelu_backward_sum_triton(y, pre, approximate=approximate)
    for second in (weight.t(), empty(depth, cols, dtype=torch.bfloat16)):
        linear_gelu._tuned.clear()
        linear_gelu.gelu_linear_backward_triton(x, second, pre, approximate=approximate)


def launch_adamw(dtypes: list[torch.dtype], on_gpu: bool, lr: float = 0.1, beta: float = 0.9, step: int = 1) -> None:
    adamw.on_gpu = lambda t: on_gpu
    lists = [[empty(10000, dtype=dtype) for dtype in dtypes] for _ in range(4)]
    steps, one = [torch.tensor(float(step)) for _ in dtypes], empty(1, dtype=torch.float32)
    options = {"lr": lr, "beta1": beta, "beta2": beta, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
    if on_gpu:
        options.update(tensor_lr=one, grad_scale=one, found_inf=one, clip_coef=one)
    adamw.adamw_triton(*lists, lists[0] if on_gpu else [], [], steps, **options)


def launch_clipping(dtypes: list[torch.dtype], scale: bool) -> None:
    grads, one = [empty(10000, dtype=dtype) for dtype in dtypes], empty(1, dtype=torch.float32)
    _, coef = clip_grad.clip_coef_triton(grads, 1.0, one if scale else None)
    clip_grad.scale_by_triton(grads, coef)


if __name__ == "__main__":
    driver.set_active(Machine(sys.argv[1], processors=132))
    compile_instead()
    for dtype in (torch.bfloat16, torch.float32):
        for size in (64, 256, 1024, 2048, 4096, 8192, 16384, 65536):
            launch_layer_norm(size, dtype)
    for approximate in ("none", "tanh"):
        launch_linear_gelu(768, 3072, approximate)
    launch_adamw([torch.float32], on_gpu=False)
    launch_adamw([torch.float32], on_gpu=False, lr=1.0, beta=0.0, step=16)
    launch_adamw([torch.bfloat16], on_gpu=False)
    launch_adamw([torch.float32, torch.bfloat16, torch.float16], on_gpu=True)
    launch_clipping([torch.float32], False)
    launch_clipping([torch.float32, torch.bfloat16, torch.float16], True)
    aligned = False
    for size in (301, 20001):
        launch_layer_norm(size, torch.bfloat16)
    launch_linear_gelu(77, 301, "none")
