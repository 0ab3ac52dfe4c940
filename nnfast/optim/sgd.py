import torch
from torch.compiler import is_compiling
from torch.optim.sgd import sgd as sgd

from nnfast.optim.native import NativeStep

_OPTIONS = "weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused"


class SGD(NativeStep, torch.optim.SGD):
    r"""``torch.optim.SGD`` whose step is one native call for all parameters.

    The same arguments, groups, state and checkpoints, in both directions. The update, in torch's order
    (``csrc/math/sgd.h``):

        g = g + weight_decay p
        b = momentum b + (1 - dampening) g;  g = b, or g + momentum b under Nesterov
        p = p - lr g

    With ``dampening``, the first step is torch's, which makes the buffers. Dtypes and what is torch's as for
    ``nnfast.optim.AdamW``; torch's own fused kernel is wrong on a CPU in bfloat16 and float16 from 16 elements
    on, and is not used for them. On a GPU without the CUDA kernels torch's code serves.
    """

    _op = "sgd_"
    _torch = staticmethod(sgd)
    _checks_capture = False

    def _call(self, group):
        undamped = isinstance(group["dampening"], int | float) and group["dampening"] == 0
        if group["momentum"] != 0 and undamped and not self.defaults["differentiable"] and not is_compiling():
            # torch starts with a copy of the gradient, which is what a step from zero leaves; with one for each time
            # that a parameter is in the group.
            new = [p for p in group["params"] if p.grad is not None and "momentum_buffer" not in self.state[p]]
            for p in new if len(set(new)) == len(new) else ():
                if not p.grad.is_sparse and p.grad.dtype == p.dtype:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        lists = [], [], []
        options = {
            "has_sparse_grad": self._init_group(group, *lists),
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
            **{name: group[name] for name in _OPTIONS},
        }
        return list(lists), options

    def _torch_step(self, group, lists, options, coef):
        params, _, buffers = lists
        super()._torch_step(group, lists, options, coef)
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _fused_is_wrong(self, lists):
        return any(p.element_size() < 4 for p in lists[0]) or super()._fused_is_wrong(lists)
