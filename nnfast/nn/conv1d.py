"""GPT-2's Linear, whose weight is transposed; to be imported only where transformers is installed."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D as _Conv1D

from nnfast import functional as F


class Conv1D(_Conv1D):
    """transformers' Conv1D with our products: input ``(*, in)``, weight ``(in, out)``, output ``(*, out)``."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.is_contiguous():  # transformers' own calls x.view, which may raise
            output = F.linear_if_ours(x, self.weight.t(), self.bias)
            if output is not None:
                return output
        return super().forward(x)
