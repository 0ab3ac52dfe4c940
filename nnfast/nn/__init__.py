"""Everything in ``torch.nn``; ours where ours is faster. What is not ours is torch's own object."""

import torch.nn as _torch
from torch.nn import *  # noqa: F403

import nnfast.nn.functional as functional  # noqa: F401  (by its full name: a bare one is torch's, starred in above)
import nnfast.nn.utils as utils  # noqa: F401
from nnfast import _alias
from nnfast.nn.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from nnfast.nn.cross_entropy import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from nnfast.nn.embedding import Embedding as Embedding
from nnfast.nn.layer_norm import LayerNorm as LayerNorm
from nnfast.nn.linear import Linear as Linear
from nnfast.nn.linear_gelu import GELU as GELU
from nnfast.nn.linear_gelu import LinearGELU as LinearGELU
from nnfast.nn.multihead_attention import MultiheadAttention as MultiheadAttention
from nnfast.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer

_alias.install()


def __getattr__(name: str):
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
