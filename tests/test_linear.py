"""Linear. N1 and N2 are the rows of the contract (tests/README.md)."""

import itertools

import common
import pytest
import torch
import torch.nn.functional as TF
from common import DTYPES, HALF, assert_close, assert_same_error, double, layouts, run, served, threads, thresholds
from torch.utils.checkpoint import checkpoint

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F

# (input's shape, out_features): 1-D to 4-D, one feature, one row, sizes over and under a register, and one product
# large enough for the library that serves large ones.
SHAPES = [((5,), 3), ((1, 1), 1), ((4, 7), 9), ((2, 3, 17), 33), ((2, 1, 3, 8), 15), ((64, 65), 130), ((300, 100), 200)]

# Numbers with which a product of any size goes to the library for large ones.
EVERY_PRODUCT = {"product__one_dnn_multiply_adds": 0, "product__one_dnn_float32": 1}
# Ours of 16 bits, in blocks that a small product has several of.
EVERY_GEMM = {"product__gemm_16_bits": 2, "product__gemm_multiply_adds": 0, "gemm__thread_multiply_adds": 1000}
EVERY_GEMM |= {"gemm__rows": 50, "gemm__columns": 1, "gemm__thread_rows": 7}
PRODUCTS = pytest.mark.parametrize("numbers", [{}, EVERY_PRODUCT, EVERY_GEMM], ids=["", "one_dnn", "gemm"])


def sample_inputs(dtype, requires_grad=True, shapes=SHAPES):
    """(input, weight, bias) over the shapes, with and without bias."""
    for (shape, out), has_bias in itertools.product(shapes, (True, False)):

        def make(*size):
            return torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

        yield make(*shape), make(out, shape[-1]), make(out) if has_bias else None


def compare(args, grad_out, what):
    """Ours, served by ours, beside torch's and float64."""
    with served("linear", "linear_backward"):
        common.compare(F.linear, TF.linear, TF.linear, args, grad_out, what)


@pytest.mark.usefixtures("cpu_kernels")
@PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, numbers):
    """N1: against float64, over shapes and dtypes."""
    with thresholds(**numbers):
        for args in sample_inputs(dtype):
            grad_out = torch.randn(*args[0].shape[:-1], len(args[1])).to(dtype)
            compare(args, grad_out, f"{tuple(args[0].shape)} -> {len(args[1])}")


@pytest.mark.usefixtures("cpu_kernels")
@PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, numbers):
    """N1: strides, zero strides and offsets of every argument: each in each layout beside dense ones, and all alike."""
    for features in (37, 1):
        tensors = (torch.randn(2, 3, features), torch.randn(9, features), torch.randn(1, 9), torch.randn(2, 3, 9))
        dense, *others = zip(*(layouts(t.to(dtype)).values() for t in tensors), strict=True)
        for x, w, b, grad_out in [dense, *others] + [
            (*dense[:i], o[i], *dense[i + 1 :]) for o in others for i in range(4)
        ]:
            leaves = [t.detach().requires_grad_() for t in (x, w, b[0])]
            with thresholds(**numbers):
                compare(leaves, grad_out, str([t.stride() for t in (*leaves, grad_out)]))


@pytest.mark.usefixtures("cpu_kernels")
def test_the_weights_gradient_lies_as_the_weight_does():
    """A weight by columns, such as Conv1D's, gets its gradient by columns: nobody need copy it."""
    x, w = torch.randn(6, 10), torch.randn(10, 7, requires_grad=True)
    for weight, strides in ((w.t(), (1, 7)), (w.t().contiguous(), (10, 1))):
        ours = torch.ops.nnfast.linear_backward(torch.randn(6, 7), x, weight, (True, True, True))[1]
        assert ours.stride() == strides


@pytest.mark.usefixtures("cpu_kernels")
def test_gradcheck():
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,)))
    for args in ((x, w, b), (x, w, None), (x.detach(), w, b), (x, w.detach(), None)):
        assert torch.autograd.gradcheck(F.linear, args) and torch.autograd.gradgradcheck(F.linear, args)


@pytest.mark.usefixtures("some_kernels")
def test_sparse_gradients():
    """Of a matrix, without a bias: torch's products take them."""
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    columns = torch.arange(5)[:, None]
    backwards = [
        lambda y: y.gather(1, columns, sparse_grad=True).sum().backward(),
        lambda y: y.backward(torch.eye(5, 6).to_sparse()),
    ]
    for backward in backwards:
        found = []
        for linear in (F.linear, TF.linear):
            x.grad = w.grad = None
            backward(linear(x, w))
            found.append((x.grad, w.grad))
        torch.testing.assert_close(*found)


@pytest.mark.usefixtures("cpu_kernels")
def test_only_what_is_wanted():
    """N2, G6: every combination of frozen input, weight and bias: gradients, and what is kept for them."""
    for mask in itertools.product((True, False), repeat=3):
        if not any(mask):
            continue
        tensors = [torch.randn(3, 10), torch.randn(7, 10), torch.randn(7)]
        for t, wanted in zip(tensors, mask, strict=True):
            t.requires_grad_(wanted)
        compare(tensors, torch.randn(3, 7), str(mask))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            output = F.linear(*tensors)
        assert {t.data_ptr() for t in saved} == {
            t.data_ptr() for t, other in ((tensors[0], mask[1]), (tensors[1], mask[0])) if other
        }
        output.sum().backward()
        assert [t.grad is not None for t in tensors] == list(mask)


@pytest.mark.usefixtures("cpu_kernels")
def test_saved_tensors_are_guarded_and_gradients_left_alone():
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((6, 10), (7, 10), (7,)))
    expected = torch.autograd.grad(TF.linear(x, w, b), (x, w, b), torch.ones(6, 7))
    y, grad = F.linear(x, w, b), torch.ones(6, 7)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(y, (x, w, b), grad, retain_graph=True), expected)
    assert grad.eq(1).all() and grad._version == 0
    for changed in (x, w):
        y = F.linear(x, w, b)
        with torch.no_grad():
            changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    F.linear(x, w, b).mul_(2).sum().backward()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype):
    """N1: ours serves an input without rows; one without features is torch's, as the next test shows."""
    for shape, out in (((0, 5), 3), ((2, 0, 5), 3)):
        x, w, b = (torch.ones(s, dtype=dtype, requires_grad=True) for s in (shape, (out, 5), (out,)))
        with served("linear", "linear_backward"):
            output = F.linear(x, w, b)
            output.sum().backward()
        assert output.shape == (*shape[:-1], 3) and x.grad.shape == shape
        assert w.grad.eq(0).all() and b.grad.eq(0).all()


@pytest.mark.parametrize("features, out", [(0, 3), (5, 0), (0, 0)])
@pytest.mark.torch_serves("without features nothing tells how many rows there are")
def test_no_features(features, out):
    args = [torch.ones(s, requires_grad=True) for s in ((2, features), (out, features), (out,))]
    ours, torchs = F.linear(*args), TF.linear(*args)
    torch.testing.assert_close(ours, torchs)
    ours.sum().backward()
    assert all(t.grad.shape == t.shape for t in args)


@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_errors_are_torchs():
    """N1: type and text."""
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for args in (
        (x, torch.randn(5, 3), b),
        (x, w, torch.randn(4)),
        (x, w.double(), b),
        (x.long(), w, b),
        (torch.randn(()), w, b),
        (x, None, b),
        (x, torch.randn(2, 5, 4), b),
        (x, torch.randn(4), torch.randn(())),
        (x, w, 3),
        ("x", w, b),
    ):
        assert_same_error(F.linear, TF.linear, *args)
    for args in ((x, torch.randn(4)), (x, w, torch.randn(1))):
        torch.testing.assert_close(F.linear(*args), TF.linear(*args))


@pytest.mark.usefixtures("cpu_kernels")
def test_what_the_backward_reads_is_checked():
    """An op that anybody can call reads nothing that is not there."""
    grad, x, w = torch.randn(6, 5), torch.randn(6, 4), torch.randn(5, 4)
    every = (True, True, True)
    torch.ops.nnfast.linear_backward(grad, x, w, every)
    for args in (
        (grad[:1], x, w, every),
        (grad[:, :3], x, w, every),
        (grad.double(), x, w, every),
        (grad, x[:1], w, every),
        (grad, x, w[:3], every),
        (grad, x.bfloat16(), w, every),
        (grad, x, w.double(), every),
        (grad, None, w, every),
        (grad, x, None, every),
        (grad[0], x, w, every),
        (grad.long(), x.long(), w.long(), every),
        (torch.tensor(1.0), None, None, (False, False, True)),
        (torch.tensor(1.0), x, w, every),
    ):
        with pytest.raises(RuntimeError, match="nnfast::linear_backward"):
            torch.ops.nnfast.linear_backward(*args)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match="nnfast::linear_backward: dtype"):
            torch.ops.nnfast.linear_backward(grad, x, w, every, dtype=dtype)
        with pytest.raises(RuntimeError, match="nnfast::linear_backward: dtype"):
            torch.ops.nnfast.linear_backward(grad, x, w, every, input_dtype=dtype)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    """N1: the output has autocast's dtype, the gradients the parameters'; a weight is cast once."""
    ours, theirs = nn.Linear(20, 30), torch.nn.Linear(20, 30)
    theirs.load_state_dict(ours.state_dict())
    for input_dtype in (torch.float32, dtype):
        x, grads = torch.randn(8, 20).to(input_dtype), []
        for model in (ours, theirs):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=dtype):
                output = model(leaf)
                assert output.dtype == dtype
                output.float().square().sum().backward()
            grads.append([output, leaf.grad, *(p.grad for p in model.parameters())])
        for a, b in zip(*grads, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=dtype), served("linear"):
        x = torch.randn(3, 20, dtype=torch.float64)
        with pytest.raises(RuntimeError):
            TF.linear(x, ours.weight)
        with pytest.raises(RuntimeError), nnfast.use_backend("torch"):
            F.linear(x, ours.weight)
        ours(torch.randn(3, 20))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("part", [None, 1, 200])
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_what_autocast_cast(dtype, part):
    """N1: they go to the parameter in its own dtype, in parts or whole, and are no less exact than torch's."""
    numbers = {} if part is None else {"product__widened_bytes": part}

    def by_columns(linear):
        def function(x, w, b):
            return linear(x, w.t(), b)

        return function

    def twice(linear):
        def function(x, w, b):
            return linear(x, w, b) + 2 * linear(x, 2 * w)  # a parameter, and what was made of one

        return function

    def with_gelu(linear):
        gelu = F.linear_gelu if linear is F.linear else lambda *args: TF.gelu(linear(*args))
        return lambda x, w, b: gelu(x, w, b)

    for how in (lambda linear: linear, by_columns, twice, with_gelu):
        weight = torch.randn(20, 30).requires_grad_() if how is by_columns else torch.randn(30, 20).requires_grad_()
        args, grad_out = [torch.randn(7, 20, requires_grad=True), weight, torch.randn(30, requires_grad=True)], None
        results = []
        for linear, paths in ((F.linear, ("linear_backward", "product.widened")), (TF.linear, ())):
            with thresholds(**numbers), torch.autocast("cpu", dtype), served(*paths):
                output = how(linear)(*args)
                grad_out = torch.randn_like(output) if grad_out is None else grad_out
                results.append(torch.autograd.grad(output, args, grad_out))
        # What is cast is no part of the comparison: exact is what the cast values give.
        cast = [double(t.detach().to(dtype).requires_grad_()) for t in args]
        exact = torch.autograd.grad(how(TF.linear)(*cast), cast, grad_out.double())
        for name, a, b, true in zip(("input", "weight", "bias"), *results, exact, strict=True):
            assert a.dtype == torch.float32
            assert_close(a, b, true, name)


@pytest.mark.usefixtures("cpu_kernels")
def test_the_gradients_of_autocast_go_where_torchs_do():
    """G6: hooks of the parameter, accumulation, graphs kept, gradients of gradients, frozen parameters, checkpoints."""
    ours, theirs = nn.Linear(20, 30), torch.nn.Linear(20, 30)
    theirs.load_state_dict(ours.state_dict())
    x, seen = torch.randn(8, 20), {ours: [], theirs: []}
    for model, calls in seen.items():
        model.weight.register_hook(lambda g, calls=calls: calls.append((g.dtype, g.shape)))
        model.weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(p.grad.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float().square() + checkpoint(model, x, use_reentrant=False)).sum()
            other = torch.nn.functional.linear(x, model.weight).sum()  # torch's reads the cast that is kept
        loss.backward(retain_graph=True)
        loss.backward()
        other.backward()
        (first,) = torch.autograd.grad(_twice(model, x), model.weight, create_graph=True)
        calls.append(torch.autograd.grad(first.square().sum(), model.weight)[0])
        model.bias.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        calls += [model.weight.grad, model.bias.grad]
    assert len(seen[ours]) == len(seen[theirs])
    for a, b in zip(*seen.values(), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps * b.abs().max().item())
        else:
            assert a == b


def _twice(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float().square().sum()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_precision_of_float32_products(precision):
    """N1: where the user lets them be less precise, torch decides how, and the result is torch's to the bit."""
    x, w = torch.randn(256, 256), torch.randn(256, 256)
    exact, before = TF.linear(x.double(), w.double()), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with thresholds(**EVERY_PRODUCT), served("product.one_dnn" if precision == "highest" else "product.torch"):
            ours = F.linear(x, w)
        if precision == "medium":
            assert torch.equal(ours, TF.linear(x, w))
        else:
            assert_close(ours, TF.linear(x, w), exact)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("n", (768, 1024, 1536))
def test_square_products(n, bias, autocast):
    """Where output, operands and the library's own memory have the same number of bytes, each gets its own."""
    x, layer = torch.randn(n, n, requires_grad=True), nn.Linear(n, n, bias=bias)
    with served("linear", "linear_backward"):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            (grad,) = torch.autograd.grad(y, x, y.detach())
    # In float32: torch's own product of 16 bits takes seconds on a CPU that has none. What differs is rounding.
    expected = TF.linear(x, layer.weight, layer.bias)
    (grad_expected,) = torch.autograd.grad(expected, x, y.detach().float())
    tolerance = 2**-7 if autocast else 1e-5
    for ours, torchs in ((y, expected), (grad, grad_expected)):
        assert (ours - torchs).abs().max() <= tolerance * torchs.abs().max()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_of_16_bits(dtype):
    """N1: past a block of rows, of columns and of depth; operands by rows, by columns and neither; into float."""
    numbers = {"product__gemm_16_bits": 2, "product__gemm_multiply_adds": 0}
    sizes = [(7, 5, 3), (1050, 40, 1100), (130, 600, 257), (3, 64, 3)]
    for (m, k, n), low in itertools.product(sizes, (False, True)):
        with thresholds(**(EVERY_GEMM if low else numbers)):
            for x, w in itertools.product(operands(m, k, dtype), operands(n, k, dtype)):
                b = torch.randn(2 * n, dtype=torch.float64).to(dtype)[::2]
                with served("product.gemm"):
                    ours = torch.ops.nnfast.linear(x, w, b)
                exact = TF.linear(x.double(), w.double(), b.double())
                assert_close(ours, TF.linear(x.float(), w.float(), b.float()).to(dtype), exact, f"{m} {k} {n}")
                with served("product.gemm"):
                    _, wide, _ = torch.ops.nnfast.linear_backward(ours, x, w, (False, True, False), dtype=torch.float32)
                true = ours.double().t() @ x.double()
                size = ours.double().abs().t() @ x.double().abs()
                # Products of two numbers of 16 bits are exact in float, and each of m additions rounds by half an eps.
                assert wide.dtype == torch.float32
                assert ((wide.double() - true).abs() <= size * torch.finfo(torch.float32).eps / 2 * m).all()


def operands(rows, columns, dtype):
    """The same kind of matrix by rows, by columns, with gaps both ways, and one row over and over."""
    t = torch.randn(2 * rows, 2 * columns, dtype=torch.float64).to(dtype)
    yield t[:rows, :columns].contiguous()
    yield t[:rows, :columns].t().contiguous().t()
    yield t[::2, ::2]
    yield t[:1, :columns].expand(rows, columns)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_gemm_repeats_for_any_number_of_threads(dtype):
    """Many rows and few; of few, threads are at different blocks of k at one time."""
    numbers = {"product__gemm_16_bits": 2, "gemm__thread_multiply_adds": 1000}
    for (m, k, n), times in (((300, 700, 130), 1), ((20, 700, 1030), 100), ((5, 300, 1024), 100)):
        x, w, found = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), []
        for count in (1, *(2, 3, 5) * times):
            with threads(count), thresholds(**numbers), served("product.gemm"):
                found.append(torch.ops.nnfast.linear(x, w))
        assert all(torch.equal(found[0], other) for other in found)


def test_repeats_to_the_bit():
    """N1: the same library for the same call every time."""
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((300, 256), (130, 256), (130,)))
    first = run(F.linear, (x, w, b), torch.ones(300, 130))
    for _ in range(3):
        assert all(map(torch.equal, run(F.linear, (x, w, b), torch.ones(300, 130)), first))


@pytest.mark.usefixtures("cpu_kernels")
def test_the_switch_of_one_dnn():
    """N1: `torch.backends.mkldnn.enabled = False` is heeded."""
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    with thresholds(**EVERY_PRODUCT), torch.backends.mkldnn.flags(enabled=False), served("linear", "product.torch"):
        assert torch.equal(F.linear(x, w), TF.linear(x, w))


@pytest.mark.usefixtures("cpu_kernels")
def test_modes_tied_weights_and_checkpointing():
    """N2, G6: no_grad, inference_mode; one weight used twice; recomputation under checkpointing."""
    ours, theirs = (lib.Sequential(lib.Linear(9, 9), lib.ReLU(), lib.Linear(9, 9)) for lib in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model[2].weight = model[0].weight
    x = torch.randn(5, 9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), served("linear"):
            output = ours(x)
            torch.testing.assert_close(output, theirs(x))
            assert not output.requires_grad and output.is_inference() == (mode is torch.inference_mode)
    for reentrant in (None, True, False):
        grads = []
        for model in (ours, theirs):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            output = model(leaf) if reentrant is None else checkpoint(model, leaf, use_reentrant=reentrant)
            output.square().sum().backward()
            grads.append([leaf.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    for requires_grad in (True, False):
        shapes = [((5,), 3), ((4, 7), 9), ((2, 3, 4), 5), ((0, 4), 5)]
        for x, w, b in sample_inputs(torch.float32, requires_grad, shapes):
            torch.library.opcheck(torch.ops.nnfast.linear.default, (x, w, b))
    g, x, w = torch.randn(6, 5), torch.randn(6, 4), torch.randn(5, 4)
    by_columns = torch.randn(4, 5).t()
    for mask in itertools.product((True, False), repeat=3):
        for args in ((g, x, w), (g, x, by_columns), (g.t().contiguous().t(), x, w)):
            torch.library.opcheck(torch.ops.nnfast.linear_backward.default, (*args, mask))
    torch.library.opcheck(torch.ops.nnfast.linear_backward.default, (g, None, None, (False, False, True)))
    half = [t.bfloat16() for t in (g, x, w)]
    for weight in (half[2], by_columns.bfloat16()):
        for asked in ({"dtype": torch.float32}, {"input_dtype": torch.float32}):
            torch.library.opcheck(torch.ops.nnfast.linear_backward.default, (*half[:2], weight, (True,) * 3), asked)


def test_module():
    """N1: Linear's signature, RNG order, keys and repr."""
    for kwargs in ({}, {"bias": False}, {"dtype": torch.float64}):
        torch.manual_seed(3)
        ours = nn.Linear(6, 4, **kwargs)
        torch.manual_seed(3)
        theirs = torch.nn.Linear(6, 4, **kwargs)
        assert isinstance(ours, torch.nn.Linear) and repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(5, 6, dtype=kwargs.get("dtype", torch.float32))
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.usefixtures("cpu_kernels")
def test_a_bias_alone_keeps_nothing():
    """N2: its gradient reads nothing that was saved, so that a second backward is as good as the first."""
    x, w, b = torch.randn(5, 8), torch.randn(6, 8), torch.zeros(6, requires_grad=True)
    with served("linear", "linear_backward"):
        loss = F.linear(x, w, b).sum()
        for _ in range(2):
            loss.backward()
    assert torch.equal(b.grad, torch.full((6,), 10.0))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("function", ["linear", "gelu", "linear_gelu", "layer_norm"])
def test_tangents_of_the_gradient(function):
    """N1, L8: forward-mode AD through a backward, of a gradient that has a tangent."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    calls = {
        "linear": lambda F: F.linear(x, w),
        "gelu": lambda F: F.gelu(x),
        "linear_gelu": lambda F: F.linear_gelu(x, w) if hasattr(F, "linear_gelu") else F.gelu(F.linear(x, w)),
        "layer_norm": lambda F: F.layer_norm(x, (8,)),
    }
    tangents = []
    for library in (F, TF):
        y = calls[function](library)
        with torch.autograd.forward_ad.dual_level():
            grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.linspace(0, 1, 32).view(4, 8))
            (found,) = torch.autograd.grad(y, x, grad)
            tangents.append(torch.autograd.forward_ad.unpack_dual(found).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_gradients_of_leaves_come_in_torchs_order(shape):
    """N2: as hooks of leaves see it, and whoever steps an optimizer in them."""
    orders = []
    for library in (nn, torch.nn):
        model = library.Sequential(library.Linear(8, 8), library.LayerNorm(8), library.Linear(8, 8))
        order = []
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name, order=order: order.append(name))
        model(torch.randn(shape)).sum().backward()
        orders.append(order)
    assert orders[0] == orders[1] and len(orders[0]) == 6


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("function", ["linear", "linear_gelu"])
def test_data_that_is_replaced_before_the_backward(function, autocast, shape):
    """The gradients are those of the data that the forward read, as torch's are. It saves views: of the weight,
    and of an input that is no matrix."""
    for replaced in ("weight", "input"):
        if replaced == "input" and len(shape) == 2:
            continue  # torch saves a matrix itself
        results = []
        for ours in (True, False):
            torch.manual_seed(0)
            dtype = autocast or torch.float32
            input, weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, (5, 6), (5,)))
            with served(function, when=ours), torch.autocast("cpu", enabled=bool(autocast)):
                if function == "linear":
                    output = (F if ours else TF).linear(input, weight, bias)
                else:
                    output = F.linear_gelu(input, weight, bias) if ours else TF.gelu(TF.linear(input, weight, bias))
            changed = {"weight": weight, "input": input}[replaced]
            changed.data = torch.zeros_like(changed)
            results.append(torch.autograd.grad(output.sum(), (input, weight, bias)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_a_module_that_is_converted_before_the_backward():
    results = []
    for lib in (nn, torch.nn):
        torch.manual_seed(0)
        layer, x = lib.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
        output = layer(x)
        layer.double()
        output.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)
