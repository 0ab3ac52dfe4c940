import inspect

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw as adamw

from nnfast.nn.utils.clip_grad import clip_coef, total_norm
from nnfast.optim.native import NativeStep

_OPTIONS = (
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


class AdamStep(NativeStep):
    """Adam's and AdamW's step, and what ours offer beyond torch's: see ``AdamW``."""

    _op = "adamw_"
    _torch = staticmethod(adam)

    def __init__(self, *args, max_grad_norm=None, master_weights=False, stochastic_rounding=False, **kwargs) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        if master_weights and stochastic_rounding:
            raise ValueError("a parameter with its master is exact: stochastic_rounding is for those without")
        super().__init__(*args, **kwargs)
        self.max_grad_norm = max_grad_norm
        self.master_weights = bool(master_weights)
        self.stochastic_rounding = bool(stochastic_rounding)
        self._seed = torch.initial_seed() & (2**63 - 1)

    # These are attributes, not in the groups or the state, so torch's class can load a checkpoint of ours.
    def __getstate__(self) -> dict:
        names = "max_grad_norm", "master_weights", "stochastic_rounding", "grad_norm", "_seed"
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names if name in self.__dict__}}

    def load_state_dict(self, state_dict) -> None:
        if not self.master_weights:
            return super().load_state_dict(state_dict)
        # torch casts what it loads to the parameter's dtype; this hook, the last one, sees it before that.
        loaded = []
        handle = self.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        groups = zip(loaded[-1]["param_groups"], self.param_groups, strict=True)
        for i, p in ((i, p) for saved, group in groups for i, p in zip(saved["params"], group["params"], strict=True)):
            for key, value in loaded[-1]["state"].get(i, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.dtype in (torch.float32, torch.int16):
                    self.state[p][key] = value.to(p.device)

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        if self.master_weights:
            for p in lists[0]:
                state = self.state[p]
                if p.dtype is torch.bfloat16 and getattr(state.get("master_param"), "dtype", None) is not torch.int16:
                    moments = {k: t.float() for k, t in state.items() if k != "step" and k != "master_param"}
                    state.update(moments)
                    state["master_param"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
            for kind in lists:
                kind.clear()
            super()._init_group(group, *lists)
        return has_complex

    def _call(self, group):
        lists = [], [], [], [], [], []
        beta1, beta2 = group["betas"]
        options = {
            "has_complex": self._init_group(group, *lists),
            "beta1": beta1,
            "beta2": beta2,
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
            **{name: group[name] for name in _OPTIONS},
        }
        return list(lists), options

    def _clip_coef(self) -> Tensor | None:
        """What the gradients are to be multiplied by, or None for nothing; sets ``grad_norm``."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(g.is_sparse for g in grads):
            return None  # the step raises
        scale = getattr(self, "grad_scale", None)
        if (found := clip_coef(grads, self.max_grad_norm, scale)) is not None:
            self.grad_norm, coef = found
            return coef
        norm, exact = total_norm(grads)
        if hasattr(norm, "full_tensor"):
            norm = exact = norm.full_tensor()  # over all ranks
        if scale is not None:
            norm, exact = norm / scale.to(norm.device), exact / scale.to(exact.device)
        self.grad_norm = norm
        coef = torch.clamp(self.max_grad_norm / (exact + 1e-6), max=1.0)
        if coef.device.type != "cpu":
            return coef.float()
        return None if coef == 1 else coef

    def _step_in_float(self, group: dict, lists, options) -> None:
        """torch's step in float32, where some parameters are bfloat16 with a master or stochastic rounding."""
        params, grads, *moments, steps = lists
        lower = [p.dtype is torch.bfloat16 for p in params]
        lows = [self.state[p].get("master_param") if self.master_weights else None for p in params]
        whole = [_join(p, low) if half else p for p, low, half in zip(params, lows, lower, strict=True)]
        lists = [whole] + [
            [t.float() if half else t for t, half in zip(kind, lower, strict=True)] if kind else []
            for kind in (grads, *moments)
        ]
        self._torch(*lists, steps, **options)
        which = [other is group for other in self.param_groups].index(True)
        for i in (i for i, half in enumerate(lower) if half):
            chance = None
            if self.stochastic_rounding:
                seed = hash((self._seed, which, i, int(steps[i]))) & (2**63 - 1)
                chance = torch.Generator(params[i].device).manual_seed(seed)
            for old, new in zip(moments, lists[2:], strict=True):
                if old and old[i].dtype is torch.bfloat16:
                    _split(new[i], old[i], None, chance if old is moments[1] else None)
                elif old and old[i] is not new[i]:
                    old[i].copy_(new[i])
            _split(whole[i], params[i], lows[i], chance)


def _join(p: Tensor, low: Tensor | None) -> Tensor:
    """The float value of a bfloat16 parameter and the low bits of its master (``csrc/cpu/optimizer.h``)."""
    p = p.detach()
    if low is None:
        return p.float()
    return (p.float().view(torch.int32) + low).view(torch.float32)


def _split(value: Tensor, p: Tensor, low: Tensor | None, chance: torch.Generator | None) -> None:
    bits = value.view(torch.int32)
    if low is not None:
        rounded = ((bits + 0x8000) & -0x10000).view(torch.float32)
        low.copy_(torch.where(value.isnan(), 0, bits - rounded.view(torch.int32)))
    elif chance is not None:
        r = torch.randint(0x10000, value.shape, generator=chance, dtype=torch.int32, device=value.device)
        rounded = ((bits + r) & -0x10000).view(torch.float32)
    else:
        rounded = value
    p.copy_(torch.where(value.isnan(), value, rounded))


def _with_ours(theirs: type):
    """torch's signature, followed by the arguments that only ours have."""
    ours = inspect.signature(AdamStep.__init__).parameters.values()
    signature = inspect.signature(theirs)
    keywords = [p for p in ours if p.kind is p.KEYWORD_ONLY]
    return signature.replace(parameters=[*signature.parameters.values(), *keywords])


class AdamW(AdamStep, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` whose step is one native call for all parameters.

    The same arguments, groups, state and checkpoints, in both directions. The update, in torch's order
    (Loshchilov and Hutter, 2019; ``csrc/math/adamw.h``):

        p = p (1 - lr weight_decay)
        m = m + (g - m) (1 - beta1);  v = v beta2 + g^2 (1 - beta2)
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Parameters and gradients share a dtype (float32, float64, bfloat16, float16), and the moments have that or float32;
    the arithmetic is in float32, or float64 for float64. Of a DTensor (FSDP2) the local shard is stepped. On a GPU, the
    step count of ``capturable`` or ``fused`` parameters, a tensor ``lr`` and a GradScaler's numbers are read there, so
    that the CPU does not wait. What the kernels do not cover (complex, sparse, differentiable, float64 on a GPU, a
    device without kernels, a parameter whose memory has gaps, ...) goes through torch's own code, parameter by
    parameter. With ``fused=True`` on a CPU, that is torch's loop where its fused kernel is wrong: for parameters with
    gaps, and for gradients of other strides.

    Args beyond torch's, keyword only:
        max_grad_norm (float, optional): clips as ``clip_grad_norm_`` before the step would, without writing the
            gradients: they are multiplied as the step reads them, and ``p.grad`` stays unclipped.
            ``optimizer.grad_norm`` is the norm before clipping, over all groups, and over all ranks of DTensors.
        master_weights (bool): a bfloat16 parameter keeps the low 16 bits of its float32 value in the state, as
            ``master_param`` (int16), and float32 moments: it trains as a float32 parameter does, and its value is that
            one rounded to bfloat16. Default: ``False``
        stochastic_rounding (bool): a bfloat16 parameter, and ``exp_avg_sq``, is rounded up or down by chance, so that
            small updates count on average. Repeatable under ``torch.manual_seed``. Default: ``False``
    """

    __signature__ = _with_ours(torch.optim.AdamW)
