"""torch.compile keeps ours in the graph where that gains; export and tracing have torch's ops, whole."""

import copy

import pytest
import torch
import torch.nn.functional as TF
from common import left_to_torch, run_script, served
from functorch.compile import make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx
from user_models import MLP, Block, Function

import nnfast
import nnfast.__main__
import nnfast.nn as nn
import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import compiled


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


def graphs(f, *args):
    """The ATen graphs, forward and backward, that the compiler is handed for a training step of ``f``."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.append("\n".join(f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*args).square().sum().backward()
    return seen


@pytest.mark.torch_serves("the compiler is handed torch's ops")
def test_the_compiler_is_handed_torchs_graphs():
    """Node for node, where the user holds nnfast to torch's ops."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    plain = torch.nn.Sequential(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.GELU(), layer, Block(), Function(), MLP()
    )
    x = torch.randn(5, 3, 8)
    theirs = graphs(plain, x)
    with nnfast.use_backend("torch"):
        ours = graphs(nnfast.accelerate(plain), x)
    assert len(theirs) == 2 and "gelu_backward" in theirs[1]
    assert ours == theirs


# ---- what stays ours in a graph ----


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    """With AVX2 alone, float32 products stay torch's, for no library is faster; these tests act as if one were."""
    for op in ("linear", "linear_gelu", "linear_cross_entropy"):
        monkeypatch.setitem(compiled.GAINS, (op, torch.float32), 2.0)


ROWS, WIDTH, CLASSES = 6, 64, 80


def calls(dtype):
    """op -> (a function of ours, its tensors), for what a graph may keep, at sizes that are worth it."""

    def t(*sizes):
        return torch.randn(*sizes, dtype=dtype).requires_grad_()

    x, w, b, y = t(ROWS, WIDTH), t(CLASSES, WIDTH), t(CLASSES), torch.randint(CLASSES, (ROWS,))
    heads = [t(2, 3, ROWS, 8) for _ in range(3)]
    return {
        "linear": (F.linear, (x, w, b)),
        "linear_gelu": (F.linear_gelu, (x, w, b)),
        "cross_entropy": (F.cross_entropy, (t(ROWS, CLASSES), y)),
        "linear_cross_entropy": (F.linear_cross_entropy, (x, w, y)),
        "scaled_dot_product_attention": (F.scaled_dot_product_attention, heads),
        "layer_norm": (lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b), (x, t(WIDTH), t(WIDTH))),
        "gelu": (F.gelu, (x,)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_holds_ours_where_it_gains(dtype):
    """Forward and backward, and nothing of ours where it would lose what the compiler fuses."""
    for op, (call, tensors) in calls(dtype).items():
        forward, backward = graphs(call, *tensors)
        gains = (op, dtype) in compiled.GAINS
        assert (f"nnfast.{op}.default" in forward, "nnfast" in forward) == (gains, gains), forward
        # What is reduced has its gradient in the forward.
        assert ("nnfast" in backward) == (gains and op != "linear_cross_entropy"), backward


@pytest.mark.torch_serves("nothing is computed")
def test_report_and_doctor_say_what_stays(capsys):
    nnfast.__main__.main()
    for said in (str(nnfast.report(model())), capsys.readouterr().out):
        assert all(op in said.split("torch.compile nnfast serves:")[1] for op, _ in compiled.GAINS)
    with nnfast.use_backend("torch"):
        assert "nnfast serves: nothing" in str(nnfast.report(model()))


@pytest.mark.torch_serves("what gains nothing in a graph is torch's")
def test_other_dtypes_and_small_products_are_torchs():
    t = torch.ones
    for call in (
        lambda: F.scaled_dot_product_attention(*[t(2, 3, 4, 8, dtype=torch.float64)] * 3),
        lambda: F.linear(t(ROWS, WIDTH).double(), t(CLASSES, WIDTH).double()),
        lambda: F.linear(t(ROWS, 8), t(8, 8)),
    ):
        assert "nnfast" not in graphs(lambda x, call=call: call() + x, torch.ones((), requires_grad=True))[0]


def test_autocast_decides_by_its_dtype():
    for op, (call, tensors) in calls(torch.float32).items():
        with torch.autocast("cpu", torch.bfloat16):
            seen = graphs(call, *tensors)
        # Logits in float32 come from a conversion, which the compiler takes into what reads them.
        gains = (op, torch.bfloat16) in compiled.GAINS and op != "cross_entropy"
        assert ("nnfast" in seen[0]) == gains, (op, seen)


class LanguageModel(nn.Module):
    """A block of a GPT with its head and its loss, just large enough for its products to stay."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.token, self.norm, self.qkv = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.LinearGELU(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, CLASSES)

    def block(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.mlp(x)

    def forward(self, tokens):
        x = self.token(tokens)
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


STAYING = "linear", "linear_gelu", "cross_entropy", "scaled_dot_product_attention"


def losses_of_a_run(forward, model, steps=20, dtype=None):
    torch.manual_seed(0)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens = torch.randint(8, (2 + step % 5, 7))  # a tenth of the classes: that can be learned
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = forward(tokens)
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_agree_and_nothing_is_compiled_again(dtype, checkpointed):
    """Over twenty steps, with batches of five sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = LanguageModel(checkpointed)
    eager = copy.deepcopy(model)
    forward = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with served(*STAYING, "linear_backward", "scaled_dot_product_attention_backward", when=dtype is None):
        run = losses_of_a_run(forward, model, dtype=dtype)
        losses, once = [next(run)], counter.frame_count
        losses += run
    assert counter.frame_count == once
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(losses, [*losses_of_a_run(eager, eager, dtype=dtype)], **close)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor_keeps_ours_in_every_mode(mode):
    torch._dynamo.reset()
    model = LanguageModel()
    eager = copy.deepcopy(model)
    forward = torch.compile(model, fullgraph=True, mode=mode)
    with served(*STAYING, "linear_backward", "cross_entropy_backward"):
        losses = [*losses_of_a_run(forward, model, steps=2)]
    torch.testing.assert_close(losses, [*losses_of_a_run(eager, eager, steps=2)], rtol=1e-5, atol=1e-5)


def test_accelerated_before_and_after_compiling():
    for late in (False, True):
        torch._dynamo.reset()
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, CLASSES), torch.nn.GELU(), torch.nn.CrossEntropyLoss())
        batch = torch.randn(ROWS, WIDTH)
        stack, loss = model[:2], model[2]
        forward = torch.compile(stack, fullgraph=True, backend="aot_eager")
        if late:
            before = forward(batch)
            nnfast.accelerate(forward)
        else:
            nnfast.accelerate(stack)
        with served("linear", "linear_backward"):
            after = forward(batch)
            loss(after, torch.randint(CLASSES, (ROWS,))).backward()
        if late:
            torch.testing.assert_close(after, before)
        nnfast.restore(stack)
        with left_to_torch("linear"):
            torch.testing.assert_close(forward(batch), after)


def test_a_graph_follows_the_backend():
    """A graph that was made before follows, too."""
    call, tensors = calls(torch.float32)["linear"]
    forward = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = forward(*tensors)
    for backend, taken in (("torch", left_to_torch), ("cpu", served)):
        with nnfast.use_backend(backend), taken("linear"):
            torch.testing.assert_close(forward(*tensors), expected)


@pytest.mark.torch_serves("functorch sees torch's ops")
def test_transforms_in_a_graph_are_torchs():
    w = torch.randn(CLASSES, WIDTH)

    def f(x):
        return F.linear(x, w).square().sum()

    x = torch.randn(ROWS, WIDTH)
    for transformed in (
        torch.func.grad(f),
        torch.func.vmap(f),
        lambda x: torch.func.jvp(f, (x,), (x,)),
    ):
        torch._dynamo.reset()
        graph = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(graph(x), transformed(x))


@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_errors_in_a_graph_are_torchs():
    t = torch.ones
    cases = [
        ("linear", (t(ROWS, WIDTH - 1), t(CLASSES, WIDTH))),
        ("linear", (t(ROWS, WIDTH), t(CLASSES, WIDTH).double())),
        ("cross_entropy", (t(ROWS, CLASSES), torch.ones(ROWS + 1, dtype=torch.int64))),
        ("scaled_dot_product_attention", (t(2, 3, 4, 8), t(2, 3, 4, 9), t(2, 3, 4, 8))),
    ]
    for name, tensors in cases:
        said = []
        for functional in (F, TF):
            torch._dynamo.reset()
            with pytest.raises(Exception) as caught:
                torch.compile(getattr(functional, name), fullgraph=True, backend="aot_eager")(*tensors)
            said.append((type(caught.value), str(caught.value).splitlines()[0].split("(")[0]))
        assert said[0] == said[1]


def test_backends_of_attention_that_the_user_forbids():
    call, tensors = calls(torch.float32)["scaled_dot_product_attention"]
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        assert "nnfast" not in graphs(call, *tensors)[0]
    torch._dynamo.reset()
    forward = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = forward(*tensors)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), served("scaled_dot_product_attention"):
        torch.testing.assert_close(forward(*tensors), expected)  # like torch's own, a graph stays as it was made


@pytest.mark.served_in_children
def test_the_cache_is_of_one_version(tmp_path):
    """What was compiled is found by the next process, and not by another version's."""
    program = """
import sys, torch, nnfast
from nnfast import compiled
from torch._dynamo.utils import counters
compiled._VERSION = compiled._VERSION.replace(nnfast.__version__, sys.argv[1])
compiled.GAINS["linear", torch.float32] = 2.0  # as on any CPU
w = torch.ones(64, 64, requires_grad=True)
torch.compile(nnfast.nn.functional.linear)(torch.ones(4, 64), w).sum().backward()
assert nnfast.backend.native.paths()["linear_backward"]
print(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    said = [run_script(program, version, env=env).split() for version in ("1", "1", "2")]
    first, again, other = said
    assert again == ["1", "0"] and first == other and first[0] == "0", said


@pytest.mark.parametrize("within", [False, True])
def test_a_compiled_step_is_one_native_call(within):
    """``torch.compile(optimizer.step)``, and a compiled function that calls it."""
    results = []
    for compile in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        kinds = optim.AdamW, optim.SGD, optim.Adam
        optimizers = [kind([torch.randn(5, requires_grad=True)], lr=0.1) for kind in kinds]
        for optimizer, op in zip(optimizers, ("adamw_", "sgd_", "adamw_"), strict=True):
            (p,) = optimizer.param_groups[0]["params"]
            step = (lambda optimizer=optimizer: optimizer.step()) if within else optimizer.step
            step = torch.compile(step, backend="eager") if compile else step
            count = nnfast.backend.native.paths()[op]
            for k in range(4):
                p.grad = torch.full((5,), float(k))
                step()
            assert nnfast.backend.native.paths()[op] - count == 4
            results.append(p.detach())
    for ours, eager in zip(results[:3], results[3:], strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_names_no_op_of_ours(strict):
    tokens = torch.randint(CLASSES, (2, 7))
    model = LanguageModel()
    program = torch.export.export(model, (tokens,), strict=strict)
    aten_only(program.run_decompositions().graph)
    torch.testing.assert_close(program.module()(tokens), model(tokens))


# ---- the ops and the optimizers themselves ----


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


class Doubled(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func in (TF.scaled_dot_product_attention, TF.cross_entropy) else result


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.torch_serves("a mode sees torch's functions")
def test_a_function_mode_sees_torchs_functions():
    """K2: inside a compiled function and around it."""
    q, x, y = torch.randn(2, 4, 6, 8), torch.randn(6, 80), torch.randint(80, (6,))

    def calls(library):
        return library.scaled_dot_product_attention(q, q, q), library.cross_entropy(x, y)

    def inside(library):
        with Doubled():
            return calls(library)

    expected = [2 * t for t in calls(TF)]
    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (inside, calls)]
    torch.testing.assert_close(list(compiled[0](F)), expected)
    with Doubled():
        torch.testing.assert_close(list(compiled[1](F)), expected)


@pytest.mark.usefixtures("cpu_kernels")
def test_rows_and_classes_that_only_a_run_knows():
    """K1, K2: no rows, and a class that is none, in a graph that was made before."""
    loss = torch.compile(F.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    x, y = torch.randn(6, 80, requires_grad=True), torch.randint(80, (6,))
    with served("cross_entropy"):
        torch.testing.assert_close(loss(x, y), TF.cross_entropy(x, y))
    none = torch.empty(0, 80, requires_grad=True)
    found = loss(none, y[:0])
    found.backward()
    assert found.isnan() and none.grad.shape == (0, 80)
    y[0] = 90
    with pytest.raises(IndexError, match="Target 90 is out of bounds"):
        loss(x, y)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.torch_serves("clipping is the compiler's to fuse")
def test_clipping_in_one_graph():
    """K1: no graph break."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    for p in params:
        p.grad = torch.ones_like(p)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def clip():
        return nnfast.nn.utils.clip_grad_norm_(params, 0.5)

    torch.testing.assert_close(clip(), torch.tensor(8.0).sqrt())
    torch.testing.assert_close(params[0].grad, torch.full((3,), 0.5 / 8**0.5))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.torch_serves("torch is forced")
def test_the_norm_of_a_compiled_step():
    """K3: what a step sets is there, also where torch serves it."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 100.0)
    optimizer = optim.AdamW([p], max_grad_norm=0.3)
    with nnfast.use_backend("torch"):
        torch.compile(optimizer.step, backend="eager")()
    assert optimizer.grad_norm == 200
