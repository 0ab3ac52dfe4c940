import functools
import types

import torch
import torch.nn.utils.clip_grad as _torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils import clip_grads_with_norm_ as _clip_grads_with_norm_
from torch.nn.utils import get_total_norm as _get_total_norm

from nnfast import backend


def __getattr__(name: str):
    return getattr(_torch, name)


def total_norm(tensors: list[Tensor], norm_type: float = 2.0, foreach: bool | None = None) -> tuple[Tensor, Tensor]:
    """The norm that torch's ``get_total_norm`` gives, and the same before rounding where ours served."""
    norms = _ours(tensors, norm_type)
    if norms is None:
        if tensors:
            backend.torch_serves("get_total_norm")
        norm = _get_total_norm(tensors, norm_type, foreach=foreach)
        return norm, norm
    return norms


def _ours(tensors: list[Tensor], norm_type: float) -> tuple[Tensor, Tensor] | None:
    if backend.native is None or is_compiling():
        return None
    return backend.native.total_norm(tensors, norm_type)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    # Each p.grad is asked for once, and not by := in the comprehension, which the compiler cannot read.
    return [grad for grad in [p.grad for p in parameters] if grad is not None]


def clip_coef(
    tensors: list[Tensor], max_norm: float, grad_scale: Tensor | None = None, scales: bool = False
) -> tuple[Tensor, Tensor] | None:
    """On a GPU, by one launch that the host does not wait for: the tensors' norm, divided by ``grad_scale``, and the
    factor that clips it; with ``scales``, another launch multiplies them by it. None where the call is torch's."""
    if backend.native is None or not tensors or tensors[0].device.type == "cpu" or is_compiling():
        return None
    return backend.native.clip_coef(tensors, max_norm, grad_scale, scales)


def _is_flag(foreach: bool | None) -> bool:
    """Whether torch takes it for one: of anything else it asks more."""
    return foreach is None or isinstance(foreach, bool)


def _check_finite(norm: Tensor, tensors: list[Tensor], norm_type: float) -> None:
    if not norm.isfinite():
        _get_total_norm(tensors, norm_type, error_if_nonfinite=True)  # torch's error


@functools.wraps(_get_total_norm)
def get_total_norm(tensors, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    with torch.no_grad():
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        norm_type = float(norm_type)
        if not tensors or not _is_flag(foreach):
            return _get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
        norm, _ = total_norm(tensors, norm_type, foreach)
        if error_if_nonfinite:
            _check_finite(norm, tensors, norm_type)
        return norm


def _scale(grads: list[Tensor], max_norm: float, norm: Tensor) -> bool:
    """Clip; False where that is left to torch."""
    if backend.native is None or is_compiling() or norm.device.type != "cpu" or not isinstance(max_norm, (int, float)):
        return False
    # torch's own arithmetic: a NaN stays, and the limit is 1.
    coef = torch.clamp(max_norm / (norm + 1e-6), max=1.0).item()
    return coef == 1 or backend.native.scale_(grads, coef)


@functools.wraps(_clip_grads_with_norm_)
def clip_grads_with_norm_(parameters, max_norm, total_norm, foreach=None):
    with torch.no_grad():
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        grads = _gradients(parameters)
        plain = type(total_norm) is Tensor and total_norm.dim() == 0
        if not plain or not _is_flag(foreach) or not _scale(grads, float(max_norm), total_norm):
            if grads:
                backend.torch_serves("clip_grads_with_norm_")
            _clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)


@functools.wraps(_torch.clip_grad_norm_)
def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    with torch.no_grad():
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        else:
            is_generator = isinstance(parameters, types.GeneratorType)
            parameters = list(parameters)
            if is_generator and not parameters:
                return _torch.clip_grad_norm_((p for p in ()), max_norm, norm_type, error_if_nonfinite, foreach)
        grads = _gradients(parameters)
        # With error_if_nonfinite the norm may raise, which must come before any change: below, the host waits for it.
        two = isinstance(norm_type, (int, float)) and norm_type == 2
        if two and isinstance(max_norm, (int, float)) and not error_if_nonfinite:
            found = clip_coef(grads, float(max_norm), scales=True)
            if found is not None:
                return found[0]
        on_cpu = grads and grads[0].device.type == "cpu" and _is_flag(foreach)
        norms = _ours(grads, float(norm_type)) if on_cpu else None
        if norms is None:
            if grads:
                backend.torch_serves("clip_grad_norm_")
            return _torch.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        norm, exact = norms
        if error_if_nonfinite:
            _check_finite(norm, grads, float(norm_type))
        _scale(grads, float(max_norm), exact)
        return norm
