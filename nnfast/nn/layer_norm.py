import torch
from torch import Tensor

from nnfast import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` with our kernels: the same arguments, parameters and ``state_dict``.

    Shape:
        Input ``(*, *normalized_shape)``, output the same. See ``nnfast.nn.functional.layer_norm``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
