"""Cross-entropy: bytes alone bound it.

Forward reads the logits; backward reads them and writes their gradient (a row's numbers are nothing beside it).
"""

import torch
import torch.nn.functional as F

import nnfast.nn.functional
from nnfast import reference

from .harness import DIRECTIONS, DTYPES, OURS, Case, Task, compiled, function_task

OP = "cross_entropy"
MODELS = {
    "tiny": [(32, 10)],
    "ImageNet": [(128, 1000)],
    "grid": [(4096, 32), (512, 50257), (2048, 50257)],
}
PASSES = {"forward": 1, "backward": 2, "both": 3}  # over a tensor of the logits' size


def cases(device: str) -> list[Case]:
    return [
        Case(OP, model, shape, dtype, direction, device=device)
        for model, shapes in MODELS.items()
        for shape in shapes
        for dtype in DTYPES
        for direction in DIRECTIONS
    ]


def task(case: Case, compile: bool = False) -> Task:
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
