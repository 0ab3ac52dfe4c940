"""A graph of our nodes, of which the backward alone runs under a mode, a transform or a tracer: it is made of torch's
ops, which these count, batch and trace, with torch's numbers."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as TF
from common import HALF, assert_close, double, served, thresholds
from test_any_input import arguments, assert_same
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nnfast.nn as nn
import nnfast.nn.functional as F

pytestmark = pytest.mark.usefixtures("some_kernels")

NAMES = [name for name, (theirs, _) in arguments().items() if theirs]


def recorded(name):
    """Of ours and of torch's: (output, leaves)."""
    theirs, _ = arguments()[name]
    for function in (getattr(F, name), theirs):
        values = arguments()[name][1]
        with served(name, when=function is not theirs), thresholds(embedding__table_bytes=0):
            output = function(**values)
        yield output, [t for t in values.values() if isinstance(t, torch.Tensor) and t.requires_grad]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.add(op.namespace)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_mode_sees_torchs_ops(name, create_graph):
    results = []
    for output, leaves in recorded(name):
        with Seen() as seen:
            results.append([*torch.autograd.grad(output.sum(), leaves, create_graph=create_graph)])
        assert seen.ops == {"aten"}
    assert_same(*results, name)


@pytest.mark.parametrize("dtype", HALF)
def test_attention_of_16_bits(dtype):
    """In ATen's ops its backward is as exact as torch's, which is one op that computes in float."""
    inputs = [torch.randn(2, 4, 33, 16).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(2, 4, 33, 16).to(dtype)
    results = []
    for function, given in ((F, inputs), (TF, inputs), (TF, [double(t) for t in inputs])):
        with served("scaled_dot_product_attention", when=function is F):
            output = function.scaled_dot_product_attention(*given, is_causal=True)
        with Seen() as seen:
            results.append(torch.autograd.grad(output, given, grad.to(output.dtype)))
        assert seen.ops == {"aten"}
    for name, *three in zip(("query", "key", "value"), *results, strict=True):
        assert_close(*three, name)


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_flops_are_counted(name):
    counts = []
    for output, leaves in recorded(name):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output.sum(), leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_gradients(name):
    """vmap over the backward, with torch's rules for batches: it warns where it has none."""
    results = []
    for output, leaves in recorded(name):
        torch.manual_seed(1)
        grads = torch.randn(3, *output.shape)
        back = functools.partial(torch.autograd.grad, output, leaves, retain_graph=True)
        alone = [back(g) for g in grads]
        with warnings.catch_warnings():
            # Of attention on a CPU, and of an embedding that adds in a fixed order, torch has none itself.
            if name not in ("scaled_dot_product_attention", "embedding"):
                warnings.simplefilter("error")
            together = torch.vmap(back)(grads)
        assert_same([*together], [torch.stack(t) for t in zip(*alone, strict=True)], name)
        results.append([*together])
    assert_same(*results, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_trace(name):
    for output, leaves in recorded(name):
        back = functools.partial(torch.autograd.grad, output, leaves, retain_graph=True)
        grad = torch.randn_like(output)
        graph = make_fx(back)(grad)
        targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
        assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
        assert_same([*graph(grad)], [*back(grad)], name)


class Wrapped(torch.Tensor):
    """A gradient that is no plain tensor."""

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        assert op.namespace == "aten"
        return op(*args, **kwargs)

    @staticmethod
    def __new__(cls, inner):
        t = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        t.inner = inner
        return t


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_another_class(name):
    results = []
    for output, leaves in recorded(name):
        torch.manual_seed(1)
        results.append([*torch.autograd.grad(output, leaves, Wrapped(torch.randn_like(output)))])
    assert_same(*results, name)


def test_layers_under_a_mode():
    """Layers one after another, which work ahead for each other where nobody looks on."""
    x = torch.randn(4, 32)
    target = torch.randint(16, (4,))
    results = []
    for lib in (nn, torch.nn):
        torch.manual_seed(0)
        model = torch.nn.Sequential(lib.LayerNorm(32), lib.Linear(32, 64), lib.GELU(), lib.Linear(64, 16))
        loss = (F if lib is nn else TF).cross_entropy(model(x), target)
        with Seen() as seen:
            loss.backward()
        assert seen.ops == {"aten"}
        results.append([p.grad for p in model.parameters()])
    assert_same(*results, "layers")
