"""Cross-entropy: bytes alone bound it.

Forward reads the logits; backward reads them and writes their gradient (a row's numbers are nothing beside it).

linear_cross_entropy, whose shape is (rows, features, classes), is bound by its three products: the logits, and the
gradients of input and weight.
"""

import torch
import torch.nn.functional as F

import nnfast.nn.functional
from nnfast import reference

from .harness import DIRECTIONS, DTYPES, OURS, Case, Task, bare_products, compiled, function_task

OP = "cross_entropy"
MODELS = {
    "tiny": [(32, 10)],
    "ImageNet": [(128, 1000)],
    "many rows": [(262144, 2), (262144, 10), (65536, 21), (131072, 64)],
    "grid": [(4096, 32), (512, 50257), (2048, 50257)],
}
LINEAR = {"tiny": [(32, 16, 10)], "GPT-2 head": [(512, 768, 50257), (2048, 768, 50257)]}
PASSES = {"forward": 1, "backward": 2, "both": 3}  # over a tensor of the logits' size


def cases(device: str) -> list[Case]:
    return [
        Case(OP, model, shape, dtype, direction, device=device)
        for model, shapes in MODELS.items()
        for shape in shapes
        for dtype in DTYPES
        for direction in DIRECTIONS
    ] + [
        Case(OP, model, shape, dtype, "both", "linear_cross_entropy", device)
        for model, shapes in LINEAR.items()
        for shape in shapes
        for dtype in ("fp32", "bf16")
    ]


def linear_task(case: Case, compile: bool) -> Task:
    rows, features, classes = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    x = torch.randn(rows, features, **make).requires_grad_()
    w = (torch.randn(classes, features, **make) * features**-0.5).requires_grad_()
    target = torch.randint(classes, (rows,), device=case.device)
    functions = {"torch": lambda x, w: F.cross_entropy(F.linear(x, w), target)}
    if compile:
        functions["torch.compile"] = compiled(functions["torch"], case.device)
    if hasattr(F, "linear_cross_entropy"):
        functions["torch's own"] = lambda x, w: F.linear_cross_entropy(x, w, target)
    functions[OURS] = lambda x, w: nnfast.nn.functional.linear_cross_entropy(x, w, target)
    return function_task(
        case, functions, lambda x, w: reference.cross_entropy(x @ w.T, target), [x, w], torch.ones((), **make),
        nbytes=2 * (x.nbytes + w.nbytes), flops=6 * rows * features * classes,
        ceiling=bare_products(x, w), ceiling_scale=3,
    )  # fmt: skip


def task(case: Case, compile: bool = False) -> Task:
    if case.variant:
        return linear_task(case, compile)
    rows, classes = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    logits = torch.randn(rows, classes, **make).requires_grad_()
    target = torch.randint(classes, (rows,), device=case.device)
    functions = {"torch": lambda x: F.cross_entropy(x, target)}
    if compile:
        functions["torch.compile"] = compiled(functions["torch"], case.device)
    functions[OURS] = lambda x: nnfast.nn.functional.cross_entropy(x, target)
    nbytes = PASSES[case.direction] * logits.nbytes
    source, copy = logits.detach(), torch.empty_like(logits, requires_grad=False)
    return function_task(
        case, functions, lambda x: reference.cross_entropy(x, target), [logits], torch.ones((), **make),
        nbytes=nbytes, flops=0, ceiling={"copy": lambda: copy.copy_(source)},
        ceiling_scale=nbytes / (2 * source.nbytes),
    )  # fmt: skip


def test_cross_entropy(case, race):
    race(case, task)
