"""The ops as functions: ours where the gate is open, torch's own everywhere else.

Each asks the gate in ``csrc/gate/python.cpp``, which answers with the result, or with None where the call is torch's.
Under ``torch.compile`` it is ``compiled.py`` that answers so. Export and scripting are handed torch's ops.
"""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as _F

from nnfast import compiled
from nnfast._torch import register_builtin
from nnfast.backend import native, torch_serves


def _torchs(*_) -> None:
    """The gate where there is no extension."""


_layer_norm = getattr(native, "layer_norm", _torchs)
_gelu = getattr(native, "gelu", _torchs)
_linear = getattr(native, "linear", _torchs)
_linear_gelu = getattr(native, "linear_gelu", _torchs)
_cross_entropy = getattr(native, "cross_entropy", _torchs)
_linear_cross_entropy = getattr(native, "linear_cross_entropy", _torchs)
_attention = getattr(native, "scaled_dot_product_attention", _torchs)
_embedding = getattr(native, "embedding", _torchs)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the last dimensions, as ``torch.nn.functional.layer_norm``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias`` over each slice of ``normalized_shape``
    (Ba, Kiros and Hinton, 2016; the formula in pieces: ``csrc/math/moments.h``).

    Args:
        input: ``(*, *normalized_shape)``, float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the sizes of the last dimensions.
        weight, bias: ``normalized_shape``, in the input's dtype, or float32 beside a 16-bit input on a CPU.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and dtype; under autocast on a GPU in float32, with the input read in
        its own dtype. Sums are taken in float32 (float64 for float64).

    Raises:
        RuntimeError: torch's own, for shapes that do not fit.
    """
    if not is_dynamo_compiling():
        output = _layer_norm(input, normalized_shape, weight, bias, eps)
        if output is not None:
            return output
        torch_serves("layer_norm")
    return _F.layer_norm(input, normalized_shape, weight, bias, eps)


def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """The Gaussian error linear unit, as ``torch.nn.functional.gelu``.

    ``approximate="none"``: ``x * Phi(x)``; ``"tanh"``:
    ``x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2`` (Hendrycks and Gimpel, 2016; ``csrc/math/gelu.h``).

    Args:
        input: any shape; float32, bfloat16 or float16; float64 is torch's. The result has its shape and dtype.
        approximate: ``"none"`` or ``"tanh"``.
        out: where torch's op shall write, if anywhere.

    Raises:
        RuntimeError: torch's own, for another ``approximate``.
    """
    if out is not None:
        torch_serves("gelu")
        return _F.gelu(input, approximate=approximate, out=out)
    output = gelu_if_ours(input, approximate)
    return _F.gelu(input, approximate=approximate) if output is None else output


def gelu_if_ours(input: Tensor, approximate: str) -> Tensor | None:
    """``gelu``, or None where the call is torch's."""
    if is_dynamo_compiling():
        return None
    output = _gelu(input, approximate)
    if output is None:
        torch_serves("gelu")
    return output


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, as ``torch.nn.functional.linear``.

    On a CPU the fastest library at hand takes the products, forward and backward (``python -m nnfast`` says which);
    elsewhere, and for small ones, torch's own op does. On a GPU, in 16 bits, where the input is the output of ``gelu``,
    the backward's product works out the GELU's gradient as well, and its sums for the bias of the Linear before.

    Args:
        input: ``(*, in_features)``, float32, bfloat16, float16 or float64, any strides.
        weight: ``(out_features, in_features)``, in the input's dtype.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(*, out_features)``, in the input's dtype, or autocast's where it is on.

    Raises:
        RuntimeError: torch's own, for shapes or dtypes that do not fit.
    """
    # As linear_if_ours, written out: a call of it would show in a Linear of three microseconds.
    output = (compiled.linear if is_dynamo_compiling() else _linear)(input, weight, bias)
    if output is not None:
        return output
    torch_serves("linear")
    return _F.linear(input, weight, bias)


def linear_if_ours(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``linear``, or None where the call is torch's."""
    output = (compiled.linear if is_dynamo_compiling() else _linear)(input, weight, bias)
    if output is None:
        torch_serves("linear")
    return output


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``gelu(linear(input, weight, bias), approximate=approximate)`` in one op.

    ``gelu(x @ W.T + b)``, with the GELU of ``csrc/math/gelu.h``. Only the input and the pre-activation ``x @ W.T + b``
    are saved for the backward, and the pre-activation is rounded to its dtype before the GELU, as the two calls do.

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
        output = (compiled.linear_gelu if is_dynamo_compiling() else _linear_gelu)(input, weight, bias, approximate)
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
    """The cross-entropy of logits with their classes, as ``torch.nn.functional.cross_entropy``.

    ``-weight[y] * log(softmax(x)[y])``, smoothed as by Szegedy et al., 2016 (``csrc/math/cross_entropy.h``). The
    logits are read once, and once more for their gradient, which is written over them where nobody else can see them. A
    mean is over the weights of the classes that are not ignored.

    Args:
        input: ``(N, C)``, ``(C,)`` or ``(N, C, d1, ...)``; float32, bfloat16, float16 or float64. On a GPU the call is
            torch's, and where the classes of more than two dimensions do not follow each other in memory, as in
            ``channels_last`` they do.
        target: class indices, ``(N,)``, ``()`` or ``(N, d1, ...)``, int64. Probabilities are torch's.
        weight: ``(C,)``, in the input's dtype, or None.
        ignore_index: the class whose rows count for nothing.
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
        if size_average is None and reduce is None:
            call = compiled.cross_entropy if is_dynamo_compiling() else _cross_entropy
            output = call(input, target, weight, ignore_index, reduction, label_smoothing)
            if output is not None:
                return output
        torch_serves("cross_entropy")
        return _F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``, and never all of the logits at once.

    As torch's function of this name, which torch 2.12 and newer have. The logits of a block of rows are made, read and
    let go; where the loss is reduced to a number, their gradient is taken on the spot, so that three products are all
    there is. Equal to the two calls up to rounding (the loss's formula: ``csrc/math/cross_entropy.h``).

    Args:
        input: ``(N, in_features)``. ``(in_features,)``, and a loss of more dimensions, are torch's.
        linear_weight: ``(C, in_features)``, in the input's dtype.
        target: ``(N,)``, int64 class indices. Probabilities are torch's.
        linear_bias: ``(C,)`` or None.
        weight, reduction, label_smoothing: as in ``cross_entropy``.
        ignore_index: None is -100.
        options: torch's ``LinearCrossEntropyOptions``; with them the call is torch's.

    Returns:
        A scalar, or ``(N,)`` without a reduction, in the input's dtype; float32 where autocast is on.

    Raises:
        IndexError, RuntimeError: torch's own, for classes out of range, and shapes or dtypes that do not fit.
    """
    if options is None:
        ignored = -100 if ignore_index is None else ignore_index
        call = compiled.linear_cross_entropy if is_dynamo_compiling() else _linear_cross_entropy
        output = call(input, linear_weight, target, linear_bias, weight, ignored, reduction, label_smoothing)
        if output is not None:
            return output
    torch_serves("linear_cross_entropy")
    return _torchs_linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=options,
    )


def _two_calls(
    input, linear_weight, target, *, linear_bias, weight, reduction, ignore_index, label_smoothing, options
) -> Tensor:
    """The two calls that torch's ``linear_cross_entropy`` stands for, for a torch that lacks it."""
    if options is not None:
        raise TypeError(f"linear_cross_entropy: torch {torch.__version__} knows no options")
    classes = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = _F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, classes)
    ignored = -100 if ignore_index is None else ignore_index
    return _F.cross_entropy(
        logits, target, weight, ignore_index=ignored, reduction=reduction, label_smoothing=label_smoothing
    )


_torchs_linear_cross_entropy = getattr(_F, "linear_cross_entropy", _two_calls)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table, as ``torch.nn.functional.embedding``.

    Torch's arithmetic, forward and backward. On a CPU the gradient of a table of some MB is written into the memory of
    the last step's: mapping fresh memory takes several times as long as writing the zeros. Where no gradient is
    wanted, with ``max_norm`` or ``sparse``, elsewhere and under ``torch.compile`` the call is torch's.

    Args:
        input: any shape, int32 or int64.
        weight: ``(num_embeddings, embedding_dim)``, float32, bfloat16, float16 or float64.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: torch's.

    Returns:
        ``(*, embedding_dim)`` in the weight's dtype.

    Raises:
        IndexError, RuntimeError: torch's own, for indices out of range and shapes or dtypes that do not fit.
    """
    if torch.jit.is_scripting():
        return _F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    else:
        if max_norm is None and sparse is False and not is_dynamo_compiling():
            output = _embedding(input, weight, padding_idx, scale_grad_by_freq)
            if output is not None:
                return output
        return _F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention, as ``torch.nn.functional.scaled_dot_product_attention``.

    ``softmax(scale * Q @ K.T + mask) @ V`` (Vaswani et al., 2017), in blocks whose probabilities are never
    all in memory (Dao et al., 2022; ``csrc/cpu/attention.h``). Softmax is taken in float32; beside bfloat16
    values the probabilities are rounded to it, as in torch, where the CPU multiplies pairs of bfloat16.

    Args:
        query: ``(N, H, L, E)``; float32, bfloat16 or float16 on a CPU, any strides. Other numbers of dimensions,
            float64 and a GPU are torch's.
        key, value: ``(N, Hk, S, E)`` and ``(N, Hk, S, Ev)``; ``Hk`` is ``H`` or, with ``enable_gqa``, divides it.
        attn_mask: what is added to the scores, in the query's dtype or float32, or a boolean one that is true where a
            key takes part; ``(L, S)`` or up to four dimensions that broadcast to ``(N, H, L, S)``. A query that sees no
            key gets zeros. One that requires a gradient is torch's.
        dropout_p: 0; any other is torch's.
        is_causal: query ``i`` sees the keys up to ``i``.
        scale: ``1 / sqrt(E)`` where it is None.

    Returns:
        ``(N, H, L, Ev)`` in the query's dtype, or autocast's where it is on, with torch's strides.

    Raises:
        RuntimeError: torch's own, for shapes or dtypes that do not fit.
    """
    if isinstance(dropout_p, (int, float)) and dropout_p == 0:
        call = compiled.scaled_dot_product_attention if is_dynamo_compiling() else _attention
        output = call(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if output is not None:
            return output
    torch_serves("scaled_dot_product_attention")
    return _F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


# In a script that calls them, these are torch's builtin operators.
register_builtin(layer_norm, "aten::layer_norm")
register_builtin(gelu, "aten::gelu")
register_builtin(linear, "aten::linear")
register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")
