import torch
from torch import Tensor

from nnfast import functional as F
from nnfast.nn.layer_norm import LayerNorm
from nnfast.nn.linear_gelu import gelu_of_linear


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` whose norms and feed-forward use our ops.

    The same arguments, children and ``state_dict``. The feed-forward is fused where its activation is a GELU.
    """

    def __init__(self, *args, **kwargs) -> None:
        # torch tells a GELU by `activation is F.gelu`, for its own inference path: it gets the one it knows.
        args = [torch.nn.functional.gelu if a is F.gelu else a for a in args]
        kwargs = {k: torch.nn.functional.gelu if v is F.gelu else v for k, v in kwargs.items()}
        super().__init__(*args, **kwargs)
        for norm in (self.norm1, self.norm2):
            norm.__class__ = LayerNorm

    def _ff_block(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        else:
            x = self.linear2(self.dropout(gelu_of_linear(x, self.linear1, self.activation)))
        return self.dropout2(x)
