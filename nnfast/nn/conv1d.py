"""GPT-2's Linear with the weight turned; to be imported only where transformers is."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D as _Conv1D

from nnfast import functional as F


class Conv1D(_Conv1D):
    """transformers' Conv1D with our products: its weight is ``(in_features, out_features)``."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.is_contiguous():  # theirs takes a view of x
            output = F.linear_if_ours(x, self.weight.t(), self.bias)
            if output is not None:
                return output
        return super().forward(x)
