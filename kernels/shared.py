"""What the launchers share: the GPU at hand, how a tensor lies in rows, and sums over rows that repeat to the bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

#: Rows and columns of a tile when partial sums are added up: few programs, so each reads much at a time.
SUM_ROWS, SUM_COLS, SUM_WARPS = 256, 16, 8


def processors() -> int:
    """Multiprocessors of the current GPU."""
    device = driver.active.get_current_device()
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def lanes() -> int:
    """Threads of a warp."""
    return driver.active.get_current_target().warp_size


def on(tensor: Tensor) -> torch.cuda.device_of:
    """A context in which the tensor's GPU is the current one, as Triton's launches need; its current stream is used."""
    return torch.cuda.device_of(tensor)


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: nothing can then be waited for, and addresses are kept."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_of(t: Tensor, size: int) -> Tensor:
    """``t`` as ``(rows, size)`` whose rows are contiguous and step evenly, by any stride; a copy where it has to be."""
    matrix = t.reshape(t.numel() // size, size)
    return matrix if matrix.stride(1) == 1 or size == 1 else matrix.contiguous()


def check(covered: bool, op: str) -> None:
    if not covered:
        raise NotImplementedError(
            f"nnfast::{op} does not cover this call with Triton; nnfast's functions hand it to torch"
        )


@triton.jit
def sum_rows_kernel(parts, first, second, rows, size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums ``parts[k]``, ``(rows, size)``, over its rows into ``first`` and, for k = 1, ``second``."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    parts += tl.program_id(1).to(tl.int64) * rows * size
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + row.to(tl.int64) * size + col, mask=(row < rows) & (col < size), other=0.0)
    result = tl.sum(total, 0, keep_dims=True)
    if tl.program_id(1) == 0:
        tl.store(first + col, result, mask=col < size)
    else:
        tl.store(second + col, result, mask=col < size)


def sum_rows(parts: Tensor, outputs: list[Tensor]) -> None:
    """The second stage: float sums ``parts``, ``(len(outputs), rows, size)``, over their rows, in one order."""
    count, rows, size = parts.shape
    grid = (triton.cdiv(size, SUM_COLS), count)
    sum_rows_kernel[grid](
        parts, outputs[0], outputs[-1], rows, size, ROWS=SUM_ROWS, COLS=SUM_COLS, num_warps=SUM_WARPS
    )  # fmt: skip
