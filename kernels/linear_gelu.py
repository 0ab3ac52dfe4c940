"""Linear+GELU. The maths: ``csrc/math/gelu.h``, whose names the functions here bear.

Forward, in 16 bits: one persistent product whose tiles end in bias, rounding and GELU, so that the pre-activation is
written once and not read again. Its operands come through tensor descriptors (TMA) where the GPU and the strides allow
it, else through pointers. In float32 the product is cuBLAS's, as torch's flags (TF32) want it, and so is every product
of the backward; there one pass over grad and pre-activation gives dGELU and the partial sums of the bias's gradient.

Where another Linear reads the GELU, the gradient that it sends back is a product too, whose tiles end with that pass:
the gradients of the GELU's output and input, and the sums of the latter, are written once each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from nnfast.kernels.shared import capturing, check, on, processors, rows_of, sum_rows

# What a measurement on a GPU should settle.
#: The tiles that are tried, once for each shape class: (rows, columns, depth, warps, stages).
TILES_TMA = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4))
TILES = ((128, 128, 32, 4, 4), (128, 128, 64, 8, 3), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4))
TILES_ODD = ((64, 64, 32, 4, 4),)  # rows that are no multiples of 16 bytes
TILES_HIP = ((128, 128, 32, 4, 2), (128, 64, 32, 4, 2), (64, 64, 32, 4, 2))
#: The same for the product that ends with the GELU's backward, and so holds more.
TILES_TMA_BACKWARD = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4))
TILES_BACKWARD = ((128, 128, 64, 8, 3), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4))
#: Rows of tiles that share columns of the weight while they are in the cache.
GROUP = 8
#: The backward's pass: rows and columns of a tile, its warps, and programs on a multiprocessor.
GRAD_ROWS, GRAD_COLS, GRAD_WARPS, GRAD_PROGRAMS = 16, 256, 8, 4

HALF = torch.bfloat16, torch.float16

# Shape class -> its best tile.
_tuned: dict[tuple, tuple] = {}


@triton.jit
def _sides(x, small):
    return tl.where(x < 0.0, small, 1.0 - small), tl.where(x < 0.0, 1.0 - small, small)


@triton.jit
def normal_cdf(x):
    """P(X < x), P(X > x); the lesser is erfc(a / sqrt 2) / 2 = 2^(a p(a) - 1), a = |x|, p: ``csrc/math/gelu.h``."""
    a = tl.minimum(tl.abs(x), 14.2)
    p = a * 5.281241399757164e-08 - 2.0457730443013133e-06
    p = p * a + 2.7296080588712357e-05
    p = p * a - 0.00013086646504234523
    p = p * a - 0.0002569342905189842
    p = p * a + 0.007198233623057604
    p = p * a - 0.05257304012775421
    p = p * a - 0.45918846130371094
    p = p * a - 1.151106834411621
    return _sides(x, tl.exp2(p * a - 1.0))


@triton.jit
def sigmoid(x):
    z = tl.exp(-tl.abs(x))
    return _sides(x, z / (z + 1.0))


@triton.jit
def gelu(x, TANH: tl.constexpr):
    if TANH:
        lower, upper = sigmoid(x * (1.5957691216057308 + x * x * 0.07135481627260025))
    else:
        lower, upper = normal_cdf(x)
    return x * lower


@triton.jit
def gelu_grad(x, TANH: tl.constexpr):
    if TANH:
        square = x * x
        lower, upper = sigmoid(x * (1.5957691216057308 + square * 0.07135481627260025))
        return lower + x * (lower * upper) * (1.5957691216057308 + square * (3 * 0.07135481627260025))
    else:
        lower, upper = normal_cdf(x)
        return lower + x * (0.3989422804014327 * tl.exp(x * x * -0.5))


@triton.jit
def _finish(product, bias, out, pre, row, col, rows, cols, TANH: tl.constexpr, TMA: tl.constexpr):
    """The end of a tile: bias, the pre-activation in its own dtype, and the GELU of what was stored."""
    ROWS: tl.constexpr = product.shape[0]
    COLS: tl.constexpr = product.shape[1]
    at_col = col + tl.arange(0, COLS)
    if bias is not None:
        product += tl.load(bias + at_col, mask=at_col < cols, other=0.0).to(tl.float32)[None, :]
    if TMA:
        rounded = product.to(pre.dtype)
        pre.store([row, col], rounded)
        out.store([row, col], gelu(rounded.to(tl.float32), TANH).to(out.dtype))
    else:
        rounded = product.to(pre.dtype.element_ty)
        at_row = row + tl.arange(0, ROWS)
        at = at_row[:, None].to(tl.int64) * cols + at_col[None, :]
        inside = (at_row < rows)[:, None] & (at_col < cols)[None, :]
        tl.store(pre + at, rounded, mask=inside)
        tl.store(out + at, gelu(rounded.to(tl.float32), TANH).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place(tile, tiles_down, tiles_across, GROUP: tl.constexpr):
    """Row and column of a tile of the result: GROUP rows of them share columns while these are in the cache."""
    in_group = GROUP * tiles_across
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _halves(product):
    """The left and the right half: one at a time takes less shared memory on the way out, and fewer registers."""
    ROWS: tl.constexpr = product.shape[0]
    COLS: tl.constexpr = product.shape[1]
    return tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _part(matrix, row, col, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """ROWS x COLS of a matrix, 0 outside of it."""
    if TMA:
        return matrix.load([row, col])
    else:
        at_row, at_col = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        inside = (at_row < rows)[:, None] & (at_col < cols)[None, :]
        return tl.load(matrix + at_row[:, None].to(tl.int64) * stride + at_col[None, :], mask=inside, other=0.0)


@triton.jit
def linear_gelu_fwd_kernel(
    x,  # (rows, depth), a row every x_stride elements; as weight, out and pre, a descriptor where TMA is set
    weight,  # (cols, depth), a row every weight_stride elements
    bias,  # (cols,) or None
    out,  # (rows, cols)
    pre,  # (rows, cols)
    rows,
    cols,
    depth,
    x_stride,
    weight_stride,
    TANH: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0)):
        down, across = _place(tile, tiles_down, tiles_across, GROUP)
        row, col = down * ROWS, across * COLS
        product = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, depth, DEPTH):
            a = _part(x, row, start, rows, depth, x_stride, ROWS, DEPTH, TMA)
            b = _part(weight, col, start, cols, depth, weight_stride, COLS, DEPTH, TMA)
            product = tl.dot(a, b.T, product)
        left, right = _halves(product)
        _finish(left, bias, out, pre, row, col, rows, cols, TANH, TMA)
        _finish(right, bias, out, pre, row, col + COLS // 2, rows, cols, TANH, TMA)


@triton.jit
def _finish_backward(
    product, pre, grad, grad_pre, parts, down, col, rows, cols, TANH: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """The end of a tile: the gradient of the GELU's output in its own dtype, dGELU of what was stored, and its sums."""
    ROWS: tl.constexpr = product.shape[0]
    COLS: tl.constexpr = product.shape[1]
    row = down * ROWS
    x = _part(pre, row, col, rows, cols, cols, ROWS, COLS, TMA).to(tl.float32)
    at_col = col + tl.arange(0, COLS)
    if TMA:
        rounded = product.to(grad.dtype)
        stored = (rounded.to(tl.float32) * gelu_grad(x, TANH)).to(grad.dtype)
        grad.store([row, col], rounded)
        grad_pre.store([row, col], stored)
    else:
        rounded = product.to(grad.dtype.element_ty)
        stored = (rounded.to(tl.float32) * gelu_grad(x, TANH)).to(grad.dtype.element_ty)
        at_row = row + tl.arange(0, ROWS)
        at = at_row[:, None].to(tl.int64) * cols + at_col[None, :]
        inside = (at_row < rows)[:, None] & (at_col < cols)[None, :]
        tl.store(grad + at, rounded, mask=inside)
        tl.store(grad_pre + at, stored, mask=inside)
    # Rows beyond the last have a product of 0.
    tl.store(parts + down.to(tl.int64) * cols + at_col, tl.sum(stored.to(tl.float32), 0), mask=at_col < cols)


@triton.jit
def gelu_linear_bwd_kernel(
    grad_out,  # (rows, depth), a row every grad_stride elements; as weight, pre, grad and grad_pre, a descriptor
    weight,  # (depth, cols), a row every weight_stride elements; BY_COLUMNS: (cols, depth)
    pre,  # (rows, cols)
    grad,  # (rows, cols)
    grad_pre,  # (rows, cols)
    parts,  # (tiles down, cols), float: sums of grad_pre as it is stored
    rows,
    cols,
    depth,
    grad_stride,
    weight_stride,
    TANH: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0)):
        down, across = _place(tile, tiles_down, tiles_across, GROUP)
        row, col = down * ROWS, across * COLS
        product = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, depth, DEPTH):
            a = _part(grad_out, row, start, rows, depth, grad_stride, ROWS, DEPTH, TMA)
            if BY_COLUMNS:
                b = _part(weight, col, start, cols, depth, weight_stride, COLS, DEPTH, TMA).T
            else:
                b = _part(weight, start, col, depth, cols, weight_stride, DEPTH, COLS, TMA)
            product = tl.dot(a, b, product)
        left, right = _halves(product)
        a, b = _halves(left)
        c, d = _halves(right)
        _finish_backward(a, pre, grad, grad_pre, parts, down, col, rows, cols, TANH, TMA)
        _finish_backward(b, pre, grad, grad_pre, parts, down, col + COLS // 4, rows, cols, TANH, TMA)
        _finish_backward(c, pre, grad, grad_pre, parts, down, col + COLS // 2, rows, cols, TANH, TMA)
        _finish_backward(d, pre, grad, grad_pre, parts, down, col + COLS // 4 * 3, rows, cols, TANH, TMA)


@triton.jit
def gelu_bwd_kernel(
    grad,  # (rows, cols)
    pre,  # (rows, cols)
    grad_pre,  # (rows, cols)
    parts,  # (programs, cols), float: sums of grad_pre as it is stored
    rows,
    cols,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    program = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside, at = (row < rows) & (col < cols), row * cols + col
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        stored = (g * gelu_grad(x, TANH)).to(grad_pre.dtype.element_ty)
        tl.store(grad_pre + at, stored, mask=inside)
        total += stored.to(tl.float32)
    tl.store(parts + program * cols + col, tl.sum(total, 0, keep_dims=True), mask=col < cols)


def _by_16_bytes(*matrices: Tensor) -> bool:
    """Whether addresses and steps from row to row are multiples of 16 bytes, as TMA wants."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in matrices)


def _grid(tile: tuple, out: Tensor) -> tuple[int]:
    return (min(triton.cdiv(out.shape[0], tile[0]) * triton.cdiv(out.shape[1], tile[1]), processors()),)


def _options(tile: tuple) -> dict[str, int]:
    rows, cols, depth, warps, stages = tile
    return {"ROWS": rows, "COLS": cols, "DEPTH": depth, "GROUP": GROUP, "num_warps": warps, "num_stages": stages}


def _described(tma: bool, *matrices: tuple[Tensor, int, int]) -> list:
    """Each matrix, or a descriptor of its parts of so many rows and columns."""
    return [TensorDescriptor.from_tensor(t, [rows, cols]) if tma else t for t, rows, cols in matrices]


def _launch(tile, x, weight, bias, out, pre, tanh, tma) -> None:
    rows, cols, depth, *_ = tile
    matrices = (x, rows, depth), (weight, cols, depth), (out, rows, cols // 2), (pre, rows, cols // 2)
    a, b, *results = _described(tma, *matrices)
    linear_gelu_fwd_kernel[_grid(tile, out)](
        a, b, bias, *results, *out.shape, x.shape[1], x.stride(0), weight.stride(0),
        TANH=tanh, TMA=tma, **_options(tile),
    )  # fmt: skip


def _launch_backward(tile, grad_out, weight, pre, grad, grad_pre, parts, by_columns, tanh, tma) -> None:
    rows, cols, depth, *_ = tile
    part = rows, cols // 4
    matrices = (grad_out, rows, depth), (weight, *((cols, depth) if by_columns else (depth, cols)))
    described = _described(tma, *matrices, (pre, *part), (grad, *part), (grad_pre, *part))
    gelu_linear_bwd_kernel[_grid(tile, pre)](
        *described, parts, *pre.shape, grad_out.shape[1], grad_out.stride(0), weight.stride(0),
        TANH=tanh, BY_COLUMNS=by_columns, TMA=tma, **_options(tile),
    )  # fmt: skip


def _fuses(dtype: torch.dtype) -> bool:
    """Whether the current GPU takes products of 16 bits by Triton's kernels."""
    target = driver.active.get_current_target()
    return dtype in HALF and (target.backend == "hip" or target.arch >= 80)


def _tiles(even: bool, with_tma: tuple, without: tuple) -> tuple[tuple, bool]:
    """The tiles to try, and whether they come and go by TMA; ``even``: every row lies on 16 bytes."""
    target = driver.active.get_current_target()
    nvidia = target.backend == "cuda"
    tma = even and nvidia and target.arch >= 90
    return TILES_ODD if not even else TILES_HIP if not nvidia else with_tma if tma else without, tma


def _tile_for(launch, tiles: tuple, x: Tensor, weight: Tensor, *rest) -> tuple:
    """The fastest tile for this shape class, measured at its first call. The outputs are fresh memory, so running the
    kernel again changes nothing that anybody sees."""
    flags = (flag for flag in rest if type(flag) is bool)
    key = launch, x.device, x.dtype, x.shape[0].bit_length(), weight.shape, *flags
    if key not in _tuned:
        if capturing(x):
            return tiles[0]
        benchmark = driver.active.get_benchmarker()

        def seconds(tile):
            try:
                return benchmark(lambda: launch(tile, x, weight, *rest), quantiles=(0.5,))
            except OutOfResources:  # this GPU has less shared memory than the tile wants
                return float("inf")

        _tuned[key] = min(tiles, key=seconds)
    return _tuned[key]


def linear_gelu_triton(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none", want_pre: bool = True
) -> tuple[Tensor, Tensor]:
    """``nnfast::linear_gelu``: the output and the pre-activation, wanted or not, each ``(*, out_features)``."""
    check(input.dtype in (*HALF, torch.float32) and weight.dtype == input.dtype, "linear_gelu")
    with on(input):
        if not _fuses(input.dtype) or not input.numel() or not weight.numel():
            pre = F.linear(input, weight, bias)
            return F.gelu(pre, approximate=approximate), pre
        output, pre = (input.new_empty((*input.shape[:-1], weight.shape[0])) for _ in range(2))
        x, weight = rows_of(input, input.shape[-1]), rows_of(weight, weight.shape[1])
        matrices = x, weight, output.view(len(x), -1), pre.view(len(x), -1)
        tiles, tma = _tiles(_by_16_bytes(*matrices), TILES_TMA, TILES)
        args = *matrices[:2], None if bias is None else bias.contiguous(), *matrices[2:], approximate == "tanh", tma
        _launch(_tile_for(_launch, tiles, *args), *args)
    return output, pre


def gelu_linear_backward_triton(
    grad_out: Tensor, weight: Tensor, input: Tensor, *, approximate: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """``nnfast::gelu_linear_backward``: the gradients of the GELU's output and input, and the sums of the latter."""
    types = (*HALF, torch.float32)
    check(input.dtype in types and weight.dtype == grad_out.dtype == input.dtype, "gelu_linear_backward")
    depth, cols = weight.shape
    if grad_out.shape != (*input.shape[:-1], depth) or input.shape[-1] != cols:
        raise RuntimeError("nnfast::gelu_linear_backward: grad_out or weight does not fit the input")
    with on(input):
        if not _fuses(input.dtype) or not input.numel() or not grad_out.numel():
            grad = grad_out @ weight
            return grad, *gelu_backward_sum_triton(grad, input, approximate=approximate)
        by_columns = weight.stride(0) == 1 and weight.stride(1) != 1
        matrix = rows_of(weight.t() if by_columns else weight, depth if by_columns else cols)
        g, pre = rows_of(grad_out, depth), input.contiguous().view(-1, cols)
        grad, grad_input = (input.new_empty(input.shape) for _ in range(2))
        matrices = g, matrix, pre, grad.view(-1, cols), grad_input.view(-1, cols)
        tiles, tma = _tiles(_by_16_bytes(*matrices), TILES_TMA_BACKWARD, TILES_BACKWARD)
        parts = input.new_empty((1, triton.cdiv(len(g), min(tile[0] for tile in tiles)), cols), dtype=torch.float32)
        args = *matrices, parts, by_columns, approximate == "tanh", tma
        tile = _tile_for(_launch_backward, tiles, *args)
        _launch_backward(tile, *args)
        sums = input.new_empty(cols)
        sum_rows(parts[:, : triton.cdiv(len(g), tile[0])], [sums])
    return grad, grad_input, sums


def gelu_backward_sum_triton(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """``nnfast::gelu_backward_sum``: the GELU's gradient, and its sums over all dimensions but the last."""
    check(input.dtype in (*HALF, torch.float32) and input.dim() > 0, "gelu_backward_sum")
    cols = input.shape[-1]
    grad_input, grad_bias = torch.empty_like(input, memory_format=torch.contiguous_format), input.new_empty(cols)
    rows = input.numel() // cols if cols else 0
    if not rows:
        return grad_input, grad_bias.zero_()
    if 0 in grad_output.stride():  # expanded, as y.sum() gives it: ours would need a whole one
        grad_input = torch.ops.aten.gelu_backward(grad_output, input.contiguous(), approximate=approximate)
        return grad_input, grad_input.view(-1, cols).sum(0)
    with on(input):
        across = triton.cdiv(cols, GRAD_COLS)
        down = min(triton.cdiv(rows, GRAD_ROWS), max(1, GRAD_PROGRAMS * processors() // across))
        parts = input.new_empty((1, down, cols), dtype=torch.float32)
        gelu_bwd_kernel[(across, down)](
            grad_output.contiguous(), input.contiguous(), grad_input, parts, rows, cols,
            TANH=approximate == "tanh", ROWS=GRAD_ROWS, COLS=GRAD_COLS, num_warps=GRAD_WARPS,
        )  # fmt: skip
        sum_rows(parts, [grad_bias])
    return grad_input, grad_bias
