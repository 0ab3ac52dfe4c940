"""Swap a model's modules for ours, in place and reversibly; undo it; say what was done."""

from dataclasses import dataclass, field

import torch

from nnfast import nn

#: torch's class -> ours. A module is swapped only where its type is exactly torch's.
_OURS: dict[type, type] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.GELU: nn.GELU,
    torch.nn.Sequential: nn.Sequential,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}

# Left on a module that accelerate swapped, in its __dict__: it travels with deepcopy and pickle, and state_dict
# does not see it.
_MARK = "_nnfast_swapped"


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """Make every module of ``model`` that nnfast has a kernel for use it, in place.

    Modules change their class and nothing else: parameters, hooks, names and ``state_dict`` stay, an optimizer made
    before keeps working, and ``isinstance(m, torch.nn.LayerNorm)`` holds as before. Only this model is touched, a
    second call changes nothing, and :func:`restore` undoes it. :func:`report` says what was done.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
            module.__dict__[_MARK] = True
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`accelerate`: the same model, with torch's classes again. Modules made as ours stay ours."""
    for module in model.modules():
        if module.__dict__.pop(_MARK, False):
            module.__class__ = _TORCHS[type(module)]
    return model


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
        kind = type(module)
        if isinstance(module, nn.Sequential):
            pairs = _fused_pairs(module)
            if pairs:
                result.served.append((name, f"Sequential, {pairs} Linear+GELU fused"))
        elif isinstance(module, (nn.TransformerEncoderLayer, *_TORCHS, nn.LinearGELU)):
            result.served.append((name, kind.__name__))
        elif kind in _OURS:
            result.left.append((name, f"{kind.__name__}: torch's; nnfast.accelerate(model) takes it"))
        elif isinstance(module, tuple(_OURS)):
            result.left.append((name, f"{kind.__module__}.{kind.__qualname__} is a class of its own"))
    return result


def _fused_pairs(sequential: torch.nn.Sequential) -> int:
    children = list(sequential)
    pairs = zip(children, children[1:], strict=False)
    return sum(type(a) is torch.nn.Linear and type(b) in (torch.nn.GELU, nn.GELU) for a, b in pairs)
