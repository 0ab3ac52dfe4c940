import torch
from torch.compiler import is_compiling
from torch.optim.adam import adam
from torch.optim.adamw import adamw as adamw

from nnfast import portable
from nnfast._torch import graph_capture_health_check, use_grad_for_differentiable
from nnfast.backend import native, torch_serves

_adamw_ = (native or portable).adamw_


class AdamW(torch.optim.AdamW):
    r""":class:`torch.optim.AdamW` whose step is one native call for all parameters.

    The same arguments, groups, state and checkpoints, in both directions. The update, in torch's order
    (Loshchilov and Hutter, 2019; ``csrc/math/adamw.h``)::

        p = p (1 - lr weight_decay)
        m = m + (g - m) (1 - beta1);  v = v beta2 + g^2 (1 - beta2)
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Parameters, gradients and moments share a dtype (float32, float64, bfloat16, float16); the arithmetic is in
    float32, or float64 for float64. Of a DTensor (FSDP2) the local shard is stepped. On a GPU, a step of
    ``capturable`` or ``fused`` parameters, a tensor ``lr`` and a GradScaler's numbers are read there and the host waits
    for nothing. Whatever the kernels do not cover (complex, sparse, differentiable, float64 on a GPU, a device without
    kernels, ...) goes through torch's own code.
    """

    @use_grad_for_differentiable
    def step(self, closure=None):
        """Perform a single optimization step.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.
        """
        graph_capture_health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_compiling() or not self._native_step(self.param_groups):
            self._first_or_torch_step()
        return loss

    def _native_step(self, groups) -> bool:
        """Step ``groups`` natively, or change nothing and return False: state is missing, or the gate is shut."""
        return _adamw_(groups, self.state, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _first_or_torch_step(self) -> None:
        # torch's own _init_group makes the state, and raises for what it refuses: for every group, before any
        # parameter has changed.
        gathered = []
        for group in self.param_groups:
            lists = [], [], [], [], [], []
            beta1, beta2 = group["betas"]
            options = {
                "has_complex": self._init_group(group, *lists),
                "beta1": beta1,
                "beta2": beta2,
                "grad_scale": getattr(self, "grad_scale", None),
                "found_inf": getattr(self, "found_inf", None),
                **{name: group[name] for name in _ADAM_OPTIONS},
            }
            gathered.append((group, lists, options))
        if not is_compiling():
            if self._native_step(self.param_groups):
                return
            for _, lists, options in gathered:
                if _misshapen(lists):
                    adam(*([t.detach().clone() for t in tensors] for tensors in lists), **options)  # torch's error
            torch_serves("AdamW.step")
        for group, lists, options in gathered:
            if is_compiling() or not self._native_step([group]):
                adam(*lists, **options)


def _misshapen(lists) -> bool:
    """Whether the state is of another model, which torch finds out in the middle of the update."""
    params, _, *moments, _ = lists
    return any(p.shape != m.shape for kind in moments for p, m in zip(params, kind, strict=False))


_ADAM_OPTIONS = (
    "amsgrad",
    "lr",
    "weight_decay",
    "eps",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
)
