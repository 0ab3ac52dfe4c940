"""Linear: three products, bound by the bare product of the best library at hand.

Forward is one product, backward two; the bias and its gradient are to cost nothing beside them.
"""

import torch
import torch.nn.functional as F

import nnfast.nn.functional

from .harness import DIRECTIONS, OURS, Case, Task, bare_products, compiled, function_task

OP = "linear"
MODELS = {  # tokens, in_features, out_features
    "tiny": [(1, 8, 8), (32, 64, 64)],
    "odd": [(7, 33, 65), (301, 255, 257)],
    "train_gpt": [(2048, 256, 256), (2048, 256, 768), (2048, 256, 1024), (2048, 1024, 256)],
    "GPT-2": [(512, 768, 768), (512, 768, 2304), (512, 768, 3072), (1024, 3072, 768)],
    "GPT-2 head": [(512, 768, 50257)],
    "BERT-base": [(1024, 768, 768), (1024, 768, 3072)],
    "ViT-B/16": [(8 * 197, 768, 768), (8 * 197, 3072, 768)],
}
PRODUCTS = {"forward": 1, "backward": 2, "both": 3}


def cases(device: str) -> list[Case]:
    return [
        Case(OP, model, shape, dtype, direction, "no bias" if model.endswith("head") else "", device)
        for model, shapes in MODELS.items()
        for shape in shapes
        for dtype in ("fp32", "bf16")
        for direction in DIRECTIONS
    ]


def task(case: Case, compile: bool = False) -> Task:
    tokens, size_in, size_out = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    x = torch.randn(tokens, size_in, **make).requires_grad_()
    w = torch.nn.Parameter(torch.randn(size_out, size_in, **make) * size_in**-0.5)
    b = [] if case.variant == "no bias" else [torch.nn.Parameter(torch.randn(size_out, **make))]
    functions = {"torch": F.linear}
    if compile:
        functions["torch.compile"] = compiled(F.linear, case.device)
    functions[OURS] = nnfast.nn.functional.linear
    products = PRODUCTS[case.direction]
    return function_task(
        case, functions, F.linear, [x, w, *b], torch.randn(tokens, size_out, **make),
        flops=2 * tokens * size_in * size_out * products,
        nbytes=products * x.element_size() * (tokens * size_in + size_in * size_out + tokens * size_out),
        ceiling=bare_products(x, w), ceiling_scale=products,
    )  # fmt: skip


def test_linear(case, race):
    race(case, task)
