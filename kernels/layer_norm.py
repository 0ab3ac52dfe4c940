"""LayerNorm. The maths: ``csrc/math/moments.h``, whose names the functions here bear.

Bound by memory. Forward: read x, write y. Backward: read x and grad, write dx; the partial sums of dweight and dbias
stay in registers (short rows) or in the second-level cache (long rows), one row of them a program, and are added up
by a second launch in a fixed order. No atomics, so results repeat to the bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnfast.kernels.shared import check, lanes, on, processors, rows_of, sum_rows

# What a measurement on a GPU should settle.
#: Elements of a tile at the least: short rows share a program.
TILE = 2048
#: The longest row that a program holds in registers, forward and backward; a longer one is read in pieces.
LONGEST, LONGEST_BACKWARD = 16384, 8192
#: Elements a thread holds, forward and backward.
PER_THREAD, PER_THREAD_BACKWARD = 16, 8
#: Warps at the most in a program, and resident on a multiprocessor in the backward.
MAX_WARPS, WARPS_PER_PROCESSOR = 16, 16
#: Columns of a piece of long rows in the forward; rows and columns of one in the backward.
LONG_COLS_FORWARD, LONG_ROWS, LONG_COLS = 8192, 4, 2048
#: How many tiles of x and grad are under way in the backward.
STAGES = 2


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def corrected_variance(mean_of_squares, residual_mean):
    return mean_of_squares - residual_mean * residual_mean


@triton.jit
def reciprocal_std(variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps))


@triton.jit
def normalized(x, mean, rstd):
    return (x - mean) * rstd


@triton.jit
def layer_norm_grad_input(grad_xhat, xhat, mean_grad_xhat, mean_grad_xhat_xhat, rstd):
    return (grad_xhat - mean_grad_xhat - xhat * mean_grad_xhat_xhat) * rstd


@triton.jit
def _affine(xhat, weight, bias, col, size):
    if weight is not None:
        xhat *= tl.load(weight + col, mask=col < size, other=0.0).to(tl.float32)
    if bias is not None:
        xhat += tl.load(bias + col, mask=col < size, other=0.0).to(tl.float32)
    return xhat


@triton.jit
def layer_norm_fwd_kernel(
    x,  # (rows, size), a row every x_stride elements
    weight,  # (size,) or None
    bias,  # (size,) or None
    y,  # (rows, size)
    stats,  # (2, rows), float: mean and reciprocal standard deviation
    rows,
    size,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # a power of two, size or more
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < size)
    values = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values * (1.0 / size), 1, keep_dims=True)  # the sum of the values alone may overflow
    # What lies beyond the row must not enter the variance.
    centred = tl.where(inside, values - mean, 0.0)
    residual, squares = tl.reduce((centred, centred * centred), 1, _add, keep_dims=True)
    rstd = reciprocal_std(corrected_variance(squares / size, residual / size), eps)
    mean += residual / size  # what rounding took from it
    tl.store(stats + row, mean, mask=row < rows)
    tl.store(stats + rows + row, rstd, mask=row < rows)
    tl.store(y + row * size + col, _affine(normalized(values, mean, rstd), weight, bias, col, size), mask=inside)


@triton.jit
def layer_norm_fwd_long_kernel(x, weight, bias, y, stats, rows, size, x_stride, eps, COLS: tl.constexpr):
    """One row a program, read three times: the second and third time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * size
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, size, COLS):
        col = tl.cast(start, tl.int64) + tl.arange(0, COLS)
        total += tl.load(x + col, mask=col < size, other=0.0).to(tl.float32) * (1.0 / size)
    mean = tl.sum(total, 0)
    residual, squares = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for start in range(0, size, COLS):
        col = tl.cast(start, tl.int64) + tl.arange(0, COLS)
        values = tl.load(x + col, mask=col < size, other=0.0).to(tl.float32)
        centred = tl.where(col < size, values - mean, 0.0)
        residual += centred
        squares += centred * centred
    residual_mean = tl.sum(residual, 0) / size
    rstd = reciprocal_std(corrected_variance(tl.sum(squares, 0) / size, residual_mean), eps)
    mean += residual_mean  # what rounding took from it
    tl.store(stats + row, mean)
    tl.store(stats + rows + row, rstd)
    for start in range(0, size, COLS):
        col = tl.cast(start, tl.int64) + tl.arange(0, COLS)
        values = tl.load(x + col, mask=col < size, other=0.0).to(tl.float32)
        tl.store(y + col, _affine(normalized(values, mean, rstd), weight, bias, col, size), mask=col < size)


@triton.jit
def _weights(weight, col, size):
    if weight is None:
        return tl.full(col.shape, 1.0, tl.float32)
    else:
        return tl.load(weight + col, mask=col < size, other=0.0).to(tl.float32)


@triton.jit
def _gradients(grad, x, w, mean, rstd, row, col, rows, size, grad_stride, x_stride):
    """grad, grad * weight and xhat of a tile; outside it grad is 0, so the sums are right."""
    inside = (row < rows) & (col < size)
    g = tl.load(grad + row * grad_stride + col, mask=inside, other=0.0).to(tl.float32)
    xhat = normalized(tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32), mean, rstd)
    return g, g * w, xhat


@triton.jit
def layer_norm_bwd_kernel(
    grad,  # (rows, size), a row every grad_stride elements
    x,  # (rows, size), a row every x_stride elements
    weight,  # (size,) or None
    stats,  # (2, rows)
    grad_x,  # (rows, size) or None
    parts_weight,  # (programs, size), float, or None
    parts_bias,  # (programs, size), float, or None
    rows,
    size,
    grad_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # a power of two, size or more
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)[None, :]
    w = _weights(weight, col, size)
    sum_weight, sum_bias = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mean = tl.load(stats + row, mask=row < rows, other=0.0)
        rstd = tl.load(stats + rows + row, mask=row < rows, other=0.0)
        g, grad_xhat, xhat = _gradients(grad, x, w, mean, rstd, row, col, rows, size, grad_stride, x_stride)
        if grad_x is not None:
            a, b = tl.reduce((grad_xhat, grad_xhat * xhat), 1, _add, keep_dims=True)
            dx = layer_norm_grad_input(grad_xhat, xhat, a / size, b / size, rstd)
            tl.store(grad_x + row * size + col, dx, mask=(row < rows) & (col < size))
        sum_weight += g * xhat
        sum_bias += g
    at = program * size + col
    if parts_weight is not None:
        tl.store(parts_weight + at, tl.sum(sum_weight, 0, keep_dims=True), mask=col < size)
    if parts_bias is not None:
        tl.store(parts_bias + at, tl.sum(sum_bias, 0, keep_dims=True), mask=col < size)


@triton.jit
def _add_to(parts, values, col, size, later):
    if parts is not None:
        before = tl.load(parts + col, mask=(col < size) & later, other=0.0)
        tl.store(parts + col, before + tl.sum(values, 0, keep_dims=True), mask=col < size)


@triton.jit
def layer_norm_bwd_long_kernel(
    grad, x, weight, stats, grad_x, parts_weight, parts_bias, rows, size, grad_stride, x_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS rows at a time, in pieces of COLS: once for the two means, once more, from the cache, for the rest."""
    program = tl.program_id(0).to(tl.int64)
    if parts_weight is not None:
        parts_weight += program * size
    if parts_bias is not None:
        parts_bias += program * size
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mean = tl.load(stats + row, mask=row < rows, other=0.0)
        rstd = tl.load(stats + rows + row, mask=row < rows, other=0.0)
        sum_a, sum_b = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, size, COLS):
            col = tl.cast(start, tl.int64) + tl.arange(0, COLS)[None, :]
            w = _weights(weight, col, size)
            g, grad_xhat, xhat = _gradients(grad, x, w, mean, rstd, row, col, rows, size, grad_stride, x_stride)
            sum_a += grad_xhat
            sum_b += grad_xhat * xhat
        a, b = tl.reduce((sum_a, sum_b), 1, _add, keep_dims=True)
        for start in range(0, size, COLS):
            col = tl.cast(start, tl.int64) + tl.arange(0, COLS)[None, :]
            w = _weights(weight, col, size)
            g, grad_xhat, xhat = _gradients(grad, x, w, mean, rstd, row, col, rows, size, grad_stride, x_stride)
            if grad_x is not None:
                dx = layer_norm_grad_input(grad_xhat, xhat, a / size, b / size, rstd)
                tl.store(grad_x + row * size + col, dx, mask=(row < rows) & (col < size))
            _add_to(parts_weight, g * xhat, col, size, first >= tl.num_programs(0) * ROWS)
            _add_to(parts_bias, g, col, size, first >= tl.num_programs(0) * ROWS)
        # Another thread of the program may read these sums next.
        tl.debug_barrier()


def _tile(size: int, per_thread: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that holds whole rows."""
    cols = triton.next_power_of_2(size)
    rows = max(1, TILE // cols)
    return rows, cols, min(MAX_WARPS, max(4, rows * cols // (lanes() * per_thread)))


def _covered(input: Tensor, *beside: Tensor | None) -> bool:
    """As ``covers_layer_norm``: what the kernels, which work in float, can take."""
    types = torch.float32, torch.bfloat16, torch.float16
    return input.dtype in types and all(t is None or t.dtype in (input.dtype, torch.float32) for t in beside)


def layer_norm_triton(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``nnfast::layer_norm``: the output, in the input's dtype or float32, and the statistics ``(2, rows)``."""
    check(_covered(input, weight, bias) and dtype in (None, input.dtype, torch.float32), "layer_norm")
    size = math.prod(normalized_shape)
    rows = input.numel() // size if size else math.prod(input.shape[: input.dim() - len(normalized_shape)])
    output = input.new_empty(input.shape, dtype=dtype)
    stats = input.new_empty((2, rows), dtype=torch.float32)
    if not input.numel():
        return output, stats.fill_(float("nan"))
    x = rows_of(input, size)
    affine = [None if t is None else t.contiguous() for t in (weight, bias)]
    args = x, *affine, output, stats, rows, size, x.stride(0), eps
    with on(input):
        if size > LONGEST:
            layer_norm_fwd_long_kernel[(rows,)](*args, COLS=LONG_COLS_FORWARD, num_warps=MAX_WARPS)
        else:
            block, cols, warps = _tile(size, PER_THREAD)
            layer_norm_fwd_kernel[(triton.cdiv(rows, block),)](*args, ROWS=block, COLS=cols, num_warps=warps)
    return output, stats


def layer_norm_backward_triton(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``nnfast::layer_norm_backward``: the gradients of input, weight and bias that ``output_mask`` asks for."""
    check(_covered(input, weight, bias, grad_out), "layer_norm_backward")
    size = math.prod(normalized_shape)
    if grad_out.shape != input.shape or stats.numel() * size != 2 * input.numel():
        raise RuntimeError("nnfast::layer_norm_backward: grad_out or stats does not fit the input")
    grad_input = input.new_empty(input.shape) if output_mask[0] else None
    affine = [t.new_empty(normalized_shape) if m and t is not None else None
              for t, m in zip((weight, bias), output_mask[1:], strict=True)]  # fmt: skip
    wanted = [t for t in affine if t is not None]
    if not input.numel():
        for t in wanted:
            t.zero_()
        return grad_input, *affine
    g, x = rows_of(grad_out, size), rows_of(input, size)
    rows = x.shape[0]
    with on(input):
        long = size > LONGEST_BACKWARD
        block, cols, warps = (LONG_ROWS, LONG_COLS, MAX_WARPS) if long else _tile(size, PER_THREAD_BACKWARD)
        programs = min(triton.cdiv(rows, block), processors() * max(1, WARPS_PER_PROCESSOR // warps))
        parts = x.new_empty((len(wanted), programs, size), dtype=torch.float32)
        queue = list(parts)
        parts_weight, parts_bias = (None if t is None else queue.pop(0) for t in affine)
        args = g, x, None if weight is None else weight.contiguous(), stats, grad_input, parts_weight, parts_bias
        args += rows, size, g.stride(0), x.stride(0)
        if long:
            layer_norm_bwd_long_kernel[(programs,)](*args, ROWS=block, COLS=cols, num_warps=warps)
        else:
            layer_norm_bwd_kernel[(programs,)](*args, ROWS=block, COLS=cols, STAGES=STAGES, num_warps=warps)
        if wanted:
            sum_rows(parts, wanted)
    return grad_input, *affine
