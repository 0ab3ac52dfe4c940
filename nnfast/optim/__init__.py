"""Everything in ``torch.optim``; ours are AdamW, Adam, SGD and RMSprop. What is not ours is torch's own object."""

import torch.optim as _torch
from torch.optim import *  # noqa: F403

from nnfast import _alias
from nnfast.optim.adam import Adam as Adam
from nnfast.optim.adamw import AdamW as AdamW
from nnfast.optim.rmsprop import RMSprop as RMSprop
from nnfast.optim.sgd import SGD as SGD
from nnfast.optim.swap import swap as swap

_alias.install()

# As in torch.optim: one can import from these modules, but they are no attributes of the package.
del adam, adamw, rmsprop, sgd  # type: ignore[name-defined] # noqa: F821


def __getattr__(name: str):
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
