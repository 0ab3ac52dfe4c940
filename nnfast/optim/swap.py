import functools
import types

import torch

from nnfast.optim.adam import Adam
from nnfast.optim.adamw import AdamW
from nnfast.optim.rmsprop import RMSprop
from nnfast.optim.sgd import SGD

_OURS = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: Adam,
    torch.optim.SGD: SGD,
    torch.optim.RMSprop: RMSprop,
}


def swap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make ``optimizer`` ours, in place: groups, state, hooks and schedulers stay.

    There is no undo: to go back, make torch's optimizer and ``load_state_dict`` into it.

    Args:
        optimizer: of exactly torch's AdamW, Adam, SGD or RMSprop. Any other, and one whose ``step`` somebody but a
            scheduler has replaced, is left as it is.

    Returns:
        The same object; its type says whether it is ours.
    """
    ours = _OURS.get(type(optimizer))
    if ours is None:
        return optimizer
    around = optimizer.__dict__.get("step")
    if around is not None:
        # A scheduler counts the calls through a function of its own around the class's step.
        if not getattr(around, "_wrapped_by_lr_sched", False):
            return optimizer
        del optimizer.__dict__["step"]
    optimizer.__class__ = ours
    optimizer._patch_step_function()
    if around is not None:
        _count_calls(optimizer)
    return optimizer


def _count_calls(optimizer: torch.optim.Optimizer) -> None:
    """Wrap ``step`` as torch's schedulers do, which see by it that the step was called."""
    step = type(optimizer).step

    @functools.wraps(step)
    def counted(self, *args, **kwargs):
        self._opt_called = True
        return step(self, *args, **kwargs)

    counted._wrapped_by_lr_sched = True
    optimizer.step = types.MethodType(counted, optimizer)
