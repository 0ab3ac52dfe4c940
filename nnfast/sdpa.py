"""transformers' attention with our kernels, through its own registry; to be imported only where it is installed.

A module of transformers looks up the function that computes its attention by the name in its config, at every call.
Ours is registered as ``nnfast``, which alone changes nothing. The modules that ``take`` is given see their config with
a name that finds it in the place of ``sdpa``, and compares equal to ``sdpa``; the model's own config, from which masks
are made and which is saved, stays as it is, and another choice that is made later takes effect as ever.
"""

import copy
import inspect

import torch
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward as _theirs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _registered
from transformers.modeling_utils import AttentionInterface

from nnfast import functional as F

_REGISTRY, NAME = "ALL_ATTENTION_FUNCTIONS", "nnfast"


class _Ours(TorchFunctionMode):
    """Calls our attention for torch's while transformers' own code runs, which may do more than call it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _attention(*args, **kwargs):
    """transformers' ``sdpa``, with our attention called in it. A compiler gets transformers' own."""
    if is_compiling():
        return _theirs(*args, **kwargs)
    with _Ours():
        return _theirs(*args, **kwargs)


AttentionInterface.register(NAME, _attention)
try:  # Should a module make masks by the name that it sees: those of `sdpa`.
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionMaskInterface.register(NAME, sdpa_mask)
except ImportError:  # a version of it that has no such registry
    pass


class _Name(str):
    """Equal to ``sdpa``, for modules that then add a mask of their own; a dict finds ours by it, and not ``sdpa``."""

    __slots__ = ()

    def __eq__(self, other) -> bool:
        return other == NAME or str.__eq__(self, other)

    def __ne__(self, other) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(NAME)

    def __reduce__(self):
        return str, (str(self),)


_OURS = _Name("sdpa")


class Config:
    """A view of a config that names ours where that says ``sdpa``. All else is read from and written to the config."""

    def __init__(self, config) -> None:
        self.__dict__["_nnfast_was"] = config

    @property
    def _attn_implementation(self):
        name = self.__dict__["_nnfast_was"]._attn_implementation
        return _OURS if name == "sdpa" and not is_compiling() and _registered.get("sdpa") is _theirs else name

    @property
    def __class__(self):
        return type(self.__dict__["_nnfast_was"])

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_nnfast_was"], name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.__dict__["_nnfast_was"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_nnfast_was"], name)

    def __copy__(self):
        return Config(copy.copy(self.__dict__["_nnfast_was"]))

    def __eq__(self, other) -> bool:
        return self.__dict__["_nnfast_was"] == (other.__dict__["_nnfast_was"] if type(other) is Config else other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.__dict__["_nnfast_was"])

    def __reduce__(self):
        return Config, (self.__dict__["_nnfast_was"],)


def _looks_up(module: torch.nn.Module) -> bool:
    """Whether the module's forward asks the registry, and ``sdpa`` is transformers' own there."""
    forward = inspect.unwrap(type(module).forward)
    if "forward" in module.__dict__ or _REGISTRY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    registry = forward.__globals__.get(_REGISTRY)
    return isinstance(registry, AttentionInterface) and registry.get("sdpa") is _theirs


def takes(module: torch.nn.Module) -> bool:
    """Whether ours can serve this module's attention."""
    config = module.__dict__.get("config")
    return type(config) is not Config and getattr(config, "_attn_implementation", "") == "sdpa" and _looks_up(module)


def take(module: torch.nn.Module) -> None:
    """Have ours serve this module's attention."""
    module.config = Config(module.config)


def has(module: torch.nn.Module) -> bool:
    """Whether it was given to ``take``, and has not chosen another attention since."""
    config = module.__dict__.get("config")
    return type(config) is Config and config._attn_implementation is _OURS


def give_back(module: torch.nn.Module) -> None:
    """Undo ``take``."""
    if type(module.__dict__.get("config")) is Config:
        module.config = module.config.__dict__["_nnfast_was"]
