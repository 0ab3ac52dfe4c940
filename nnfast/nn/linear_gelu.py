import torch
from torch import Tensor

from nnfast import functional as F


class GELU(torch.nn.GELU):
    """``torch.nn.GELU`` with our kernels. See ``nnfast.nn.functional.gelu``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate=self.approximate)


class LinearGELU(torch.nn.Module):
    """``gelu(input @ weight.T + bias)`` as one op.

    Initialised as a ``torch.nn.Linear`` is (the same seed gives the same weights), with its ``state_dict`` keys
    ``weight`` and ``bias``. It is no subclass of Linear, for what converts a model's Linears would drop the GELU.

    Args:
        in_features, out_features, bias, device, dtype: Linear's.
        approximate: ``"none"`` or ``"tanh"``, GELU's.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``. See ``nnfast.nn.functional.linear_gelu``.
    """

    __constants__ = ["in_features", "out_features", "approximate"]
    in_features: int
    out_features: int
    approximate: str
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        approximate: str = "none",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        linear = torch.nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features, self.approximate = in_features, out_features, approximate
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def reset_parameters(self) -> None:
        torch.nn.Linear.reset_parameters(self)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_gelu(input, self.weight, self.bias, self.approximate)

    def extra_repr(self) -> str:
        return f"{torch.nn.Linear.extra_repr(self)}, approximate={self.approximate!r}"
