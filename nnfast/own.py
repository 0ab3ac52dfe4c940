"""Subclasses made for classes that are not torch's, so that a user's own module runs on our kernels.

The user's ``forward`` itself runs, at every call, and never a recording of it: whatever it branches on, counts or
prints, it does as before. What differs is what it finds where it looks for torch's. A name of its module that means
``torch.nn.functional`` means ours (:func:`with_our_functional`), and a Linear whose GELU follows takes that along
(:func:`_seen_class`). Each gives what torch's would, so that a wrong guess costs time and no digit. One thing alone
must not be hidden from the trace: a change of the Linear's output in place makes backward raise.

The classes go by the name of the class they are made for, pickle as how they were made, and touch no other class.
"""

import copyreg
import dis
import functools
import itertools
import sys
import types

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.module import _has_any_global_hook

from nnfast import functional as F
from nnfast import nn
from nnfast.nn.linear_gelu import LINEARS, unobserved

_TORCHS_F = torch.nn.functional


class Own(type):
    """The type of the classes made here, which tells them from all others."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}' with nnfast's kernels>"


copyreg.pickle(Own, lambda cls: (cls._nnfast_made_by, cls._nnfast_made_from))


class _Quiet:
    """First of the bases: the class made is no event for a base that counts or registers its subclasses.

    It has no ``__slots__``: an object's class can be changed only to one of the same layout.
    """

    def __init_subclass__(cls) -> None:
        pass


def _subclass(base: type, namespace: dict, meta: type = type) -> type:
    named = {k: getattr(base, k) for k in ("__module__", "__qualname__", "__doc__")}
    bases = (base,) if issubclass(base, _Quiet) else (_Quiet, base)
    return meta(base.__name__, bases, {**named, **namespace})


def _under(module: torch.nn.Module, cls: type) -> torch.nn.Module:
    """The same module under another class: one more object with the same ``__dict__``, for the time of a call."""
    other = object.__new__(cls)
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


def why_not(module: torch.nn.Module) -> str:
    """Why ``module`` can be given no class from here, or ""."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(type(module)) is not type:
        return f"its class has a metaclass, {type(type(module)).__qualname__}"
    return ""


# ---- a GELU of the user's own ----


@functools.cache
def gelu_class(base: type, approximate: str, formula: bool) -> type:
    """For a class whose forward is a GELU: one that takes ours, where ours serves, and its own forward elsewhere.

    Args:
        formula: whether its forward is made of several ops, and not a call of torch's GELU.
    """
    theirs = base.forward

    @functools.wraps(theirs)
    def forward(self, *args, **kwargs):
        unchanged = base.forward is theirs
        if unchanged and len(args) == 1 and not kwargs and (not formula or _formula_holds(args[0])):
            output = F.gelu_if_ours(args[0], approximate)
            if output is not None:
                return output
        return base.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "_nnfast_gelu": (approximate, formula)}
    return _subclass(base, _made(gelu_class, base, approximate, formula) | namespace, Own)


def _formula_holds(input: Tensor) -> bool:
    """Whether torch's GELU gives what the formula in several ops gives, and in the same dtype.

    A constant may be written out to ten digits, which float64 would see. Autocast brings some of its ops to float32 on
    a GPU; on a CPU it leaves all of them alone.
    """
    return (
        isinstance(input, Tensor)
        and input.dtype != torch.float64
        and (input.device.type == "cpu" or not torch.is_autocast_enabled(input.device.type))
    )


def gelu_of(module: torch.nn.Module | None) -> tuple[str, bool] | None:
    """``(approximate, formula)`` of a GELU that asks for what was computed ahead, and None for all else."""
    kind = type(module)
    if kind is nn.GELU:
        return module.approximate, False
    return getattr(kind, "_nnfast_gelu", None) if isinstance(kind, Own) else None


# ---- a module of the user's own ----


@functools.cache
def module_class(base: type, pairs: tuple[tuple[str, str | None, str | None], ...]) -> type:
    """For a class whose forward calls ``F.layer_norm`` or ``F.gelu``, or a Linear and then a GELU.

    Args:
        pairs: ``(linear, gelu, None)``, the names of the children, or ``(linear, None, approximate)`` where forward
            calls ``F.gelu`` on the Linear's output.
    """
    theirs, seen = base.forward, _seen_class(base, pairs) if pairs else None
    changed = with_our_functional(theirs)

    @functools.wraps(theirs)
    def forward(self, *args, **kwargs):
        # The compiler fuses by itself, and a tracer is shown the modules.
        if is_compiling() or is_fx_symbolic_tracing() or base.forward is not theirs:
            return base.forward(self, *args, **kwargs)
        return changed(self if seen is None else _under(self, seen), *args, **kwargs)

    return _subclass(base, _made(module_class, base, pairs) | {"forward": forward}, Own)


def what(module: torch.nn.Module) -> str:
    """What of a module with a class from here runs on our kernels as the module now is."""
    kind = type(module)
    if gelu := gelu_of(module):
        return f"GELU, approximate={gelu[0]!r}"
    base, pairs = kind._nnfast_made_from
    called = calls(base.forward)
    parts = [f"F.{op}" for op in _OUR_NAMES if any(op in ops for ops in called.values())]
    for name, gelu_name, approximate in pairs:
        linear = module._modules.get(name)
        fused = linear is not _with_follower(module, linear, gelu_name, approximate)
        parts.append(f"{name} and {gelu_name or 'F.gelu'}" + (" as one op" if fused else ", by themselves for now"))
    return "; ".join(parts)


def _made(by, *made_from) -> dict:
    return {"_nnfast_made_by": staticmethod(by), "_nnfast_made_from": made_from}


def _seen_class(base: type, pairs) -> type:
    """What ``self`` is in a forward with pairs: itself, but for the Linears that are read off it."""
    followers = {linear: follower for linear, *follower in pairs}

    def __getattr__(self, name: str):
        found = base.__getattr__(self, name)
        return _with_follower(self, found, *followers[name]) if name in followers else found

    namespace = {"__getattr__": __getattr__}
    if hasattr(base, "__del__"):
        namespace["__del__"] = lambda self: None  # the module lives on
    return _subclass(base, namespace)


def _with_follower(parent, linear, gelu_name: str | None, approximate: str | None):
    """The Linear that takes its GELU along, or the child as it is, where it is another today or somebody looks."""
    formula = False
    if gelu_name is not None:
        gelu = parent._modules.get(gelu_name)
        if (what := gelu_of(gelu)) is None or not unobserved(gelu):
            return linear
        approximate, formula = what
    if type(linear) not in linear_classes() or not unobserved(linear) or _has_any_global_hook():
        return linear
    return _under(linear, _linear_class(type(linear), approximate, formula))


@functools.cache
def _linear_class(base: type, approximate: str, formula: bool) -> type:
    transposed = not issubclass(base, torch.nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        pre = None
        if not formula or _formula_holds(input):
            weight = self.weight
            if not transposed:
                pre = F.linear_ahead(input, weight, self.bias, approximate)
            elif type(input) is Tensor and input.is_contiguous():  # Conv1D takes a view of its input
                pre = F.linear_ahead(input, weight.t(), self.bias, approximate)
        return base.forward(self, input) if pre is None else pre

    return _subclass(base, {"forward": forward})


def linear_classes() -> tuple[type, ...]:
    """Linear, and GPT-2's Conv1D, whose weight is ``(in_features, out_features)``, where somebody has imported it."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return LINEARS if conv1d is None else (*LINEARS, conv1d)


# ---- torch.nn.functional, by the names of the user's own file ----

_OUR_NAMES = ("layer_norm", "gelu")


def calls(function) -> dict[str, set[str]]:
    """The names of its module by which ``function`` reaches torch's ``layer_norm`` or ``gelu``, and which of them."""
    if type(function) is not types.FunctionType:
        return {}
    found: dict[str, set[str]] = {}
    instructions = list(dis.get_instructions(function))
    for this, following in itertools.pairwise(instructions):
        if this.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return {}
        if this.opname == "LOAD_GLOBAL":
            value = function.__globals__.get(this.argval)
            for op in _OUR_NAMES:
                if value is getattr(_TORCHS_F, op) or (value is _TORCHS_F and following.argval == op):
                    found.setdefault(this.argval, set()).add(op)
    return found


def with_our_functional(function):
    """``function`` as if its file had imported ours; itself where that makes no difference."""
    called = calls(function)
    if not called:
        return function
    torchs = function.__globals__
    ours = {n: nn.functional if torchs[n] is _TORCHS_F else getattr(nn.functional, *ops) for n, ops in called.items()}
    code, names = function.__code__, _Names(torchs, ours)
    changed = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


class _Names(dict):
    """A module's names, read from it at each use, but for those given here."""

    def __init__(self, theirs: dict, ours: dict) -> None:
        super().__init__(ours)
        self.theirs = theirs

    def __missing__(self, name: str):
        return self.theirs[name]
