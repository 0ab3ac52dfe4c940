"""Multi-head attention: torch's own code, which calls our ``linear`` and our attention in place of torch's.

That code is long and differs from torch to torch, so it is not written again here: its functions are copied and given
other globals. A compiler would look the globals up in torch's modules, so it is handed torch's own method.
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
    """A copy of ``function`` that is called ``name`` and has ``names`` for its globals."""
    copy = types.FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
    copy.__dict__.update(function.__dict__)
    for each in ("__kwdefaults__", "__annotations__", "__doc__", "__module__"):
        setattr(copy, each, getattr(function, each))
    return copy


def _finding(function: Callable, **names) -> Callable:
    """A copy of ``function`` in which these of its globals are replaced."""
    return _copy(function, function.__name__, {**function.__globals__, **names})


multi_head_attention_forward = _finding(
    _F.multi_head_attention_forward,
    linear=functional.linear,
    scaled_dot_product_attention=functional.scaled_dot_product_attention,
    _in_projection=_finding(in_projection, linear=functional.linear),
    _in_projection_packed=_finding(in_projection_packed, linear=functional.linear),
)


class _Functional:
    """torch.nn.functional, with one function replaced."""

    multi_head_attention_forward = staticmethod(multi_head_attention_forward)

    def __getattr__(self, name: str):
        return getattr(_F, name)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with our products and attention.

    The same arguments, shapes, parameters and ``state_dict``. In inference torch's fast path serves as it did; under
    ``torch.compile`` and in scripts all of it is torch's.
    """

    # Named anew, for a script may not have two methods of one name.
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
        """As torch's, whose docstring explains the arguments."""
        masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if torch.jit.is_scripting() or is_dynamo_compiling():
            return self._torchs(query, key, value, *masks)
        else:
            return self._ours(query, key, value, *masks)
