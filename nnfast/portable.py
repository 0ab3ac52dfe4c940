"""The Triton kernels without the compiled extension: for a GPU on a machine that has no compiler.

The extension's gate and autograd formulas (``csrc/gate``, ``csrc/ops``) once more in Python, for tensors on a
GPU. They decide and compute the same, and cost some microseconds more a call. As there, a function answers None, or
False, where the call is torch's.
"""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from nnfast import backend, selftest
from nnfast._torch import disable_autocast, plain_eager
from nnfast.kernels import launcher

_DTYPES = torch.float32, torch.bfloat16, torch.float16

_layer_norm, _layer_norm_backward = launcher("layer_norm"), launcher("layer_norm_backward")
_linear_gelu, _gelu_backward_sum = launcher("linear_gelu"), launcher("gelu_backward_sum")
_adamw = launcher("adamw_")
_clip_coef, _scale_by = launcher("clip_coef"), launcher("scale_by_")


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _open(first: Tensor, *others: Tensor | None) -> bool:
    """Plain eager execution, and plain tensors of our dtypes on one GPU."""
    return (
        isinstance(first, Tensor)
        and _on_gpu(first)
        and backend.forced() in (None, "triton")
        and not backend.no_triton()
        and plain_eager()
        and all(
            t is None
            or (
                type(t) in (Tensor, Parameter)
                and t.dtype in _DTYPES
                and t.layout is torch.strided
                and not t.is_neg()  # conj(z).imag: the kernels would read what lies in memory
                and not t.is_conj()
                and t.device == first.device
            )
            for t in (first, *others)
        )
    )


def _trusted(op: str, t: Tensor, size: int = 1) -> bool:
    """Whether Triton's kernels are known to be right here; asked last, as the first time costs a small case."""
    return backend.forced() is not None or selftest.trusted(op, t, size)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, shape, weight, bias, eps, dtype):
        output, stats = _layer_norm(input, shape, weight, bias, eps, dtype=dtype)
        # torch would save what autocast made of the input, so the input itself may be changed in place.
        ctx.save_for_backward(input if dtype in (None, input.dtype) else input.clone(), stats, weight, bias)
        ctx.shape = shape
        return output

    @staticmethod
    def backward(ctx, grad):
        input, stats, weight, bias = ctx.saved_tensors
        mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        if not torch.is_grad_enabled():
            dx, dw, db = _layer_norm_backward(grad, input, ctx.shape, stats, weight, bias, mask)
        else:  # ATen's, which is differentiable to any order
            kept = input.dim() - len(ctx.shape)
            mean, rstd = (s.to(grad.dtype).view(*input.shape[:kept], *[1] * len(ctx.shape)) for s in stats)
            dx, dw, db = torch.ops.aten.native_layer_norm_backward(
                grad, input.to(grad.dtype), ctx.shape, mean, rstd, weight, bias, mask
            )
            dx = dx if dx is None else dx.to(input.dtype)
        return dx, None, dw, db, None, None


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, approximate):
        output, pre = _linear_gelu(input, weight, bias, approximate=approximate)
        ctx.save_for_backward(input, weight, bias, pre)
        ctx.approximate = approximate
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, pre = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if not torch.is_grad_enabled():
            grad_pre, grad_bias = _gelu_backward_sum(grad, pre, approximate=ctx.approximate)
            with disable_autocast():  # what comes here has the dtype it shall have
                rows = grad_pre.reshape(-1, len(weight))
                grad_input = grad_pre @ weight if mask[0] else None
                grad_weight = rows.t() @ input.reshape(-1, weight.shape[1]) if mask[1] else None
            return grad_input, grad_weight, grad_bias if mask[2] else None, None
        # From the inputs again: through pre the second derivative reaches them.
        leaves = [t for t, wanted in zip((input, weight, bias), mask, strict=True) if wanted]
        with torch.enable_grad():
            output = torch.nn.functional.gelu(
                torch.nn.functional.linear(input, weight, bias), approximate=ctx.approximate
            )
            found = iter(torch.autograd.grad(output, leaves, grad, create_graph=True))
        return *(next(found) if wanted else None for wanted in mask), None


def layer_norm(input, normalized_shape, weight, bias, eps) -> Tensor | None:
    if not _open(input, weight, bias) or not isinstance(normalized_shape, (tuple, list)) or not normalized_shape:
        return None
    shape, dtype = tuple(normalized_shape), input.dtype
    if torch.is_autocast_enabled(input.device.type):
        weight, bias, dtype = *(None if t is None else t.float() for t in (weight, bias)), torch.float32
    if input.shape[-len(shape) :] != shape:
        return None
    if any(t is not None and (t.shape != shape or t.dtype != dtype) for t in (weight, bias)):
        return None
    if not _trusted("layer_norm", input, math.prod(shape)):
        return None
    return _LayerNorm.apply(input, shape, weight, bias, eps, dtype)


def gelu(input, approximate) -> None:
    """torch's own is bound by memory, and cheaper to launch."""


def linear(input, weight, bias) -> None:
    """torch's own is the library's."""


def linear_gelu(input, weight, bias, approximate) -> Tensor | None:
    if not _open(input, weight, bias) or approximate not in ("none", "tanh"):
        return None
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = (None if t is None else t.to(dtype) for t in (input, weight, bias))
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1] or weight.dtype != input.dtype:
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != input.dtype):
        return None
    if not _trusted("linear_gelu", input):
        return None
    return _LinearGelu.apply(input, weight, bias, approximate)


def _read(group: dict, state: dict, scaler: list) -> tuple | None:
    """The arguments of one group's step, or None where it is torch's."""
    params = [p for p in group["params"] if p.grad is not None]
    if group["differentiable"] or not all(p in state for p in params):
        return None
    lr, names = group["lr"], ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    tensor_lr = isinstance(lr, Tensor)
    if tensor_lr and (group["foreach"] or lr.numel() != 1) or any(isinstance(beta, Tensor) for beta in group["betas"]):
        return None
    lists = [params, [p.grad for p in params]]
    lists += [[state[p].get(name) for p in params] for name in names]
    steps = [state[p].get("step") for p in params]
    if not params:
        return ()
    if not all(_open(params[0], *tensors) for tensors in lists):
        return None
    for p, g, *moments in zip(*lists, strict=True):
        if p.numel() and not torch.ops.aten.is_non_overlapping_and_dense(p):
            return None
        if any(t is None or t.shape != p.shape or t.dtype != p.dtype for t in (g, *moments)):
            return None
        if any(t.stride() != p.stride() for t in moments):
            return None
    there = [s.device for s in steps if isinstance(s, Tensor) and s.dtype is torch.float32 and s.numel() == 1]
    host = torch.device("cpu")
    if len(there) != len(steps) or len({*there}) != 1 or there[0] not in (host, params[0].device):
        return None
    if group["capturable"] and there[0] == host:
        return None
    if not all(_trusted("adamw_", t) for t in {p.dtype: p for p in params}.values()):
        return None
    if any(t is not None and t.device != params[0].device for t in scaler):
        return None
    if not group["amsgrad"]:
        lists.append([])
    lists.append([])  # no masters
    numbers = {"weight_decay": group["weight_decay"], "eps": group["eps"]}
    numbers["beta1"], numbers["beta2"] = group["betas"]
    options = {name: float(value) for name, value in numbers.items()}
    decoupled = group["decoupled_weight_decay"]
    rate = {"lr": 0.0, "tensor_lr": lr} if tensor_lr else {"lr": lr}
    return (*lists, steps), {**rate, "maximize": group["maximize"], "decoupled_weight_decay": decoupled, **options}


def adamw_(groups, state, grad_scale, found_inf, clip_coef, master_weights, rounding_seed, skipped) -> bool:
    """All of it, or nothing: ``skipped`` is for the extension."""
    scaler = [grad_scale, found_inf, clip_coef]
    calls = [None if master_weights or rounding_seed else _read(group, state, scaler) for group in groups]
    if any(call is None for call in calls):
        return False
    for lists, options in filter(None, calls):
        _adamw(*lists, **options, grad_scale=grad_scale, found_inf=found_inf, clip_coef=clip_coef)
        changed = [t for k, tensors in enumerate(lists) if k != 1 or grad_scale is not None for t in tensors]
        torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])
    return True


def clip_coef(tensors, max_norm, grad_scale, scales) -> tuple[Tensor, Tensor] | None:
    if not _open(*tensors, grad_scale) or not all(map(torch.ops.aten.is_non_overlapping_and_dense, tensors)):
        return None
    if not all(_trusted("total_norm", t) for t in {t.dtype: t for t in tensors}.values()):
        return None
    norm, coef = _clip_coef(tensors, max_norm, grad_scale)
    if scales:
        _scale_by(tensors, coef)
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
    return norm, coef
