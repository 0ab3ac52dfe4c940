import functools

import torch
from torch import Tensor

from nnfast import functional as F
from nnfast.nn.layer_norm import LayerNorm
from nnfast.nn.linear import Linear
from nnfast.nn.multihead_attention import MultiheadAttention


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` whose attention, norms and feed-forward use our ops.

    The same arguments, shapes, children and ``state_dict``.
    """

    @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        # torch's fast path of inference knows a GELU by `activation is F.gelu`, so it is given torch's function.
        args = [torch.nn.functional.gelu if a is F.gelu else a for a in args]
        kwargs = {k: torch.nn.functional.gelu if v is F.gelu else v for k, v in kwargs.items()}
        super().__init__(*args, **kwargs)
        for child, ours in (
            (self.self_attn, MultiheadAttention),
            (self.norm1, LayerNorm),
            (self.norm2, LayerNorm),
            (self.linear1, Linear),
            (self.linear2, Linear),
        ):
            child.__class__ = ours

    def _ff_block(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        else:
            activation = F.gelu if self.activation is torch.nn.functional.gelu else self.activation
            x = self.linear2(self.dropout(activation(self.linear1(x))))
        return self.dropout2(x)
