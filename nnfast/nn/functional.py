"""Everything in ``torch.nn.functional``; ours where ours is faster, and ``linear_gelu`` besides."""

import torch.nn.functional as _torch
from torch.nn.functional import *  # noqa: F403

from nnfast.functional import cross_entropy as cross_entropy
from nnfast.functional import embedding as embedding
from nnfast.functional import gelu as gelu
from nnfast.functional import layer_norm as layer_norm
from nnfast.functional import linear as linear
from nnfast.functional import linear_cross_entropy as linear_cross_entropy
from nnfast.functional import linear_gelu as linear_gelu
from nnfast.functional import scaled_dot_product_attention as scaled_dot_product_attention


def __getattr__(name: str):
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
