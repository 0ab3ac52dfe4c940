"""Adam, SGD, RMSprop, and a clipped step: bytes bound them all.

Per parameter, in its dtype: Adam 7 passes, SGD with momentum 5, RMSprop 5, and what clipping reads before the step 1.
"""

import torch

import nnfast.nn.utils
import nnfast.optim

from .bench_adamw import CHECKED, models, step_task, total
from .harness import OURS, Case, Task

OP = "optimizers"
MODELS = ("6 tiny", "1000 of 64x64", "25M", "GPT-2")
GOALS = ("1000 of 64x64", "GPT-2")  # what a GPU's figures are judged by
#: variant -> the optimizer, its options, how it is clipped, passes over the parameters
VARIANTS = {
    "Adam": ("Adam", {"lr": 1e-3}, None, 7),
    "SGD with momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}, None, 5),
    "RMSprop": ("RMSprop", {"lr": 1e-3}, None, 5),
    "clip_grad_norm_ and AdamW": ("AdamW", {"lr": 1e-3}, "call", 8),
    "AdamW with max_grad_norm": ("AdamW", {"lr": 1e-3}, "option", 8),
}
LIMIT = 1e9  # no gradient is that large, as in most steps of a training that goes well


def cases(device: str) -> list[Case]:
    return [
        Case(OP, model, total(models(device)[model]), "fp32", "step", variant, device)
        for model in MODELS
        for variant in VARIANTS
    ]


class Clipped:
    """An optimizer whose gradients are clipped before each step."""

    def __init__(self, optimizer, clip):
        self.optimizer, self.state, self._clip = optimizer, optimizer.state, clip
        self._params = optimizer.param_groups[0]["params"]

    def step(self):
        self._clip(self._params, LIMIT)
        self.optimizer.step()


def task(case: Case, compile: bool = False) -> Task:
    """``compile`` changes nothing, as in bench_adamw."""
    name, options, clip, passes = VARIANTS[case.variant]
    if case.graph and case.device == "cuda" and name != "SGD":  # as in bench_adamw; SGD has no such option
        options = options | {"capturable": True}

    def torchs(**more):
        def build(params):
            optimizer = getattr(torch.optim, name)(params, **options, **more)
            return Clipped(optimizer, torch.nn.utils.clip_grad_norm_) if clip else optimizer

        return build

    def ours(params):
        more = {"max_grad_norm": LIMIT} if clip == "option" else {}
        optimizer = getattr(nnfast.optim, name)(params, **options, **more)
        return Clipped(optimizer, nnfast.nn.utils.clip_grad_norm_) if clip == "call" else optimizer

    def exact(start, grads):
        params = [p.double().requires_grad_() for p in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.double()
        optimizer = getattr(torch.optim, name)(params, **options, foreach=False)
        for _ in range(CHECKED):
            optimizer.step()
        return [p.detach() for p in params]

    providers = {"torch": torchs()}
    if name != "RMSprop":  # torch has none
        providers["torch fused"] = torchs(fused=True)
    return step_task(case, providers | {OURS: ours}, exact, passes)


def test_optimizers(case, race):
    race(case, task)
