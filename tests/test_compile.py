"""torch.compile, export and tracing: the graph has torch's ops in it, whole."""

import pytest
import torch
import torch.nn.functional as TF
from torch.fx.experimental.proxy_tensor import make_fx

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F
import nnfast.optim as optim


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 40), nn.GELU("tanh"), nn.LinearGELU(40, 8), nn.LayerNorm(8))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph(backend):
    m, x = model(), torch.randn(5, 12)
    compiled = torch.compile(m, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(m(x).square().sum(), m.parameters())
    torch.testing.assert_close(compiled(x), m(x))
    compiled_grads = torch.autograd.grad(compiled(x).square().sum(), m.parameters())
    torch.testing.assert_close(compiled_grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.torch_serves("the compiler is handed torch's ops")
def test_dynamic_shapes_compile_once():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(model(), fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 6, 17):
        compiled(torch.randn(rows, 12))
    assert counter.frame_count == 1


def graphs(m, x):
    """The ATen graphs, forward and backward, that the compiler is handed for a training step of ``m``."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.append("\n".join(f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    torch.compile(m, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x).square().sum().backward()
    return seen


@pytest.mark.torch_serves("the compiler is handed torch's ops")
def test_the_compiler_is_handed_torchs_graphs():
    """Ours under torch.compile is as fast as torch's because it is the same: node for node."""
    from test_accelerate import MLP, Block, Function

    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    plain = torch.nn.Sequential(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.GELU(), layer, Block(), Function(), MLP()
    )
    x = torch.randn(5, 3, 8)
    theirs, ours = graphs(plain, x), graphs(nnfast.accelerate(plain), x)
    assert len(theirs) == 2 and "gelu_backward" in theirs[1]
    assert ours == theirs


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: torch.ops.nnfast.layer_norm(x, (w.shape[1],), b, b, 1e-5)[0],
        lambda x, w, b: torch.ops.nnfast.linear_gelu(x, w, b)[0],
        lambda x, w, b: torch.ops.nnfast.gelu(x, approximate="tanh"),
    ],
)
def test_the_ops_themselves_compile(call):
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((4, 6), (6, 6), (6,)))
    leaves = [x, w, b]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for f in (compiled, call):
        for t in leaves:
            t.grad = None
        f(x, w, b).square().sum().backward()
        if f is compiled:
            grads = [t.grad for t in leaves]
    for t, g in zip(leaves, grads, strict=True):
        torch.testing.assert_close(g, t.grad)


@pytest.mark.parametrize("tensor_lr", [True, False])
@pytest.mark.torch_serves("the compiler is handed torch's ops")
def test_compiled_step_does_not_recompile_per_lr(tensor_lr):
    """A9: never for a tensor's value, and for a number no more often than torch's own."""
    from torch._dynamo.testing import CompileCounterWithBackend

    results, compiled = [], []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        p = torch.ones(5, requires_grad=True)
        optimizer = kind([p], lr=torch.tensor(0.1) if tensor_lr else 0.1)
        step = torch.compile(optimizer.step, backend=counter)
        for k in range(5):
            p.grad = torch.full((5,), float(k))
            if tensor_lr:
                optimizer.param_groups[0]["lr"].fill_(0.1 / (k + 1))
            else:
                optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            step()
        results.append(p.detach())
        compiled.append(counter.frame_count)
    torch.testing.assert_close(*results)
    assert compiled[0] <= compiled[1] and (not tensor_lr or compiled[0] <= 2)  # the first step makes the state


def aten_only(graph):
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets and not [t for t in targets if "nnfast" in t], targets


def test_export():
    m, x = model().eval(), torch.randn(5, 12)
    exported = torch.export.export(m, (x,))
    aten_only(exported.graph)
    torch.testing.assert_close(exported.module()(x), m(x))


@pytest.mark.torch_serves("a tracer sees torch's ops")
def test_make_fx():
    m, x = model().eval(), torch.randn(5, 12)
    aten_only(make_fx(m)(x).graph)


def test_fx_symbolic_trace():
    m, x = model().eval(), torch.randn(5, 12)
    traced = torch.fx.symbolic_trace(m)
    torch.testing.assert_close(traced(x), m(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript():
    m, x = model().eval(), torch.randn(5, 12)
    torch.testing.assert_close(torch.jit.script(m)(x), m(x))
    traced = torch.jit.trace(m, x)
    torch.testing.assert_close(traced(torch.randn(3, 12)).shape, (3, 8))
    assert "nnfast::" not in str(traced.inlined_graph)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()
    y = torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.jit.script(layer)(y), layer(y))

    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return nnfast.functional.gelu(nnfast.functional.layer_norm(x, [12]), approximate="tanh")

    torch.testing.assert_close(scripted(x), TF.gelu(TF.layer_norm(x, (12,)), approximate="tanh"))


def test_meta_and_fake_tensors():
    m = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.GELU(), nn.LayerNorm(4, device="meta"))
    assert m(torch.empty(2, 3, device="meta")).shape == (2, 4)
    with torch._subclasses.FakeTensorMode():
        assert model()(torch.randn(5, 12)).shape == (5, 8)


@pytest.mark.torch_serves("functorch sees torch's ops")
def test_function_transforms():
    """L8: torch.func, vmap, forward-mode AD, functional_call, per-sample gradients."""
    m = model()
    params = {k: v.detach() for k, v in m.named_parameters()}
    x = torch.randn(5, 12)

    def loss(params, row):
        return torch.func.functional_call(m, params, (row,)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(params, x)
    total = torch.func.grad(loss)(params, x)
    for name in params:
        torch.testing.assert_close(per_sample[name].sum(0), total[name], rtol=1e-4, atol=1e-5)
    tangent = torch.randn_like(x)
    _, jvp = torch.func.jvp(m, (x,), (tangent,))
    jacobian = torch.func.jacrev(m)(x)
    torch.testing.assert_close(jvp, torch.einsum("abcd,cd->ab", jacobian, tangent), rtol=1e-4, atol=1e-5)
    torch.func.hessian(lambda v: F.layer_norm(v, (12,)).square().sum())(x[0])


@pytest.mark.torch_serves("modes and subclasses see torch's ops")
def test_modes_and_subclasses_see_torchs_ops():
    """L8: a function mode, a dispatch mode and a subclass."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Mine(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    with Mode():
        F.layer_norm(x, (4,))
    assert TF.layer_norm in seen
    with Dispatch():
        F.gelu(x)
    assert "aten.gelu.default" in seen
    for call in (lambda t: F.layer_norm(t, (4,)), F.gelu, lambda t: F.linear_gelu(t, x)):
        assert type(call(x.as_subclass(Mine))) is Mine
