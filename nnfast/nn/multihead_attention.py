"""Multi-head attention: torch's own code, which finds our linear and our attention where it looks for torch's.

What it does with masks, weights and batches is long, and differs from torch to torch; none of it is written again here.
A compiler that traces it would look the names up in torch's modules: it is handed torch's.
"""

import types
from collections.abc import Callable

import torch
import torch.nn.functional as _F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nnfast import functional
from nnfast._torch import in_projection, in_projection_packed


def _copy(function: Callable, name: str, names: dict) -> Callable:
    """The same code under another name, which finds what it looks for in ``names``."""
    copy = types.FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
    copy.__dict__.update(function.__dict__)
    for each in ("__kwdefaults__", "__annotations__", "__doc__", "__module__"):
        setattr(copy, each, getattr(function, each))
    return copy


def _finding(function: Callable, **names) -> Callable:
    """The same code, for which these names of its module mean something else."""
    return _copy(function, function.__name__, {**function.__globals__, **names})


multi_head_attention_forward = _finding(
    _F.multi_head_attention_forward,
    linear=functional.linear,
    scaled_dot_product_attention=functional.scaled_dot_product_attention,
    _in_projection=_finding(in_projection, linear=functional.linear),
    _in_projection_packed=_finding(in_projection_packed, linear=functional.linear),
)


class _Functional:
    """torch.nn.functional, but for one function."""

    multi_head_attention_forward = staticmethod(multi_head_attention_forward)

    def __getattr__(self, name: str):
        return getattr(_F, name)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with our products and attention.

    The same arguments, parameters and ``state_dict``. In inference torch's own fast path serves as it did; under
    ``torch.compile`` and in scripts all of it is torch's.
    """

    # A script has no two methods of one name.
    _torchs = _copy(torch.nn.MultiheadAttention.forward, "_torchs", torch.nn.MultiheadAttention.forward.__globals__)
    _ours = _finding(torch.nn.MultiheadAttention.forward, F=_Functional())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: its docstring says what each is."""
        masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if torch.jit.is_scripting() or is_dynamo_compiling():
            return self._torchs(query, key, value, *masks)
        else:
            return self._ours(query, key, value, *masks)
