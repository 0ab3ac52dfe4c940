"""The ops as functions: ours where the gate is open, torch's own everywhere else.

Each asks the gate in ``csrc/gate/python.cpp``, which answers with the result, or with None where the call is torch's.
Under ``torch.compile``, export and scripting the plain torch ops are handed on: the compiler fuses them itself.
"""

import contextlib

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as _F

from nnfast import portable
from nnfast.backend import native, torch_serves


def _torchs(*_) -> None:
    """The gate of an op for which there is no kernel without the extension."""


_ours = native or portable
_layer_norm, _gelu, _linear_gelu = _ours.layer_norm, _ours.gelu, _ours.linear_gelu
_linear_gelu_pre = _ours.linear_gelu_pre
_linear = native.linear if native else _torchs
_cross_entropy = native.cross_entropy if native else _torchs


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalization over the last dimensions, as :func:`torch.nn.functional.layer_norm`.

    :math:`y = (x - E[x]) / \sqrt{Var[x] + eps} \cdot weight + bias` over each slice of ``normalized_shape``
    (Ba, Kiros and Hinton, 2016; the formula in pieces: ``csrc/math/moments.h``).

    Args:
        input: ``(*, *normalized_shape)``, float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the sizes of the last dimensions.
        weight, bias: ``normalized_shape``, in the input's dtype, or float32 beside a 16-bit input on a CPU.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and dtype. Sums are taken in float32 (float64 for float64).

    Raises:
        RuntimeError: torch's own, for shapes that do not fit.
    """
    if not is_compiling():
        output = _layer_norm(input, normalized_shape, weight, bias, eps)
        if output is not None:
            return output
        torch_serves("layer_norm")
    return _F.layer_norm(input, normalized_shape, weight, bias, eps)


def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    r"""The Gaussian error linear unit, as :func:`torch.nn.functional.gelu`.

    ``approximate="none"``: :math:`x \Phi(x)`; ``"tanh"``:
    :math:`x (1 + \tanh(\sqrt{2 / \pi} (x + 0.044715 x^3))) / 2` (Hendrycks and Gimpel, 2016; ``csrc/math/gelu.h``).

    Args:
        input: any shape; float32, bfloat16, float16 or float64.
        approximate: ``"none"`` or ``"tanh"``.
        out: where torch's op shall write, if anywhere.

    Raises:
        RuntimeError: torch's own, for another ``approximate``.
    """
    if out is not None:
        return _F.gelu(input, approximate=approximate, out=out)
    if not is_compiling():
        output = _taken_ahead(input, approximate) if _any_ahead else None
        if output is None:
            output = _gelu(input, approximate)
        if output is not None:
            return output
        torch_serves("gelu")
    return _F.gelu(input, approximate=approximate)


def gelu_if_ours(input: Tensor, approximate: str) -> Tensor | None:
    """:func:`gelu`, or None where the call is torch's."""
    if is_compiling():
        return None
    output = _taken_ahead(input, approximate)
    if output is None:
        output = _gelu(input, approximate)
    if output is None:
        torch_serves("gelu")
    return output


def _taken_ahead(input: Tensor, approximate: str) -> Tensor | None:
    """The GELU that ``input`` carries, if it does."""
    ahead = input.__dict__.pop(_AHEAD, None) if type(input) is Tensor else None
    return None if ahead is None else ahead.of(input, approximate)


# Whether a GELU was ever computed ahead in this process: until then nobody need look for one.
_any_ahead = False

# The name under which a pre-activation carries its GELU.
_AHEAD = "_nnfast_ahead"


class _Ahead:
    """A GELU that was computed together with its input, before anybody asked for it."""

    __slots__ = ("output", "approximate", "version")

    def __init__(self, output: Tensor, approximate: str, version: int) -> None:
        self.output, self.approximate, self.version = output, approximate, version

    def of(self, pre: Tensor, approximate: str) -> Tensor | None:
        """The output, where a GELU of ``pre`` taken now would be the same, and have the same gradient."""
        same = (
            self.approximate == approximate
            and self.version == pre._version
            and self.output.requires_grad == (pre.requires_grad and torch.is_grad_enabled())
            and not pre._backward_hooks
            and not pre.retains_grad
        )
        return self.output if same else None


def linear_ahead(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor | None:
    """``linear(input, weight, bias)`` that has its GELU computed with it, or None where the call is torch's.

    The result is the Linear's, whoever reads it. Where :func:`gelu` is its next reader, the GELU is there already.
    It goes with the tensor: no thread, exception or recomputation can mistake it for another's. The result is also
    what the backward needs to see again, so that a change of it in place makes backward raise, as torch does.
    """
    if is_compiling() or torch.is_inference_mode_enabled():  # there tensors do not count their changes
        return None
    both = _linear_gelu_pre(input, weight, bias, approximate)
    if both is None:
        return None
    global _any_ahead
    _any_ahead = True
    output, pre = both
    pre.__dict__[_AHEAD] = _Ahead(output, approximate, pre._version)
    return pre


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``input @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    On a CPU the product and those of the backward are taken by whichever library is faster for them there
    (``python -m nnfast`` says which); elsewhere, and for small ones, by torch's own op.

    Args:
        input: ``(*, in_features)``, float32, bfloat16, float16 or float64, any strides.
        weight: ``(out_features, in_features)``, in the input's dtype.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(*, out_features)``, in the input's dtype, or autocast's where it is on.

    Raises:
        RuntimeError: torch's own, for shapes or dtypes that do not fit.
    """
    if not is_compiling():
        output = _linear(input, weight, bias)
        if output is not None:
            return output
        torch_serves("linear")
    return _F.linear(input, weight, bias)


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    r"""``gelu(linear(input, weight, bias), approximate=approximate)`` in one op.

    :math:`\mathrm{gelu}(x W^T + b)`. Only the input and the pre-activation :math:`x W^T + b` are saved for the
    backward, and the pre-activation is rounded to its dtype before the GELU, as the two calls would.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, in the input's dtype.
        bias: ``(out_features,)`` or None.
        approximate: ``"none"`` (erf) or ``"tanh"``.

    Returns:
        ``(*, out_features)``, in the input's dtype, or autocast's where it is on.

    Raises:
        RuntimeError: torch's own, for shapes or dtypes that do not fit and for another ``approximate``.
    """
    if torch.jit.is_scripting():
        return _F.gelu(_F.linear(input, weight, bias), approximate=approximate)
    else:
        if not is_compiling():
            output = _linear_gelu(input, weight, bias, approximate)
            if output is not None:
                return output
            torch_serves("linear_gelu")
        return _F.gelu(_F.linear(input, weight, bias), approximate=approximate)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The cross-entropy of logits with their classes, as :func:`torch.nn.functional.cross_entropy`.

    :math:`-w_y \log \mathrm{softmax}(x)_y`, smoothed by Szegedy et al., 2016 (``csrc/math/cross_entropy.h``). The
    logits are read once, and once more for their gradient, which is written over them where nobody else can see them. A
    mean is over the weights of the classes that are not ignored.

    Args:
        input: ``(N, C)``, ``(C,)`` or ``(N, C, d1, ...)``; float32, bfloat16, float16 or float64.
        target: class indices, ``(N,)``, ``()`` or ``(N, d1, ...)``, int64. Probabilities are torch's.
        weight: ``(C,)``, in the input's dtype, or None.
        ignore_index: of the rows that count for nothing.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: from 0 to 1.
        size_average, reduce: torch's deprecated ones.

    Returns:
        A scalar, or ``target``'s shape without a reduction, in the input's dtype; float32 where autocast is on. Sums
        are taken in float32 and float64.

    Raises:
        IndexError, RuntimeError: torch's own, for classes out of range, and shapes or dtypes that do not fit.
    """
    if torch.jit.is_scripting():
        return _F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    else:
        if not is_compiling():
            if size_average is None and reduce is None:
                output = _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
                if output is not None:
                    return output
            torch_serves("cross_entropy")
        return _F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


# In a script that calls them, these are torch's builtin operators.
with contextlib.suppress(AttributeError, ImportError):
    from torch.jit._builtins import _register_builtin

    _register_builtin(layer_norm, "aten::layer_norm")
    _register_builtin(gelu, "aten::gelu")
    _register_builtin(linear, "aten::linear")
