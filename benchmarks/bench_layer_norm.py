"""LayerNorm: bytes alone bound it.

Forward reads the input and writes the output; backward reads the input and the gradient and writes the input's
gradient (the statistics, weight, bias and their gradients are of one row or one column: nothing beside them).
"""

import importlib.util
import itertools

import torch
import torch.nn.functional as F

import nnfast.nn.functional
from nnfast import reference

from .harness import DIRECTIONS, DTYPES, MOST_ELEMENTS, OURS, Case, Task, compiled, function_task

OP = "layer_norm"
MODELS = {
    "one row": [(1, 64)],
    "tiny": [(32, 64)],
    "odd": [(7, 33), (1023, 771)],
    "GPT-2 XL": [(1024, 1600)],
    "ViT-B/16": [(32 * 197, 768)],
    "grid": list(itertools.product((512, 4096, 16384), (256, 768, 1024, 4096))),
}
SIZES = (256, 768, 1024, 1600, 2048, 5120, 8192, 16384, 32768)
LARGE = {"grid": [s for s in itertools.product((65536, 4096, 64, 1), SIZES) if s[0] * s[1] <= MOST_ELEMENTS]}
GOALS = ("grid",)  # what a GPU's figures are judged by
PASSES = {"forward": 2, "backward": 3, "both": 5}  # over a tensor of the input's size


def cases(device: str) -> list[Case]:
    models = MODELS if device == "cpu" else MODELS | LARGE
    return [
        Case(OP, model, shape, dtype, direction, device=device)
        for model, shapes in models.items()
        for shape in shapes
        for dtype in DTYPES
        for direction in DIRECTIONS
    ]


def _liger(x, w, b):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, w, b, 1e-5)


def _quack(x, w, b):
    from quack.layernorm import layernorm_fwd  # forward alone, with a float weight

    return layernorm_fwd(x, w.float(), b.float(), 1e-5)


def _apex(x, w, b):
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, w, b, (x.shape[-1],), 1e-5)


PEERS = {"liger_kernel": _liger, "quack": _quack, "apex": _apex}


def _torch(x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w, b)


def task(case: Case, compile: bool = False) -> Task:
    rows, size = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    tensors = [torch.randn(rows, size, **make), torch.rand(size, **make) + 0.5, torch.randn(size, **make)]
    tensors = [t.requires_grad_() for t in tensors]
    functions = {"torch": _torch}
    if compile:
        functions["torch.compile"] = compiled(_torch, case.device)
    if case.device == "cuda":
        functions |= {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(name)}
    functions[OURS] = lambda x, w, b: nnfast.nn.functional.layer_norm(x, (size,), w, b)
    nbytes = PASSES[case.direction] * tensors[0].nbytes
    source, target = tensors[0].detach(), torch.empty_like(tensors[0], requires_grad=False)
    return function_task(
        case, functions, lambda x, w, b: reference.layer_norm(x, (size,), w, b), tensors,
        torch.randn(rows, size, **make), nbytes=nbytes, flops=0,
        ceiling={"copy": lambda: target.copy_(source)}, ceiling_scale=nbytes / (2 * source.nbytes),
    )  # fmt: skip


def test_layer_norm(case, race):
    race(case, task)
