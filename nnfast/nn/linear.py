import torch
from torch import Tensor

from nnfast import functional as F


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` with our products: the same arguments, parameters and ``state_dict``.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``. See ``nnfast.nn.functional.linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
