"""What our optimizers share: a step that is one native call, and torch's own code for what the kernels do not cover."""

import numbers

import torch
from torch import Tensor
from torch.compiler import is_compiling

from nnfast import backend
from nnfast._torch import graph_capture_health_check, outside_graphs, use_grad_for_differentiable
from nnfast.compiled import step_is_ours


class NativeStep:
    """The base of our optimizers, before torch's class. Each of them has:

    ``_op``, the native call's name; ``_torch``, torch's function for the same step; and ``_call(group)``, which gives
    that function's lists and options, making missing state and raising what torch raises.
    """

    _op: str
    _checks_capture = True
    # What AdamW and Adam offer beyond torch's.
    max_grad_norm: float | None = None
    master_weights = False
    stochastic_rounding = False
    grad_norm: Tensor | None = None

    @use_grad_for_differentiable
    def step(self, closure=None):
        """Perform a single optimization step.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.
        """
        if self._checks_capture:
            graph_capture_health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What is set on an optimizer while it is traced, as the norm is, is lost.
        if is_compiling() and (step_is_ours(self) or self.max_grad_norm is not None):
            self._step_outside_graphs()
        else:
            self._step()
        return loss

    def _step(self) -> None:
        coef = None if self.max_grad_norm is None else self._clip_coef()
        if is_compiling() or self._native_step(coef) is not True:
            self._first_or_torch_step(coef)

    # torch.compile breaks its graph around a step in any case: for torch's own, too.
    _step_outside_graphs = outside_graphs(_step)

    def _native_step(self, coef: Tensor | None, skipped: set[Tensor] | None = None) -> bool | list[list[Tensor]]:
        """True where all parameters but the skipped ones were stepped. Else none was: False where nothing is ours (a
        shut gate), or the parameters that torch must step (state is missing, ...), group by group."""
        scale, inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        seed = self._seed if self.stochastic_rounding else None
        if backend.native is None:
            return False
        step = getattr(backend.native, self._op)
        return step(self.param_groups, self.state, scale, inf, coef, self.master_weights, seed, skipped)

    def _first_or_torch_step(self, coef: Tensor | None) -> None:
        if is_compiling():
            calls = [self._call(group) for group in self.param_groups]
            for group, (lists, options) in zip(self.param_groups, calls, strict=True):
                self._torch_step(group, lists, options, coef)
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = {p: dict(self.state[p]) for p in params if p in self.state}
        try:
            calls, left = self._made_ready(coef)
        except BaseException:
            # Half of the state may have been made when memory ran out.
            for p in params:
                if p in before:
                    self.state[p].clear()
                    self.state[p].update(before[p])
                else:
                    self.state.pop(p, None)
            raise
        if left is True:
            return
        backend.torch_serves(f"{type(self).__name__}.step")
        # First torch's, which can fail on the way.
        for group, (lists, options) in zip(self.param_groups, calls, strict=True):
            if lists[0]:
                self._torch_step(group, lists, options, coef)
        if left:
            self._native_step(coef, {p for group in left for p in group})

    def _made_ready(self, coef: Tensor | None) -> tuple[list, bool | list[list[Tensor]]]:
        """What is left to do once all state is there: torch's calls, and what `_native_step` says."""
        # torch's own _init_group makes the state, and raises for what it refuses: for every group, before any
        # parameter has changed.
        calls = [self._call(group) for group in self.param_groups]
        left = self._native_step(coef)
        if left is True:
            return calls, left
        for i, (lists, options) in enumerate(calls):
            theirs = range(len(lists[0]))
            if left:
                ids = {id(p) for p in left[i]}
                theirs = [k for k, p in enumerate(lists[0]) if id(p) in ids]
            calls[i] = [[kind[k] for k in theirs] if kind else kind for kind in lists], options
            if self._may_fail(*calls[i]):
                self._rehearse(*calls[i])
        return calls, left

    def _torch_step(self, group: dict, lists: list[list], options: dict, coef: Tensor | None) -> None:
        """torch's own step, but not its fused kernel where that is wrong, for it takes all tensors for dense and for
        laid out alike."""
        params, grads = lists[:2]
        on_cpu = all(p.device.type == "cpu" for p in params)
        kept = self.master_weights or self.stochastic_rounding
        kept = kept and any(p.dtype is torch.bfloat16 for p in params)
        if kept or coef is not None or (options.get("fused") and on_cpu and self._fused_is_wrong(lists)):
            scale, inf = options.get("grad_scale"), options.get("found_inf")
            if inf is not None and inf.item():
                return
            if scale is not None:
                for g in grads:
                    g.div_(scale)
                options = {**options, "grad_scale": None, "found_inf": None}
            if "fused" in options:
                options = {**options, "fused": False, "foreach": False}
            if coef is not None:
                lists = [params, [g * coef.to(g.device, g.dtype) for g in grads], *lists[2:]]
        if kept:
            self._step_in_float(group, lists, options)
        else:
            self._torch(*lists, **options)

    def _fused_is_wrong(self, lists: list[list]) -> bool:
        return not all(
            torch.ops.aten.is_non_overlapping_and_dense(p)
            and all(t is None or t.stride() == p.stride() for t in tensors if t is None or t.dim())
            for p, *tensors in zip(*(kind for kind in lists if kind), strict=True)
            if p.dim() and p.numel()
        )

    def _may_fail(self, lists: list[list], options: dict) -> bool:
        """Whether torch may find out in the middle of the update what it refuses: an option that is no number or out of
        its range, the state of another model, or, where ours would have served but for it, state of another kind."""
        if not all(_is_number(options.get(name, 0)) for name in _NUMBERS):
            return True
        betas = options.get("beta1", 0), options.get("beta2", 0)
        if not all(isinstance(beta, Tensor) or 0 <= beta < 1 for beta in betas):
            return True
        params, grads, *state = lists
        if any(isinstance(g, Tensor) and g.dtype != p.dtype for p, g in zip(params, grads, strict=True)):
            return True
        steps = state.pop() if len(state) > 1 else None  # SGD counts none, and makes its buffers on the way
        on_cpu = all(p.device.type == "cpu" for p in params)
        if on_cpu and not backend.available("cpu") and backend.forced() != "torch":
            any_dtype = self.master_weights or self.stochastic_rounding
            pairs = [(p, t) for kind in (params, *state) for p, t in zip(params, kind, strict=False)]
            pairs = [(p, t) for p, t in pairs if t is not None or steps is not None]
            return not (all(map(_is_number, steps or ())) and all(_is_of(p, t, any_dtype) for p, t in pairs))
        return any(
            isinstance(t, Tensor) and t.dim() > 0 and t.shape != p.shape
            for kind in state
            for p, t in zip(params, kind, strict=False)
        )

    def _rehearse(self, lists: list[list], options: dict) -> None:
        """torch's error, if it has one: its loop on copies. Not its fused kernel, which takes all tensors for dense."""
        whole = self.master_weights or self.stochastic_rounding
        off = {"fused": False, "foreach": False, "grad_scale": None, "found_inf": None}
        options = {name: off.get(name, value) for name, value in options.items()}
        self._torch(*([_copy(t, whole) for t in kind] for kind in lists), **options)


def _overlaps(t: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _copy(t: Tensor | float | None, whole: bool) -> Tensor | float | None:
    """Another that torch refuses for the same reasons; ``whole``: bfloat16 in float, as the step computes then."""
    if not isinstance(t, Tensor):
        return t
    with torch.inference_mode(t.is_inference()):
        if not t.is_nested and t.layout is torch.strided and _overlaps(t):
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return t.detach().float() if whole and t.dtype is torch.bfloat16 else t.detach().clone()


_NUMBERS = "lr", "weight_decay", "eps", "beta1", "beta2", "momentum", "dampening", "alpha"


def _is_number(o) -> bool:
    if isinstance(o, Tensor):
        return not (o.is_nested or o.is_meta or o.is_complex()) and o.layout is torch.strided and o.numel() == 1
    if isinstance(o, numbers.Integral):  # torch knows 64 bits, and refuses True here and there
        return o is not True and abs(o) < 2**63
    return isinstance(o, numbers.Real) and not isinstance(o, numbers.Rational)


def _is_of(p: Tensor, t, any_dtype: bool) -> bool:
    if not isinstance(t, Tensor) or t.is_nested or t.is_meta > p.is_meta or t.layout is not torch.strided:
        return False
    return t.shape == p.shape and (any_dtype or t.dtype == p.dtype) and not (t.is_inference() or _overlaps(t))
