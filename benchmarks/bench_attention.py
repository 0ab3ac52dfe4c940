"""Scaled dot product attention: its matrix products bound it, so its ceiling is the bare products by the best library.

Forward is two products, backward five, of them one that makes the scores again; in causal order half of each counts.
The ceiling is one square product of as many operations a second as a large one reaches.
"""

import torch
import torch.nn.functional as F

import nnfast.nn.functional
from nnfast import reference

from .harness import DIRECTIONS, OURS, Case, Task, bare_products, compiled, function_task

OP = "scaled_dot_product_attention"
MODELS = {  # batch, heads, queries and keys, size of a head
    "tiny": [(1, 2, 8, 8), (2, 4, 32, 16)],
    "odd": [(1, 3, 77, 40)],
    "train_gpt": [(16, 4, 128, 64)],
    "GPT-2": [(1, 12, 512, 64), (4, 12, 1024, 64)],
    "BERT-base": [(8, 12, 128, 64)],
    "ViT-B/16": [(8, 12, 197, 64)],
}
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
PASSES = {"forward": 4, "backward": 8, "both": 12}  # of a tensor of the query's size
SQUARE = 1024


def cases(device: str) -> list[Case]:
    """Only a CPU's: on a GPU this op is torch's."""
    return [
        Case(OP, model, shape, dtype, direction, variant, device)
        for model, shapes in MODELS.items()
        for shape in shapes
        for dtype in ("fp32", "bf16")
        for variant in (("causal", "mask") if model == "GPT-2" else ("full",) if "-" in model else ("causal",))
        for direction in DIRECTIONS
        if device == "cpu"
    ]


def task(case: Case, compile: bool = False) -> Task:
    batch, heads, length, size = case.shape
    make = {"dtype": case.torch_dtype, "device": case.device}
    # Heads within rows, as models have them.
    q, k, v, grad = (torch.randn(batch, length, heads, size, **make).transpose(1, 2) for _ in range(4))
    kwargs = {"is_causal": case.variant == "causal"}
    if case.variant == "mask":  # in causal order too, as transformers gives it
        kwargs["attn_mask"] = torch.ones(length, length, dtype=torch.bool, device=case.device).tril()[None, None]
    functions = {"torch": lambda *t: F.scaled_dot_product_attention(*t, **kwargs)}
    if compile:
        functions["torch.compile"] = compiled(functions["torch"], case.device)
    functions[OURS] = lambda *t: nnfast.nn.functional.scaled_dot_product_attention(*t, **kwargs)
    flops = 2 * batch * heads * length * length * size * PRODUCTS[case.direction]
    flops //= 2 if case.variant == "causal" else 1
    a, b = torch.randn(2, SQUARE, SQUARE, **make)
    return function_task(
        case, functions, lambda *t: reference.scaled_dot_product_attention(*t, **kwargs),
        [t.requires_grad_() for t in (q, k, v)], grad, flops=flops, nbytes=PASSES[case.direction] * q.nbytes,
        ceiling=bare_products(a, b), ceiling_scale=flops / (2 * SQUARE**3), named=("query", "key", "value"),
    )  # fmt: skip


def test_attention(case, race):
    race(case, task)
