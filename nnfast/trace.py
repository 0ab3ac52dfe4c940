"""What a module's forward does with its children, seen from a trace of it in which they are leaves.

A trace shows one way through a forward, with every flag as it stood, so nothing is ever computed from it: it says
where our kernels can pay, and :mod:`nnfast.own` runs the forward itself.
"""

import operator

import torch
from torch.fx import Graph, Node, Tracer

from nnfast import reference
from nnfast.own import _subclass, linear_classes

#: All that a formula of an activation may be made of: each takes element by element.
_ELEMENTWISE = {"add", "sub", "mul", "truediv", "div", "neg", "pow", "square", "sqrt", "tanh", "erf", "erfc", "gelu"}


class CannotTrace(Exception):
    """Why a forward has no trace, or none that can be relied on."""


class _Leaves(Tracer):
    def is_leaf_module(self, module, name) -> bool:
        return True


def _copy(value):
    return value.copy() if type(value) in (dict, list, set) else value


def trace(module: torch.nn.Module, training: bool) -> tuple[Graph, set[str]]:
    """The graph of ``module``'s forward, and the names of the children that it read off ``self``.

    The forward runs on a stand-in with attributes of its own, so that what it writes does not reach the module.

    Raises:
        CannotTrace: it branches on its input, fails without one, or writes attributes.
    """
    base, read = type(module), set()

    def __getattr__(self, name: str):
        read.add(name)
        return base.__getattr__(self, name)

    before = {k: _copy(v) for k, v in module.__dict__.items()} | {"training": training}
    stand_in = object.__new__(_subclass(base, {"__getattr__": __getattr__, "__del__": lambda self: None}))
    object.__setattr__(stand_in, "__dict__", {k: _copy(v) for k, v in before.items()})
    try:
        graph = _Leaves().trace(stand_in)
    except Exception as e:  # whatever a forward raises that is given no tensors
        why = str(e).strip().split("\n")[0].split(". ")[0]
        raise CannotTrace(f"its forward cannot be traced ({type(e).__name__}: {why})") from e
    after = stand_in.__dict__
    if after.keys() != before.keys() or any(not _same(after[k], before[k]) for k in before):
        raise CannotTrace("its forward writes attributes")
    return graph, read


def _same(a, b) -> bool:
    if type(a) is not type(b) or type(a) not in (dict, list, set):
        return a is b
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(k in b and v is b[k] for k, v in a.items())
    return a == b if isinstance(a, set) else all(map(operator.is_, a, b))


def gelu_formula(module: torch.nn.Module) -> tuple[str, bool] | None:
    """``(approximate, formula)`` where the module is a GELU and nothing else, or None.

    It is one where it has no children and no parameters, its forward, in training and in evaluation, is made of
    elementwise functions of its one input, and these are the GELU's at some thousand points of the line, in float64
    and to ten digits. ``formula``: whether it is written out, and not a call of torch's GELU.
    """
    if module._modules or module._parameters or module._buffers:
        return None
    found = {_gelu_formula(module, training) for training in (True, False)}
    return found.pop() if len(found) == 1 else None


def _gelu_formula(module: torch.nn.Module, training: bool) -> tuple[str, bool] | None:
    try:
        graph, _ = trace(module, training)
    except CannotTrace:
        return None
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    if len(graph.nodes) - len(nodes) != 2 or not nodes:
        return None
    if any(n.op not in ("call_function", "call_method") or _name(n) not in _ELEMENTWISE for n in nodes):
        return None
    small, large = torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.logspace(1, 30, 59, dtype=torch.float64)
    x = torch.cat([small, small * 1e-3, large, -large])
    y = torch.fx.GraphModule(torch.nn.Module(), graph)(x)
    for approximate in ("none", "tanh"):
        if (y - reference.gelu(x, approximate)).abs().le(1e-10 * x.abs()).all():
            return approximate, len(nodes) > 1 or _name(nodes[0]) != "gelu"
    return None


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def linear_gelu_pairs(module: torch.nn.Module, is_gelu, calls_gelu: bool) -> tuple[tuple, list[str]]:
    """The Linears of ``module`` whose one reader is a GELU, and why other GELUs do not follow on one.

    Args:
        is_gelu: whether a child is one.
        calls_gelu: whether a call of ``F.gelu`` in the forward counts.

    Returns:
        ``(linear, gelu, None)`` or ``(linear, None, approximate)`` for each pair that stands in the trace both in
        training and in evaluation, and the reasons.
    """
    try:
        first, why = _pairs(module, True, is_gelu, calls_gelu)
        second, _ = _pairs(module, False, is_gelu, calls_gelu)
    except CannotTrace as e:
        return (), [str(e)]
    pairs = tuple(pair for pair in first if pair in second)
    if len(pairs) < len(set(first) | set(second)):
        why.append("its forward differs between training and evaluation")
    return pairs, why


def _pairs(module, training: bool, is_gelu, calls_gelu: bool) -> tuple[list, list[str]]:
    graph, read = trace(module, training)
    followers: dict[str, set] = {}  # by the Linear's name; None: a call of it that no GELU follows
    why = []
    children = module._modules
    for node in graph.nodes:
        if node.op == "call_module" and type(children.get(node.target)) in linear_classes() and node.target in read:
            reader = next(iter(node.users)) if len(node.users) == 1 else None
            followers.setdefault(node.target, set()).add(_follower(node, reader, children, is_gelu, calls_gelu))
        if _is_gelu_node(node, children, is_gelu):
            why += _why_alone(node, children, read, calls_gelu)
    pairs = [(name, *f) for name, (f, *more) in ((n, list(fs)) for n, fs in followers.items()) if f and not more]
    return pairs, why


def _is_gelu_node(node: Node, children, is_gelu) -> bool:
    if node.op == "call_function":
        return node.target is torch.nn.functional.gelu
    return node.op == "call_module" and is_gelu(children.get(node.target))


def _follower(linear: Node, reader: Node | None, children, is_gelu, calls_gelu: bool):
    """What :func:`linear_gelu_pairs` says of the GELU that is ``linear``'s one reader; None if there is none."""
    if reader is None or reader.args != (linear,) or len(linear.args) != 1 or linear.kwargs:
        return None
    if not _is_gelu_node(reader, children, is_gelu):
        return None
    if reader.op == "call_module":
        return None if reader.kwargs else (reader.target, None)
    approximate = reader.kwargs.get("approximate", "none")
    plain = calls_gelu and not reader.kwargs.keys() - {"approximate"} and isinstance(approximate, str)
    return (None, approximate) if plain else None


def _why_alone(gelu: Node, children, read: set[str], calls_gelu: bool) -> list[str]:
    source = gelu.args[0] if gelu.args else None
    name = _name(gelu)
    if not isinstance(source, Node) or source.op != "call_module" or children.get(source.target) is None:
        return [f"{name} does not read a Linear"]
    kind = type(children[source.target])
    if kind not in linear_classes():
        return [f"{name} reads {source.target}, a {kind.__module__}.{kind.__qualname__} and not a Linear"]
    if len(source.users) > 1:
        return [f"{source.target} is read by {len(source.users)}, not by {name} alone"]
    if source.target not in read:
        return [f"forward does not read {source.target} off self by its name"]
    if gelu.op == "call_function" and not calls_gelu:
        return ["forward reaches F.gelu by another way than its file's F"]
    return []
