import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from nnfast import functional as F
from nnfast.nn.linear import Linear

#: What is fused with a GELU that follows: exactly these.
LINEARS = (torch.nn.Linear, Linear)


class GELU(torch.nn.GELU):
    """:class:`torch.nn.GELU` with our kernels. See :func:`nnfast.nn.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate=self.approximate)


class LinearGELU(torch.nn.Linear):
    """``gelu(input @ weight.T + bias)`` as one op: a :class:`torch.nn.Linear` with the GELU that follows it.

    Initialised as Linear is (the same seed gives the same weights), with its ``state_dict`` keys ``weight`` and
    ``bias``.

    Args:
        in_features, out_features, bias, device, dtype: Linear's.
        approximate: ``"none"`` or ``"tanh"``, GELU's.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``. See :func:`nnfast.nn.functional.linear_gelu`.
    """

    __constants__ = [*torch.nn.Linear.__constants__, "approximate"]
    approximate: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        approximate: str = "none",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_gelu(input, self.weight, self.bias, self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


def gelu_of_linear(input: Tensor, linear: torch.nn.Module, activation) -> Tensor:
    """``activation(linear(input))``, as one op where that is a GELU of a Linear and nobody could tell.

    Only for exactly a Linear and a GELU: a parametrized, quantized or adapted Linear is another class, and runs by
    itself. A hook, a replaced ``forward``, a compiler or a tracer wants to see the modules themselves.
    """
    approximate = _approximate(activation)
    if (
        approximate is not None
        and type(linear) in LINEARS
        and isinstance(input, Tensor)
        and unobserved(linear)
        and not _has_any_global_hook()
        and not is_compiling()
    ):
        return F.linear_gelu(input, linear.weight, linear.bias, approximate)
    return activation(linear(input))


def _approximate(activation) -> str | None:
    if type(activation) in (torch.nn.GELU, GELU):
        return activation.approximate if unobserved(activation) else None
    return "none" if activation is torch.nn.functional.gelu else None


def unobserved(module: torch.nn.Module) -> bool:
    """Whether nobody could notice that ``module.__call__`` was not made."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
