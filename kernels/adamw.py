"""AdamW. The maths: ``csrc/math/adamw.h``, whose names the functions here bear.

Bound by memory: read p, g, m, v and write p, m, v, which is 28 bytes an element in float. One launch updates a whole
group, whatever the number, sizes and dtypes of its tensors: a program takes one chunk of one tensor, which it finds by
two tables that stay on the GPU. They are built again only when an address, a size or the distance between two tensors'
steps has changed, so an ordinary step moves nothing but elements.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnfast.kernels.shared import capturing, check, lanes, on, on_gpu

# What a measurement on a GPU should settle.
#: Elements of a tensor that one program takes, and those of a thread.
CHUNK, PER_THREAD = 2048, 8
#: Tensors whose scalars one program forms, where that happens on the GPU.
SCALARS = 128
#: Groups whose tables are kept.
TABLES = 64

KINDS = torch.float32, torch.bfloat16, torch.float16

# Rows of the table of tensors, (FIELDS, tensors), int64. STEP is the address of the step where that is on the GPU, else
# how far the tensor's step is ahead of the first tensor's. KIND is the index in KINDS, and 4 more where an address is
# not a multiple of 16 bytes.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, NUMEL, STEP, KIND = (tl.constexpr(i) for i in range(8))

_tables: dict[tuple, tuple] = {}
# What a recorded CUDA graph reads each time it is replayed.
_kept: list[tuple] = []


@triton.jit
def adamw_moments(grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2):
    return exp_avg + (grad - exp_avg) * one_minus_beta1, exp_avg_sq * beta2 + grad * one_minus_beta2 * grad


@triton.jit
def adamw_param(param, exp_avg, exp_avg_sq, decay, step_size, eps):
    return param * decay - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) + eps)


@triton.jit
def _at(tensors, field: tl.constexpr, count, tensor, start, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    address = tl.load(tensors + field * count + tensor).to(tl.pointer_type(TYPE)) + start
    return tl.multiple_of(address, 16) if WHOLE else address


@triton.jit
def _update_chunk(
    tensors, count, tensor, start, grad_scale, clip_coef, l2, step, TYPE: tl.constexpr, MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps = step
    i = tl.arange(0, CHUNK)
    inside = tl.full((CHUNK,), True, tl.int1) if WHOLE else i < tl.load(tensors + NUMEL * count + tensor) - start
    p = _at(tensors, PARAM, count, tensor, start, TYPE, WHOLE) + i
    g = _at(tensors, GRAD, count, tensor, start, TYPE, WHOLE) + i
    m = _at(tensors, EXP_AVG, count, tensor, start, TYPE, WHOLE) + i
    v = _at(tensors, EXP_AVG_SQ, count, tensor, start, TYPE, WHOLE) + i
    param, grad = tl.load(p, mask=inside, other=0.0).to(tl.float32), tl.load(g, mask=inside, other=0.0).to(tl.float32)
    exp_avg, exp_avg_sq = tl.load(m, mask=inside, other=0.0), tl.load(v, mask=inside, other=0.0)
    if grad_scale is not None:
        grad = tl.div_rn(grad, tl.full((CHUNK,), 1.0, tl.float32) * tl.load(grad_scale).to(tl.float32))
        tl.store(g, grad.to(TYPE), mask=inside)
    if clip_coef is not None:
        grad = grad * tl.load(clip_coef).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    if l2 is not None:
        grad = grad + param * l2
    exp_avg, exp_avg_sq = adamw_moments(
        grad, exp_avg.to(tl.float32), exp_avg_sq.to(tl.float32), one_minus_beta1, beta2, one_minus_beta2
    )
    tl.store(m, exp_avg.to(TYPE), mask=inside)
    tl.store(v, exp_avg_sq.to(TYPE), mask=inside)
    if AMSGRAD:
        top = _at(tensors, MAX_EXP_AVG_SQ, count, tensor, start, TYPE, WHOLE) + i
        before = tl.load(top, mask=inside, other=0.0).to(tl.float32)
        exp_avg_sq = tl.maximum(before, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        tl.store(top, exp_avg_sq.to(TYPE), mask=inside)
    tl.store(p, adamw_param(param, exp_avg, exp_avg_sq, decay, step_size, eps).to(TYPE), mask=inside)


@triton.jit
def _update(
    tensors, count, tensor, start, whole, grad_scale, clip_coef, l2, step, TYPE: tl.constexpr, MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk that is whole and aligned goes without masks and by 16 bytes."""
    if whole:
        _update_chunk(
            tensors, count, tensor, start, grad_scale, clip_coef, l2, step, TYPE, MAXIMIZE, AMSGRAD, CHUNK, True
        )
    else:
        _update_chunk(
            tensors, count, tensor, start, grad_scale, clip_coef, l2, step, TYPE, MAXIMIZE, AMSGRAD, CHUNK, False
        )


@triton.jit
def adamw_kernel(
    tensors,  # (8, count), the table of tensors
    chunks,  # (programs, 2), int32: a tensor, and which of its chunks
    count,
    scalars,  # (3, count), float: decay, step size and eps of each tensor; or None, and then these:
    decay,
    step_size,
    eps,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    grad_scale,  # one number on the GPU, or None
    clip_coef,  # one number on the GPU, or None
    l2,  # a weight decay that is not decoupled, or None
    found_inf,  # one number on the GPU, or None; where it is not 0, nothing changes
    PRESENT: tl.constexpr,  # the kinds that occur, a bit each
    MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    chunk = tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunks + chunk)
    start = tl.load(chunks + chunk + 1).to(tl.int64) * CHUNK
    kind = tl.load(tensors + KIND * count + tensor)
    if scalars is not None:
        decay = tl.load(scalars + tensor)
        step_size = tl.load(scalars + count + tensor)
        eps = tl.load(scalars + 2 * count + tensor)
    whole = (kind < 4) & (start + CHUNK <= tl.load(tensors + NUMEL * count + tensor))
    step = decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps
    if PRESENT & 1 and kind % 4 == 0:
        _update(
            tensors, count, tensor, start, whole, grad_scale, clip_coef, l2, step, tl.float32, MAXIMIZE, AMSGRAD, CHUNK
        )
    if PRESENT & 2 and kind % 4 == 1:
        _update(
            tensors, count, tensor, start, whole, grad_scale, clip_coef, l2, step, tl.bfloat16, MAXIMIZE, AMSGRAD, CHUNK
        )
    if PRESENT & 4 and kind % 4 == 2:
        _update(
            tensors, count, tensor, start, whole, grad_scale, clip_coef, l2, step, tl.float16, MAXIMIZE, AMSGRAD, CHUNK
        )


@triton.jit
def adamw_scalars_kernel(
    tensors,
    scalars,
    count,
    first_step: tl.float64,
    lr: tl.float64,
    device_lr,  # one number on the GPU in place of lr, or None
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    found_inf,
    STEPS_ON_GPU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scalars of ``AdamWStep``, formed in double for each tensor; steps that are on the GPU advance."""
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < count
    step = tl.load(tensors + STEP * count + tensor, mask=inside, other=0)
    if STEPS_ON_GPU:
        at = step.to(tl.pointer_type(tl.float32))
        t = tl.load(at, mask=inside, other=0.0) + 1.0
        tl.store(at, t, mask=inside)
        t = t.to(tl.float64)
    else:
        t = first_step + step.to(tl.float64)
    rate = tl.full((BLOCK,), 1.0, tl.float64) * lr
    if device_lr is not None:
        rate = tl.full((BLOCK,), 1.0, tl.float64) * tl.load(device_lr).to(tl.float64)
    correction2 = tl.sqrt(1.0 - tl.exp(t * log_beta2))
    decay = tl.where(weight_decay != 0, 1.0 - rate * weight_decay, 1.0)  # an infinite rate times 0 is no number
    tl.store(scalars + tensor, decay.to(tl.float32), mask=inside)
    step_size = rate / (1.0 - tl.exp(t * log_beta1)) * correction2
    tl.store(scalars + count + tensor, step_size.to(tl.float32), mask=inside)
    tl.store(scalars + 2 * count + tensor, (eps * correction2).to(tl.float32), mask=inside)


def tables_for(param: Tensor, columns: list[list[int]]) -> tuple[Tensor, Tensor, int]:
    """The two tables on the GPU, and the kinds that occur: those of the last step, as long as nothing has changed."""
    # The stream is part of the key, for a table is filled in the order of one.
    stream = torch.cuda.current_stream(param.device).cuda_stream if param.is_cuda else 0
    at = param.device, stream, columns[PARAM.value][0]
    was, built = _tables.get(at, (None, None))
    if was != columns:

        def copy(host: Tensor) -> tuple[Tensor, Tensor]:
            host = host.pin_memory() if param.is_cuda else host
            return host, host.to(param.device, non_blocking=True)

        if was and was[NUMEL.value] == columns[NUMEL.value] and not capturing(param):
            chunks = built[1]
        else:
            counts = torch.tensor([-(-n // CHUNK) for n in columns[NUMEL.value]])
            tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
            chunk = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
            chunks = copy(torch.stack((tensor, chunk), 1).to(torch.int32))
        built = copy(torch.tensor(columns)), chunks, sum(1 << k for k in {kind % 4 for kind in columns[KIND.value]})
        if not capturing(param):
            _tables.pop(at, None)
            while len(_tables) >= TABLES:
                del _tables[next(iter(_tables))]
            _tables[at] = columns, built
    if capturing(param):
        _kept.append(built)  # with what it is copied from: the copy is part of the graph
    return built[0][1], built[1][1], built[2]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def adamw_triton(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], master_params: list[Tensor], state_steps: list[Tensor], *, lr: float, beta1: float,
    beta2: float, weight_decay: float, eps: float, decoupled_weight_decay: bool = True, maximize: bool = False,
    tensor_lr: Tensor | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None, rounding_seed: int | None = None,
) -> None:  # fmt: skip
    """``nnfast::adamw_``: one step, in place, for all tensors of a group, which are on one GPU."""
    same = all(p.dtype in KINDS and m.dtype == p.dtype for p, m in zip(params, exp_avgs, strict=True))
    check(same and not master_params and rounding_seed is None, "adamw_")
    if not params:
        return
    l2 = None
    if not decoupled_weight_decay:
        l2, weight_decay = weight_decay or None, 0.0
    count, device = len(params), params[0].device
    steps_on_gpu = on_gpu(state_steps[0])
    if not steps_on_gpu:
        if found_inf is not None and found_inf.item() != 0:
            return
        steps = [t + 1 for t in torch.stack([s.reshape(()) for s in state_steps]).tolist()]
        step_column = [int(t - steps[0]) for t in steps]
    else:
        steps, step_column = [0.0], _addresses(state_steps)
    pairs = list(zip(params, grads, strict=True))
    copies = [None if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in pairs]
    read = [g if c is None else c for g, c in zip(grads, copies, strict=True)]
    amsgrad = bool(max_exp_avg_sqs)
    columns = [_addresses(t) for t in (params, read, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or params)]
    columns += [p.numel() for p in params], step_column
    columns.append([
        KINDS.index(p.dtype) + (4 if any(a % 16 for a in addresses) else 0)
        for p, *addresses in zip(params, *columns[:5], strict=True)
    ])  # fmt: skip
    with on(params[0]):
        tensors, chunks, present = tables_for(params[0], columns)
        device_lr = tensor_lr if tensor_lr is not None and on_gpu(tensor_lr) else None
        rate = 0.0 if device_lr is not None else float(lr if tensor_lr is None else tensor_lr)
        if steps_on_gpu or device_lr is not None or any(step_column):
            scalars = torch.empty((3, count), dtype=torch.float32, device=device)
            log_betas = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
            adamw_scalars_kernel[(triton.cdiv(count, SCALARS),)](
                tensors, scalars, count, steps[0], rate, device_lr, *log_betas, weight_decay, eps, found_inf,
                STEPS_ON_GPU=steps_on_gpu, BLOCK=SCALARS, num_warps=4,
            )  # fmt: skip
            decay = step_size = scaled_eps = 0.0
        else:
            scalars, t = None, steps[0]
            correction2 = math.sqrt(1 - beta2**t)
            decay = 1 - rate * weight_decay if weight_decay else 1.0
            step_size = rate / (1 - beta1**t) * correction2
            scaled_eps = eps * correction2
        if len(chunks):
            adamw_kernel[(len(chunks),)](
                tensors, chunks, count, scalars, decay, step_size, scaled_eps, 1 - beta1, beta2, 1 - beta2,
                grad_scale, clip_coef, l2, None if not steps_on_gpu else found_inf,
                PRESENT=present, MAXIMIZE=maximize, AMSGRAD=amsgrad, CHUNK=CHUNK,
                num_warps=max(1, CHUNK // (lanes() * PER_THREAD)),
            )  # fmt: skip
    if not steps_on_gpu:
        torch._foreach_add_(state_steps, 1)
    if grad_scale is not None:
        for grad, copied in zip(grads, copies, strict=True):
            if copied is not None:
                grad.copy_(copied)
