"""On a GPU, with each kind of kernels: ``python -m pytest -m gpu``. Full sizes, and what only a GPU can get wrong."""

import itertools

import pytest
import torch
import torch.nn.functional as TF
from common import FLOAT_AND_HALF as DTYPES
from common import HALF, assert_close, double, run
from common import served as paths_taken
from test_adamw import exact, train
from test_layer_norm import compare as compare_layer_norm
from test_linear_gelu import AHEAD, compare_mlp
from test_linear_gelu import compare as compare_linear_gelu

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import backend

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def kernels(request):
    """Every test runs over both kinds of kernels, each forced, so that nothing falls back unseen."""
    if why := backend.available(request.param):
        pytest.skip(why)
    # cuBLAS repeats its sums only with a workspace of a fixed size, which is the environment's to give.
    torch.use_deterministic_algorithms(False)
    with backend.use_backend(request.param):
        yield request.param


@pytest.fixture
def served(kernels):
    """Skip an op that this kind of kernels does not have."""

    def check(op):
        if op not in (nnfast.kernels.OPS if kernels == "triton" else backend.native.cuda_kernels()):
            pytest.skip(f"no {kernels} kernel of {op}")

    return check


def gpu(*shape, dtype=torch.float32, grad=False, mean=0.0):
    return (torch.randn(shape, device="cuda") + mean).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 256, 768, 1024, 4096, 5000, 8192, 16384, 20000])
def test_layer_norm(served, dtype, size):
    served("layer_norm")
    for rows in (1, 1000, 4096):
        args = [
            gpu(rows, size, dtype=dtype, grad=True),
            (size,),
            *(gpu(size, dtype=dtype, grad=True) for _ in "wb"),
            1e-5,
        ]
        compare_layer_norm(args, gpu(rows, size, dtype=dtype), f"{rows} x {size}")


def test_layer_norm_strides(served):
    served("layer_norm")
    wide, weight = gpu(300, 1000), gpu(768, grad=True)
    cases = wide[:, :768], wide[:, 3:771], wide[:1, :768].expand(300, 768), gpu(768, 300).t()
    for x, g in itertools.product(cases, cases):
        compare_layer_norm((x.detach().requires_grad_(), (768,), weight, None, 1e-5), g, f"{x.stride()}, {g.stride()}")
    compare_layer_norm((gpu(64, 768, mean=2000.0, grad=True), (768,), None, None, 1e-5), gpu(64, 768), "mean 2000")


def test_layer_norm_of_more_than_2_31_elements(served):
    served("layer_norm")
    rows, size = 2**21 + 3, 1024
    x = gpu(size, dtype=torch.bfloat16).expand(rows, size)  # one row, expanded: the input takes no memory
    y = F.layer_norm(x, (size,))
    assert torch.equal(y[-1], y[0]) and torch.equal(y[2**21], y[0])
    x = y.requires_grad_()
    (grad,) = torch.autograd.grad(F.layer_norm(x, (size,)), x, y)
    assert torch.equal(grad[-1], grad[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(served, dtype, approximate):
    served("linear_gelu")
    for (rows, depth, cols), has_bias in itertools.product(
        [(1, 8, 8), (70, 77, 301), (512, 768, 3072), (1000, 1024, 136), (4096, 768, 3072)], (True, False)
    ):
        x, weight, bias = (gpu(*s, dtype=dtype, grad=True) for s in ((rows, depth), (cols, depth), (cols,)))
        args = x, weight, bias if has_bias else None, approximate
        compare_linear_gelu(args, gpu(rows, cols, dtype=dtype), f"{rows} x {depth} -> {cols}")


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_linear_that_reads_a_gelu(kernels, served, dtype, approximate, by_columns):
    served("gelu_linear_backward" if kernels == "triton" else "linear")
    for rows, width, hidden, out in ((1, 8, 8, 8), (70, 77, 301, 45), (1000, 136, 264, 72), (4096, 768, 3072, 768)):
        sizes = (rows, width), (hidden, width), (hidden,), (out, hidden), (out,)
        leaves = [gpu(*s, dtype=dtype, grad=True) for s in sizes]
        weight = (lambda v: v.t().contiguous().t()) if by_columns else (lambda v: v)
        with paths_taken(*AHEAD):
            compare_mlp(leaves, gpu(rows, out), f"{rows} x {width} -> {hidden} -> {out}", approximate, weight)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"maximize": True}, {"fused": True}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES], ids=str)
def test_adamw(served, dtypes, options):
    served("adamw_")
    sizes = [(0,), (1,), (4095,), (4096,), (4097,), (), (3, 0, 2), (1000, 777), (0, 4), (3_000_001,)]
    kinds = list(itertools.islice(itertools.cycle(dtypes), len(sizes)))
    params, *grads = ([gpu(*s, dtype=t) for s, t in zip(sizes, kinds, strict=True)] for _ in range(5))
    ours, optimizer = train(optim.AdamW, params, grads, **options)
    torchs, theirs = train(torch.optim.AdamW, params, grads, **{"fused": "capturable" not in options, **options})
    true = exact([p.cpu() for p in params], [[g.cpu() for g in step] for step in grads], **options)
    for p, q, t in zip(ours, torchs, true, strict=True):
        assert_close(p.cpu(), q.cpu(), t, f"{p.dtype} {tuple(p.shape)}")
        assert optimizer.state[p]["step"] == 4
        on_gpu = options.keys() & {"fused", "capturable"}
        assert optimizer.state[p]["step"].is_cuda == bool(on_gpu)


def test_adamw_of_more_than_2_31_elements(served):
    served("adamw_")
    p = torch.ones(2**31 + 5, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optim.AdamW([p], lr=0.5).step()
    assert p[-1] == p[0] and p[2**31] == p[0] and p[0] < 0.75


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float64])
def test_a_learning_rate_on_the_gpu(served, dtype):
    """In float and double it is read there; in what the kernels do not read the step is torch's."""
    served("adamw_")
    results = []
    for library in (optim, torch.optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(gpu(50))
        optimizer = library.AdamW([p], lr=torch.tensor(1, dtype=dtype, device="cuda"))
        for _ in range(3):
            p.grad = gpu(50)
            try:
                optimizer.step()
            except RuntimeError as e:  # held to a kind of kernels, so that what is torch's raises
                assert "does not cover" in str(e) and library is optim and dtype is not torch.float64
                return
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_adamw_under_a_grad_scaler(served):
    served("adamw_")
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 30).cuda()
        optimizer, scaler = kind(model.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cuda", init_scale=128.0)
        for step in range(4):
            x = torch.randn(8, 40, device="cuda")
            if step == 2:
                x[0, 0] = float("inf")
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([*model.parameters(), *(s["step"] for s in optimizer.state.values())])
    torch.testing.assert_close(*results)
    assert results[0][-1] == 3


def test_repeats_to_the_bit(served):
    served("layer_norm")
    args = (
        gpu(5000, 1000, dtype=torch.bfloat16, grad=True),
        (1000,),
        *(gpu(1000, dtype=torch.bfloat16, grad=True) for _ in "wb"),
    )
    grad = gpu(5000, 1000, dtype=torch.bfloat16)
    first = run(F.layer_norm, args, grad)
    for _ in range(10):
        assert all(map(torch.equal, first, run(F.layer_norm, args, grad)))
    served("linear_gelu")
    args = *(gpu(*s, dtype=torch.bfloat16, grad=True) for s in ((2000, 256), (512, 256), (512,))), "none"
    grad = gpu(2000, 512, dtype=torch.bfloat16)
    first = run(F.linear_gelu, args, grad)
    for _ in range(10):
        again = run(F.linear_gelu, args, grad)
        assert torch.equal(first[0], again[0]) and torch.equal(first[3], again[3])


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).cuda().bfloat16()


def all_served(served):
    for op in ("layer_norm", "linear_gelu", "adamw_"):
        served(op)


def test_on_a_side_stream(served):
    """Work that is queued before and after on the same stream is waited for, and no other."""
    all_served(served)
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
        model = small_model()
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = torch.ones(512, 64, device="cuda", dtype=torch.bfloat16)
            for _ in range(3):
                torch.cuda._sleep(10_000_000)
                x.add_(0.5)
                model(x).square().mean().backward()
                optimizer.step()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_in_a_cuda_graph(served):
    """A whole training step, recorded and replayed; what is served again afterwards is not disturbed."""
    all_served(served)
    results = []
    for graphed in (True, False):
        model = small_model()
        lr = torch.tensor(0.1, device="cuda")
        optimizer = optim.AdamW(model.parameters(), lr=lr, capturable=True)
        x = torch.ones(512, 64, device="cuda", dtype=torch.bfloat16)

        def step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                step()
        for k in range(4):
            lr.fill_(0.1 / (k + 1))
            x.add_(0.25)
            graph.replay() if graphed else step()
        results.append([*model.parameters(), *(s["step"] for s in optimizer.state.values())])
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    assert results[0][-1] == 7


def test_on_the_second_gpu(served):
    """Launched there, while the first is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    all_served(served)
    model, x = small_model().to("cuda:1"), torch.randn(50, 64, device="cuda:1", dtype=torch.bfloat16)
    optimizer = optim.AdamW(model.parameters())
    with torch.cuda.device(0):
        model(x).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_autocast(served):
    """L7, G2: LayerNorm in float32, Linear+GELU in autocast's dtype, as torch lists them."""
    served("layer_norm")
    norm, linear = nn.LayerNorm(64).cuda(), nn.LinearGELU(64, 128).cuda()
    x = gpu(32, 64, dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32
        served("linear_gelu")
        output = linear(norm(x))
        assert output.dtype == torch.bfloat16
        output.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    served("layer_norm")
    for (rows, size), dtype in itertools.product([(37, 64), (37, 300), (1000, 1024), (50, 8192), (5, 20001)], HALF):
        args = gpu(rows, size, dtype=dtype, grad=True), (size,), *(gpu(size, grad=True) for _ in "wb"), 1e-5
        with torch.autocast("cuda", dtype=dtype):
            compare_layer_norm(args, gpu(rows, size), f"{rows} x {size} to float32")


def test_what_torch_refuses_is_torchs(served):
    """L7: float weight beside 16-bit input raises on a GPU, and float64 is torch's."""
    served("layer_norm")
    x, weight = gpu(3, 8, dtype=torch.bfloat16), gpu(8)
    with pytest.raises(RuntimeError) as theirs:
        TF.layer_norm(x, (8,), weight)
    with nnfast.use_backend("torch"), pytest.raises(RuntimeError) as ours:
        F.layer_norm(x, (8,), weight)
    assert str(ours.value) == str(theirs.value)
    for args in ((x, (8,), weight), (double(gpu(3, 8)), (8,))):
        with pytest.raises(RuntimeError, match="does not cover"):
            F.layer_norm(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expanded_gradient(served, dtype):
    """As y.sum() gives it: the values and strides of a whole one; of no columns too."""
    served("linear_gelu")
    for shape in ((70, 136), (3, 0)):
        pre = gpu(*shape, dtype=dtype)
        one = torch.ones((), dtype=dtype, device="cuda").expand(shape)
        op = torch.ops.nnfast.gelu_backward_sum
        for a, b in zip(op(one, pre), op(one.contiguous(), pre), strict=True):
            torch.testing.assert_close(a, b, check_stride=True)


def test_no_more_memory_than_torch(served):
    """Linear+GELU saves its input and the pre-activation, as torch's two calls do."""
    served("linear_gelu")
    x, weight, bias = (gpu(*s, dtype=torch.bfloat16, grad=True) for s in ((8192, 768), (3072, 768), (3072,)))
    peaks = []
    for f in (F.linear_gelu, lambda *a: TF.gelu(TF.linear(*a))):
        for _ in range(2):  # the first call tunes
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f(x, weight, bias).sum().backward()
            x.grad = weight.grad = bias.grad = None
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # The partial sums of the bias's gradient are ours alone.
    assert peaks[0] <= peaks[1] + (4 << 20)
