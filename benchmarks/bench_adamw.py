"""AdamW: bytes bound it. A step reads parameter, gradient and two moments and writes all but the gradient."""

import importlib.util

import torch

import nnfast.optim
from nnfast import reference

from .harness import OURS, Case, Task

OP = "adamw"
PASSES = 7
OPTIONS = {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8}


def _gpt2(layers: int, width: int) -> list[tuple[int, ...]]:
    block = [(width,)] * 4 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


def _vit(layers: int, width: int) -> list[tuple[int, ...]]:
    block = _gpt2(1, width)[2:-2]
    return [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,), *block * layers, (1000, width), (1000,)]


def _llama(layers: int, width: int, hidden: int) -> list[tuple[int, ...]]:
    block = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden), (width,), (width,)]
    return [(32000, width), *block * layers, (width,), (32000, width)]


MODELS = {  # the shapes of a model's own tensors
    "6 tiny": [(64,)] * 6,
    "100 tiny": [(16,)] * 100,
    "odd": [(), (1,), (17,), (3, 5, 7), (1023,), (0, 3), (33, 65)],
    "1000 of 64x64": [(64, 64)] * 1000,
    "ViT-B/16": _vit(12, 768),
    "25M": [(4096, 3072)] * 2 + [(64,)],
    "GPT-2": _gpt2(12, 768),
}
LARGE = {
    "10000 of 64": [(64,)] * 10000,
    "1000 of 1024": [(1024,)] * 1000,
    "10 of 16.8M": [(4096, 4096)] * 10,
    "GPT-2 XL": _gpt2(48, 1600),
    "Llama-7B, 8 layers": _llama(8, 4096, 11008),
}


GOALS = ("10000 of 64", "10 of 16.8M", "GPT-2")  # what a GPU's figures are judged by


def models(device: str) -> dict:
    return MODELS if device == "cpu" else MODELS | LARGE


def total(shapes: list) -> tuple[int, int]:
    """How many tensors and how many elements."""
    return len(shapes), sum(torch.Size(s).numel() for s in shapes)


def cases(device: str) -> list[Case]:
    return [
        Case(OP, model, total(shapes), dtype, "step", device=device)
        for model, shapes in models(device).items()
        for dtype in ("fp32", "bf16")
    ]


def _apex(params, **options):
    from apex.optimizers import FusedAdam

    return FusedAdam(params, adam_w_mode=True, **options)


CHECKED = 3  # steps, of the tensors below a million elements


def _exact(start: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    exact = []
    for p, g in zip(start, grads, strict=True):
        p, g, m, v = p.double(), g.double(), torch.zeros_like(g, dtype=torch.double), torch.zeros_like(g).double()
        for step in range(1, CHECKED + 1):
            p, m, v, _ = reference.adamw(p, g, m, v, None, step, beta1=0.9, beta2=0.999, **OPTIONS)
        exact.append(p)
    return exact


def task(case: Case, compile: bool = False) -> Task:
    """``compile`` changes nothing: compiling a step takes minutes for a model's tensors."""
    AdamW = torch.optim.AdamW
    providers = {
        "torch": AdamW,
        "torch foreach": lambda params, **o: AdamW(params, foreach=True, **o),
        "torch fused": lambda params, **o: AdamW(params, fused=True, **o),
    }
    if case.device == "cuda" and importlib.util.find_spec("apex"):
        providers["apex"] = _apex
    providers[OURS] = nnfast.optim.AdamW
    # torch refuses to capture the step of an optimizer that is not capturable.
    options = OPTIONS | ({"capturable": True} if case.graph and case.device == "cuda" else {})
    providers = {name: (lambda params, build=build: build(params, **options)) for name, build in providers.items()}
    return step_task(case, providers, _exact, PASSES)


def step_task(case: Case, providers: dict, exact, passes: int) -> Task:
    """A step of all tensors of ``case.model``.

    Args:
        providers: name to a function of the parameters, which gives an object with ``step()`` and ``state``.
        exact: of parameters and their gradients: the parameters in float64 after ``CHECKED`` steps.
        passes: how often the bytes of the parameters are read or written.
    """
    shapes = models(case.device).get(case.model) or [case.shape]
    make = {"dtype": case.torch_dtype, "device": case.device}
    start, grads = ([torch.randn(s, **make) for s in shapes] for _ in range(2))
    params, shared = [p.clone().requires_grad_() for p in start], {}
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    small = [i for i, p in enumerate(start) if p.numel() < 1_000_000][:100]

    def stepper(build):
        """A step of all tensors. Providers share them and their state, for where memory lies can cost a tenth."""
        checked = [start[i].clone().requires_grad_() for i in small]
        for p, i in zip(checked, small, strict=True):
            p.grad = grads[i]
        optimizer = build(checked)
        for _ in range(CHECKED):
            optimizer.step()
        optimizer = build(params)
        optimizer.step()
        for p in params:
            for name, value in optimizer.state[p].items():
                if name != "step":
                    optimizer.state[p][name] = shared.setdefault((p, name), value)
        found = [p.detach() for p in checked]

        def step():
            optimizer.step()
            return found

        return step

    source = torch.cat([p.flatten() for p in start])
    target = torch.empty_like(source)
    return Task(
        {name: stepper(build) for name, build in providers.items()},
        exact([start[i] for i in small], [grads[i] for i in small]), nbytes=passes * source.nbytes, flops=0,
        ceiling={"copy": lambda: target.copy_(source)}, ceiling_scale=passes / 2, names=("parameters",),
    )  # fmt: skip


def test_adamw(case, race):
    race(case, task)
