"""Everything in ``torch.nn.utils``, with our clipping of gradients. What is not ours is torch's own object."""

import torch.nn.utils as _torch

from nnfast.nn.utils.clip_grad import clip_grad_norm_ as clip_grad_norm_
from nnfast.nn.utils.clip_grad import clip_grads_with_norm_ as clip_grads_with_norm_
from nnfast.nn.utils.clip_grad import get_total_norm as get_total_norm

__all__ = [*_torch.__all__]


def __getattr__(name: str):
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
