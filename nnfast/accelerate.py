"""Swap a model's modules for ours, in place and reversibly; undo it; say what was done.

A module is given a class of ours, and remembers in its ``__dict__`` which one it had. Nothing else changes: no forward
is run, read or rewritten, and the user's code calls its children as it always did.
"""

import dis
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnfast import compiled, nn, reference
from nnfast import functional as F

_TORCHS_F = torch.nn.functional

#: torch's class -> ours. A module is swapped only where its type is exactly torch's.
_OURS: dict[type, type] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.GELU: nn.GELU,
    torch.nn.Linear: nn.Linear,
    torch.nn.Embedding: nn.Embedding,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
}
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # from torch 2.12 on
    _OURS[torch.nn.LinearCrossEntropyLoss] = nn.LinearCrossEntropyLoss

#: Functions of torch's that a forward may call itself, and that ours could serve.
_FUNCTIONS = (
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "scaled_dot_product_attention",
    "cross_entropy",
    "linear_cross_entropy",
)

# Left on a module that accelerate swapped, in its __dict__: the class it had. It travels with deepcopy and pickle, and
# state_dict does not see it.
_WAS = "_nnfast_was"


# ---- the GELUs of other libraries ----


class _LibraryGELU(torch.nn.Module):
    """A library's GELU module with our kernel, and with its own forward wherever ours does not serve."""

    __constants__ = ["approximate"]
    approximate = "none"

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.nn.functional.gelu(input, approximate=self.approximate)
        else:
            output = F.gelu_if_ours(input, self.approximate) if _same_as_torchs(input) else None
            return self.__dict__[_WAS].forward(self, input) if output is None else output

    def __getattr__(self, name: str):
        """What the library's own class defines."""
        was = self.__dict__.get(_WAS, object)
        for value in (vars(base)[name] for base in was.__mro__ if name in vars(base)):
            return value.__get__(self, was) if hasattr(value, "__get__") else value  # a method or a property
        return super().__getattr__(name)

    def _get_name(self) -> str:
        return self.__dict__[_WAS].__name__

    def extra_repr(self) -> str:
        return self.__dict__[_WAS].extra_repr(self)


class _LibraryTanhGELU(_LibraryGELU):
    approximate = "tanh"


def _same_as_torchs(input) -> bool:
    """Whether torch's GELU gives what a formula in several ops gives, and in the same dtype.

    A constant in the formula may have ten digits only, which shows in float64. On a GPU autocast brings some of its ops
    to float32; on a CPU it leaves all of them alone.
    """
    return (
        isinstance(input, Tensor)
        and input.is_floating_point()
        and input.dtype != torch.float64
        and (input.device.type == "cpu" or not torch.is_autocast_enabled(input.device.type))
    )


#: Other libraries' GELUs by their full names, and the class of ours that each is given.
_LIBRARY_GELUS: dict[str, type] = {
    "transformers.activations.GELUActivation": _LibraryGELU,
    "transformers.activations.GELUTanh": _LibraryTanhGELU,
    "transformers.activations.PytorchGELUTanh": _LibraryTanhGELU,
    "transformers.activations.NewGELUActivation": _LibraryTanhGELU,
    "transformers.activations.FastGELUActivation": _LibraryTanhGELU,
    "transformers.activations.AccurateGELUActivation": _LibraryTanhGELU,
    "timm.layers.activations.GELU": _LibraryGELU,
    "timm.layers.activations.GELUTanh": _LibraryTanhGELU,
}


def _is_gelu(module: torch.nn.Module, approximate: str) -> bool:
    """Whether this library's code is the GELU it is taken for: at six thousand points, to ten digits."""
    small = torch.linspace(-12, 12, 2001, dtype=torch.float64, device="cpu")
    x = torch.cat([small, small * 1e-3, small * 1e20])
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
    except Exception:  # whatever a changed version of it raises
        return False
    return bool((y - reference.gelu(x, approximate)).abs().le(1e-10 * x.abs()).all())


def _transformers():
    """Our ``sdpa``, which serves attention in transformers' modules; None where nobody has imported transformers."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    try:
        from nnfast import sdpa
    except ImportError:  # a version of it that has no registry
        return None
    return sdpa


# ---- accelerate and restore ----


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """Make every module of ``model`` that nnfast has a kernel for use it, in place.

    Modules of torch's LayerNorm, Linear, GELU, Embedding, MultiheadAttention, TransformerEncoderLayer, CrossEntropyLoss
    and LinearCrossEntropyLoss become ours, and so do GPT-2's Conv1D and the GELUs of transformers and timm. They change
    their class and nothing else: parameters, hooks, names and ``state_dict`` stay, an optimizer made before keeps
    working, and ``isinstance(m, torch.nn.LayerNorm)`` holds as before. Modules of transformers whose attention is
    ``sdpa`` call ours in its place; the model's ``config`` stays as it is. Only this model is touched, a second call
    changes nothing, and ``restore`` undoes it.

    ``report`` says what was done.

    Returns:
        The same model.
    """
    library = _transformers()
    for module in model.modules():
        ours = _find(module)
        if ours is not None:
            was = module.__dict__[_WAS] = type(module)
            module.__dict__["__module__"] = was.__module__  # by which torch.fx knows the leaves of a graph
            module.__class__ = ours
        if library and library.takes(module):
            library.take(module)
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo ``accelerate``: the same model, with the classes it had.

    Modules made as ours stay ours, and a class that somebody made of ours since (a parametrization, FSDP) stays theirs.
    """
    library = _transformers()
    for module in model.modules():
        if library:
            library.give_back(module)
        was = module.__dict__.get(_WAS)
        if was is not None and type(module) is _class_for(was):
            del module.__dict__[_WAS]
            module.__dict__.pop("__module__", None)
            module.__class__ = was
    return model


def _class_for(kind: type) -> type | None:
    """Our class for modules of exactly the class ``kind``."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == "transformers.pytorch_utils.Conv1D":
        from nnfast.nn.conv1d import Conv1D

        return Conv1D
    return _OURS.get(kind) or _LIBRARY_GELUS.get(name)


def _is_patched(kind: type) -> bool:
    """Whether somebody gave the class another forward than that of the file that defines it."""
    code = getattr(kind.forward, "__code__", None)
    return code is None or code.co_filename != getattr(sys.modules.get(kind.__module__), "__file__", None)


def _find(module: torch.nn.Module) -> type | None:
    """The class that ``module`` can be given, or None."""
    ours = None if "forward" in module.__dict__ else _class_for(type(module))
    if ours is not None and _is_patched(type(module)):
        return None
    if ours is not None and issubclass(ours, _LibraryGELU) and not _is_gelu(module, ours.approximate):
        return None
    return ours


# ---- report ----


@dataclass
class Report:
    """What nnfast serves in a model, and what it leaves to torch and why. ``print`` it, or read the lists.

    Attributes:
        served: ``(name, what)`` for every module that runs one of our ops.
        left: ``(name, why)`` for every module that looks like one of ours and is not.
    """

    served: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"nnfast serves {len(self.served)} modules and leaves {len(self.left)} to torch"]
        for title, rows in (("served", self.served), ("left", self.left)):
            width = max((len(name) for name, _ in rows), default=0)
            lines += [f"  {title}: {name or '(the model itself)':{width}}  {what}" for name, what in rows]
        return "\n".join([*lines, f"  under torch.compile nnfast serves: {compiled.summary()}"])


def report(model: torch.nn.Module) -> Report:
    """Say what nnfast serves in ``model``, and what it leaves to torch and why. Nothing of the model is run."""
    result = Report()
    for name, module in model.named_modules():
        if what := _served(module):
            result.served.append((name, what))
        result.left += [(name, why) for why in _left(module)]
    return result


def _served(module: torch.nn.Module) -> str:
    kind, library = type(module), _transformers()
    if library and library.has(module):
        return "scaled_dot_product_attention"
    if isinstance(module, (*_OURS.values(), nn.LinearGELU)) or kind is _class_for(module.__dict__.get(_WAS, object)):
        return module._get_name()
    return ""


def _replaced(module: torch.nn.Module) -> str:
    return f"its forward was replaced {'on the instance' if 'forward' in module.__dict__ else 'in its class'}"


def _left(module: torch.nn.Module) -> Iterator[str]:
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _served(module) or kind.__module__.startswith("torch."):
        if _find(module):
            yield f"{kind.__name__}: nnfast.accelerate(model) takes it"
        elif _class_for(kind):
            yield _replaced(module)
        return
    library = _transformers()
    if _find(module) or (library and library.takes(module)):
        yield f"{kind.__name__}: nnfast.accelerate(model) takes it"
    elif "forward" in module.__dict__ or (_class_for(kind) and _is_patched(kind)):
        if isinstance(module, tuple(_OURS)) or _class_for(kind):
            yield _replaced(module)
    elif isinstance(module, tuple(_OURS)):
        yield f"{name} is a class of its own"
    elif "gelu" in kind.__name__.lower():
        yield f"{name} is no GELU that nnfast knows"
    yield from (f"calls {what} at {where}: an import of nnfast's would serve it" for what, where in _calls(kind))


def _calls(kind: type) -> Iterator[tuple[str, str]]:
    """Calls of torch's own functions that ours could serve in the methods of a class: what, and where."""
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            for method in vars(base).values():
                if isinstance(method, types.FunctionType):
                    yield from _calls_in(method.__code__, method.__globals__)


def _calls_in(code: types.CodeType, names: dict) -> Iterator[tuple[str, str]]:
    found, line = None, code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = instruction.starts_line if type(instruction.starts_line) is int else line
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found = names.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(found, types.ModuleType):
            found = vars(found).get(instruction.argval)
        else:
            continue
        for what in _FUNCTIONS:
            if found is not None and found is getattr(_TORCHS_F, what, None):
                yield f"F.{what}", f"{code.co_filename}:{line}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _calls_in(constant, names)
