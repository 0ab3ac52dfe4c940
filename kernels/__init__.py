"""The Triton kernels, one file an op; installed as ``nnfast.kernels``.

Importing this package imports neither Triton nor a kernel: that happens at the first call of an op.
"""

import functools
import importlib
from collections.abc import Callable

#: The ops that Triton serves, and the file of each.
OPS = {
    "layer_norm": "layer_norm",
    "layer_norm_backward": "layer_norm",
    "linear_gelu": "linear_gelu",
    "gelu_backward_sum": "linear_gelu",
    "gelu_linear_backward": "linear_gelu",
    "adamw_": "adamw",
    "total_norm": "clip_grad",
    "clip_coef": "clip_grad",
    "scale_by_": "clip_grad",
}


#: Ops that torch's kernels compute and we record for autograd, so that the backward of one works out the other's.
RECORDED = ("gelu", "linear")


def launcher(op: str) -> Callable:
    """The function that serves ``op``, with its schema's arguments."""

    @functools.cache
    def load() -> Callable:
        name = op.rstrip("_") + "_triton"
        return getattr(importlib.import_module(f"nnfast.kernels.{OPS[op]}"), name)

    return lambda *args, **kwargs: load()(*args, **kwargs)
