"""Linear+GELU: the matrix products bound it, so its ceiling is the bare product by the best library at hand.

Forward is one product, backward two; GELU and its derivative are to cost nothing beside them. A shape of one number
is GELU alone, which bytes bound: forward reads and writes, backward reads the input and the gradient and writes. On a
GPU also the MLP, Linear, GELU and a Linear back to the size of the input: its backward has the GELU in an epilogue.
"""

import dataclasses

import torch
import torch.nn.functional as F

import nnfast.nn
import nnfast.nn.functional
from nnfast import reference

from .harness import DIRECTIONS, MOST_ELEMENTS, OURS, Case, Task, bare_products, compiled, function_task

OP = "linear_gelu"
MODELS = {  # tokens, in_features, out_features
    "tiny": [(1, 8, 8), (32, 64, 256)],
    "odd": [(7, 33, 65)],
    "small": [(128, 256, 1024)],
    "BERT-base": [(4096, 768, 3072)],
    "BERT-large": [(1024, 1024, 4096)],
    "GPT-2 XL": [(512, 1600, 6400)],
    "ViT-B/16": [(8 * 197, 768, 3072)],
    "GELU alone": [(1000,), (1 << 20,), (1 << 22,)],
}
LARGE = {
    "transformer": [
        (tokens, *layer)
        for tokens in (1024, 8192, 65536)
        for layer in ((768, 3072), (1600, 6400), (2048, 8192), (4096, 16384), (5120, 20480), (8192, 32768))
        if tokens * layer[1] <= MOST_ELEMENTS
    ]
}
GOALS = ("transformer",)  # what a GPU's figures are judged by
MODULES = ("tiny", "BERT-base", "BERT-large")
PRODUCTS = {"forward": 1, "backward": 2, "both": 3}
PASSES = {"forward": 2, "backward": 3, "both": 5}  # of GELU alone


def cases(device: str) -> list[Case]:
    models = MODELS if device == "cpu" else MODELS | LARGE
    functions = [
        Case(OP, model, shape, dtype, direction, approximate, device)
        for model, shapes in models.items()
        for shape in shapes
        for dtype in ("fp32", "bf16")
        for approximate in ("none", "tanh")
        for direction in DIRECTIONS
    ]
    # The same through modules.
    some = [case for case in functions if case.model in MODULES and case.direction != "backward"]
    mlps = [case for case in functions if case.model in GOALS]
    return [
        *functions,
        *(dataclasses.replace(case, variant=f"{case.variant} Sequential") for case in some),
        *(dataclasses.replace(case, variant=f"{case.variant} MLP") for case in mlps),
    ]


def _gelu_task(case: Case, compile: bool) -> Task:
    x, grad, target = (torch.randn(case.shape, dtype=case.torch_dtype, device=case.device) for _ in range(3))
    nbytes = PASSES[case.direction] * x.nbytes
    functions = {"torch": lambda x: F.gelu(x, approximate=case.variant)}
    if compile:
        functions["torch.compile"] = compiled(functions["torch"], case.device)
    functions[OURS] = lambda x: nnfast.nn.functional.gelu(x, approximate=case.variant)
    return function_task(
        case, functions, lambda x: reference.gelu(x, case.variant), [x.clone().requires_grad_()], grad, nbytes=nbytes,
        flops=0, ceiling={"copy": lambda: target.copy_(x)}, ceiling_scale=nbytes / (2 * x.nbytes),
    )  # fmt: skip


def _sequential(nn, case: Case):
    """The modules, whose own parameters are replaced by the case's at the first call."""
    linear = nn.Linear(*case.shape[1:], device=case.device, dtype=case.torch_dtype)
    module = nn.Sequential(linear, nn.GELU(_approximate(case)))

    def call(x, w, b):
        if linear.weight is not w:
            linear.weight, linear.bias = w, b
        return module(x)

    return call


def _approximate(case: Case) -> str:
    return case.variant.split()[0]


def _mlp_task(case: Case, compile: bool) -> Task:
    tokens, size, hidden = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    x, grad = (torch.randn(tokens, size, **make) for _ in range(2))
    w, v = torch.randn(hidden, size, **make) * size**-0.5, torch.randn(size, hidden, **make) * hidden**-0.5
    b, c, h = torch.randn(hidden, **make), torch.randn(size, **make), torch.randn(tokens, hidden, **make)
    approximate = _approximate(case)

    def mlp(F):
        return lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b), approximate=approximate), v, c)

    functions = {"torch": mlp(F)}
    if compile:
        functions["torch.compile"] = compiled(functions["torch"], case.device)
    functions[OURS] = mlp(nnfast.nn.functional)
    forward = (lambda: torch.mm(x, w.t()), lambda: torch.mm(h, v.t()))
    backward = tuple(lambda a=a, b=b: torch.mm(a, b) for a, b in ((grad, v), (grad.t(), h), (h, w), (h.t(), x)))
    bare = {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]
    return function_task(
        case, functions, lambda x, w, b, v, c: reference.linear_gelu(x, w, b, approximate) @ v.T + c,
        [t.clone().requires_grad_() for t in (x, w, b, v, c)], grad, flops=2 * tokens * size * hidden * len(bare),
        nbytes=len(bare) * x.element_size() * (tokens * size + size * hidden + tokens * hidden),
        ceiling={"products": lambda: [product() for product in bare]}, ceiling_scale=1,
        named=("input", "weight", "bias", "second weight", "second bias"),
    )  # fmt: skip


def task(case: Case, compile: bool = False) -> Task:
    if len(case.shape) == 1:
        return _gelu_task(case, compile)
    if case.variant.endswith("MLP"):
        return _mlp_task(case, compile)
    tokens, size_in, size_out = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    x = torch.randn(tokens, size_in, **make).requires_grad_()
    w = torch.nn.Parameter(torch.randn(size_out, size_in, **make) * size_in**-0.5)
    b = torch.nn.Parameter(torch.randn(size_out, **make))
    approximate = _approximate(case)
    if case.variant.endswith("Sequential"):
        functions = {"torch": _sequential(torch.nn, case), OURS: _sequential(nnfast.nn, case)}
    else:
        functions = {
            "torch": lambda x, w, b: F.gelu(F.linear(x, w, b), approximate=approximate),
            OURS: lambda x, w, b: nnfast.nn.functional.linear_gelu(x, w, b, approximate),
        }
    if compile:
        functions["torch.compile"] = compiled(functions["torch"], case.device)
    # One op of torch's own, though it has no gradient: on a GPU, with tanh.
    if (case.direction, case.device, case.variant) == ("forward", "cuda", "tanh"):
        functions["torch._addmm_activation"] = lambda x, w, b: torch._addmm_activation(
            b.detach(), x.detach(), w.detach().t(), use_gelu=True
        )
    grad, products = torch.randn(tokens, size_out, **make), PRODUCTS[case.direction]
    ceiling, scale = bare_products(x, w), products
    if case.device == "cuda":  # the backward's own products: their operands lie otherwise
        plain_x, plain_w = x.detach(), w.detach()
        backward = (lambda: torch.mm(grad, plain_w), lambda: torch.mm(grad.t(), plain_x))
        bare = {"forward": (ceiling["product"],), "backward": backward, "both": (ceiling["product"], *backward)}
        ceiling, scale = {"products": lambda: [product() for product in bare[case.direction]]}, 1
    return function_task(
        case, functions, lambda x, w, b: reference.linear_gelu(x, w, b, approximate), [x, w, b],
        grad, flops=2 * tokens * size_in * size_out * products,
        nbytes=products * x.element_size() * (tokens * size_in + size_in * size_out + tokens * size_out),
        ceiling=ceiling, ceiling_scale=scale,
    )  # fmt: skip


def test_linear_gelu(case, race):
    race(case, task)
