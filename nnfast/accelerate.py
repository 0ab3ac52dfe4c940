"""Swap a model's modules for ours, in place and reversibly; undo it; say what was done."""

from dataclasses import dataclass, field

import torch

from nnfast import nn, own, trace
from nnfast.nn.linear_gelu import LINEARS

#: torch's class -> ours. A module is swapped only where its type is exactly torch's.
_OURS: dict[type, type] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.GELU: nn.GELU,
    torch.nn.Linear: nn.Linear,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.Sequential: nn.Sequential,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}

# Left on a module that accelerate swapped, in its __dict__: it travels with deepcopy and pickle, and state_dict
# does not see it.
_MARK = "_nnfast_swapped"


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """Make every module of ``model`` that nnfast has a kernel for use it, in place.

    Modules of torch's classes become ours. Of the others, those become a subclass of what they are whose forward is a
    GELU, calls ``F.layer_norm`` or ``F.gelu``, or calls a Linear (or GPT-2's Conv1D) that only a GELU reads: a trace of
    the module itself shows it, and what it does not show stays as it is.

    Modules change their class and nothing else: parameters, hooks, names and ``state_dict`` stay, an optimizer made
    before keeps working, and ``isinstance(m, torch.nn.LayerNorm)`` holds as before. Only this model is touched, a
    second call changes nothing, and :func:`restore` undoes it. :func:`report` says what was done.

    Returns:
        The same model.
    """
    for module in reversed(list(model.modules())):  # a GELU before the module that calls it
        kind, _ = _find(module)
        if kind is not None:
            if type(module) in _OURS:  # FX and its like tell their leaves by this name: it stays torch's
                module.__dict__["__module__"] = type(module).__module__
            module.__class__ = kind
            module.__dict__[_MARK] = True
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`accelerate`: the same model, with the classes it had. Modules made as ours stay ours."""
    for module in model.modules():
        # A class that somebody made of ours since (a parametrization, for one) is not ours to take apart.
        kind = _before(type(module))
        if _MARK in module.__dict__ and kind is not None:
            del module.__dict__[_MARK]
            module.__dict__.pop("__module__", None)
            module.__class__ = kind
    return model


def _before(kind: type) -> type | None:
    return kind._nnfast_made_from[0] if isinstance(kind, own.Own) else _TORCHS.get(kind)


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
        return "\n".join(lines)


def report(model: torch.nn.Module) -> Report:
    """Say what nnfast serves in ``model``, and what it leaves to torch and why."""
    result = Report()
    for name, module in model.named_modules():
        kind, why = _find(module)
        if what := _what_is_served(module):
            result.served.append((name, what))
        if kind is not None:
            result.left.append((name, f"{type(module).__name__}: nnfast.accelerate(model) takes it"))
        result.left += [(name, reason) for reason in why]
    return result


def _what_is_served(module: torch.nn.Module) -> str:
    kind = type(module)
    if isinstance(module, nn.Sequential):
        pairs = _fused_pairs(module)
        return f"Sequential, {pairs} Linear+GELU fused" if pairs else ""
    if isinstance(kind, own.Own):
        return f"{kind.__name__}: {own.what(module)}"
    ours = isinstance(module, (nn.TransformerEncoderLayer, *_TORCHS, nn.LinearGELU))
    return kind.__name__ if ours else ""


def _fused_pairs(sequential: torch.nn.Sequential) -> int:
    children = list(sequential)
    pairs = zip(children, children[1:], strict=False)
    return sum(type(a) in LINEARS and type(b) in (torch.nn.GELU, nn.GELU) for a, b in pairs)


def _find(module: torch.nn.Module) -> tuple[type | None, list[str]]:
    """The class that ``module`` can be given, or None, and why what looks like ours in it stays torch's."""
    kind = type(module)
    if kind in _OURS:
        return _OURS[kind], []
    if kind in _TORCHS or own.gelu_of(module) or kind.__module__.startswith("torch."):
        return None, []
    accelerated = isinstance(kind, own.Own)
    base = _before(kind) if accelerated else kind
    called = set().union(*own.calls(base.forward).values())
    linears = any(isinstance(child, own.linear_classes()) for child in module.children())
    fusable = linears and ("gelu" in called or any(map(_is_gelu, module.children())))
    looks_like_ours = isinstance(module, tuple(_OURS)) or "gelu" in kind.__name__.lower()
    if not accelerated and (why := own.why_not(module)):
        return None, [why] if called or fusable or looks_like_ours else []
    if formula := trace.gelu_formula(module):
        return own.gelu_class(kind, *formula), []
    pairs, why = trace.linear_gelu_pairs(module, _is_gelu, "gelu" in called) if fusable else ((), [])
    if accelerated:
        return None, why
    if pairs or called:
        return own.module_class(kind, pairs), why
    if looks_like_ours:
        why = [*why, f"{kind.__module__}.{kind.__qualname__} computes something of its own"]
    return None, why


def _is_gelu(module: torch.nn.Module | None) -> bool:
    """Whether ``module`` is a GELU that is ours, or that accelerate makes ours."""
    if module is None or type(module) is torch.nn.GELU or own.gelu_of(module):
        return module is not None
    theirs = type(module).__module__.startswith("torch.") or own.why_not(module)
    return not theirs and trace.gelu_formula(module) is not None
