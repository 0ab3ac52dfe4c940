"""The norm of many tensors in one launch, and their scaling in one more; a step that clips needs the first alone.

Bound by memory: 4 bytes an element in float for the norm. The tables are AdamW's: which tensors there are, and their
chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnfast.kernels import adamw
from nnfast.kernels.adamw import KIND, KINDS, NUMEL, PARAM
from nnfast.kernels.shared import check, lanes, on

#: Partial sums that the last program adds up at a time.
PARTS = 1024

# By device and stream: how many programs of a launch are done; 0 between launches.
_done: dict[tuple, Tensor] = {}


@triton.jit
def _load(tensors, count, tensor, start, TYPE: tl.constexpr, CHUNK: tl.constexpr):
    i = tl.arange(0, CHUNK)
    p = tl.load(tensors + PARAM * count + tensor).to(tl.pointer_type(TYPE)) + start
    inside = i < tl.load(tensors + NUMEL * count + tensor) - start
    return p + i, tl.load(p + i, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _load_aligned(tensors, count, tensor, start, TYPE: tl.constexpr, CHUNK: tl.constexpr):
    p = tl.multiple_of(tl.load(tensors + PARAM * count + tensor).to(tl.pointer_type(TYPE)) + start, 16)
    p += tl.arange(0, CHUNK)
    return p, tl.load(p).to(tl.float32)


@triton.jit
def _squares(tensors, count, tensor, start, whole, TYPE: tl.constexpr, CHUNK: tl.constexpr):
    if whole:
        p, x = _load_aligned(tensors, count, tensor, start, TYPE, CHUNK)
        s = tl.sum(x * x)
    else:
        p, x, inside = _load(tensors, count, tensor, start, TYPE, CHUNK)
        s = tl.sum(x * x)
    return s


@triton.jit
def _scale(tensors, count, tensor, start, whole, by, TYPE: tl.constexpr, CHUNK: tl.constexpr):
    if whole:
        p, x = _load_aligned(tensors, count, tensor, start, TYPE, CHUNK)
        tl.store(p, (x * by).to(TYPE))
    else:
        p, x, inside = _load(tensors, count, tensor, start, TYPE, CHUNK)
        tl.store(p, (x * by).to(TYPE), mask=inside)


@triton.jit
def norm_kernel(
    tensors, chunks, count,
    parts,  # (programs,), float
    done,  # one int32
    max_norm: tl.float64,
    grad_scale,  # one number on the GPU, or None
    norm,  # one number of any dtype
    coef,  # one float, or None
    PRESENT: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each program sums the squares of its chunk; the last to be done adds these up, in double and in their order."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    chunk = program.to(tl.int64) * 2
    tensor = tl.load(chunks + chunk)
    start = tl.load(chunks + chunk + 1).to(tl.int64) * CHUNK
    kind = tl.load(tensors + KIND * count + tensor)
    whole = (kind < 4) & (start + CHUNK <= tl.load(tensors + NUMEL * count + tensor))
    s = 0.0
    if PRESENT & 1 and kind % 4 == 0:
        s = _squares(tensors, count, tensor, start, whole, tl.float32, CHUNK)
    if PRESENT & 2 and kind % 4 == 1:
        s = _squares(tensors, count, tensor, start, whole, tl.bfloat16, CHUNK)
    if PRESENT & 4 and kind % 4 == 2:
        s = _squares(tensors, count, tensor, start, whole, tl.float16, CHUNK)
    tl.store(parts + program, s)
    tl.debug_barrier()
    if tl.atomic_add(done, 1) == programs - 1:
        sums = tl.zeros((PARTS,), tl.float64)
        for at in range(0, programs, PARTS):
            i = at + tl.arange(0, PARTS)
            sums += tl.load(parts + i, mask=i < programs, other=0.0, volatile=True).to(tl.float64)
        total = tl.sqrt(tl.sum(sums))
        if grad_scale is not None:
            total = total / tl.load(grad_scale).to(tl.float64)
        tl.store(norm, total.to(norm.dtype.element_ty))
        if coef is not None:
            by = max_norm / (total + 1e-6)
            tl.store(coef, tl.where(by > 1.0, 1.0, by).to(tl.float32))  # a NaN stays
        tl.store(done, 0)


@triton.jit
def scale_kernel(tensors, chunks, count, factor, PRESENT: tl.constexpr, CHUNK: tl.constexpr):
    by = tl.load(factor)
    if by == 1.0:
        return
    chunk = tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunks + chunk)
    start = tl.load(chunks + chunk + 1).to(tl.int64) * CHUNK
    kind = tl.load(tensors + KIND * count + tensor)
    whole = (kind < 4) & (start + CHUNK <= tl.load(tensors + NUMEL * count + tensor))
    if PRESENT & 1 and kind % 4 == 0:
        _scale(tensors, count, tensor, start, whole, by, tl.float32, CHUNK)
    if PRESENT & 2 and kind % 4 == 1:
        _scale(tensors, count, tensor, start, whole, by, tl.bfloat16, CHUNK)
    if PRESENT & 4 and kind % 4 == 2:
        _scale(tensors, count, tensor, start, whole, by, tl.float16, CHUNK)


def _tables(tensors: list[Tensor], op: str) -> tuple[Tensor, Tensor, int]:
    check(bool(tensors) and all(t.dtype in KINDS and t.device == tensors[0].device for t in tensors), op)
    at = [t.data_ptr() for t in tensors]
    kinds = [KINDS.index(t.dtype) + (4 if a % 16 else 0) for t, a in zip(tensors, at, strict=True)]
    return adamw.tables_for(tensors[0], [at] * 5 + [[t.numel() for t in tensors], [0] * len(at), kinds])


def _warps() -> int:
    return max(1, adamw.CHUNK // (lanes() * adamw.PER_THREAD))


def _norm(tensors: list[Tensor], dtype: torch.dtype, coef: Tensor | None, max_norm, grad_scale, op: str) -> Tensor:
    norm = torch.zeros((), dtype=dtype, device=tensors[0].device)
    with on(tensors[0]):
        table, chunks, present = _tables(tensors, op)
        if not len(chunks):  # a norm of nothing
            if coef is not None:
                coef.fill_(1)
            return norm
        parts = torch.empty(len(chunks), dtype=torch.float32, device=norm.device)
        stream = torch.cuda.current_stream(norm.device).cuda_stream if norm.is_cuda else 0
        done = _done.get((norm.device, stream))
        if done is None:
            done = torch.zeros(1, dtype=torch.int32, device=norm.device)
            # In a graph that is being captured the zero is yet to be written: it is the graph's alone.
            if not (norm.is_cuda and torch.cuda.is_current_stream_capturing()):
                _done[norm.device, stream] = done
        norm_kernel[(len(chunks),)](
            table, chunks, len(tensors), parts, done, max_norm, grad_scale, norm, coef,
            PRESENT=present, CHUNK=adamw.CHUNK, PARTS=PARTS, num_warps=_warps(),
        )  # fmt: skip
    return norm


def total_norm_triton(tensors: list[Tensor], norm_type: float) -> Tensor:
    """``nnfast::total_norm``."""
    check(norm_type == 2, "total_norm")
    return _norm(tensors, torch.float64, None, 0.0, None, "total_norm")


def clip_coef_triton(tensors: list[Tensor], max_norm: float, grad_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``nnfast::clip_coef``."""
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    coef = torch.empty((), dtype=torch.float32, device=tensors[0].device)
    return _norm(tensors, dtype, coef, max_norm, grad_scale, "clip_coef"), coef


def scale_by_triton(tensors: list[Tensor], factor: Tensor) -> None:
    """``nnfast::scale_by_``."""
    with on(tensors[0]):
        table, chunks, present = _tables(tensors, "scale_by_")
        if len(chunks):
            scale_kernel[(len(chunks),)](
                table, chunks, len(tensors), factor, PRESENT=present, CHUNK=adamw.CHUNK, num_warps=_warps()
            )  # fmt: skip
