"""Everything in :mod:`torch.optim`, with our AdamW. What is not ours is torch's own object."""

import torch.optim as _torch
from torch.optim import *  # noqa: F403

from nnfast import _alias
from nnfast.optim.adamw import AdamW as AdamW

_alias.install()

del adamw  # type: ignore[name-defined] # noqa: F821 (a module to import from, as torch.optim.adamw is)


def __getattr__(name: str):
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
