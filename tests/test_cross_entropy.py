"""Cross-entropy: values, gradients, layouts, dtypes, memory. C1 and C2 are rows of the contract (tests/README.md)."""

import contextlib
import functools
import gc
import itertools

import pytest
import torch
import torch.nn.functional as TF
from common import (
    DTYPES,
    HALF,
    assert_close,
    assert_same_error,
    double,
    layouts,
    left_to_torch,
    rms,
    served,
    threads,
    thresholds,
)

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F
from nnfast import backend, reference
from nnfast.benchmarks.harness import peak_memory

# Shapes of the input: a single class, fewer classes than a register and than a block of four, one over and one under,
# more than two chunks of a row, one row; and few classes in more rows than go together.
SHAPES = [(5,), (1, 1), (3, 1), (4, 7), (3, 15), (3, 16), (6, 17), (2, 63), (2, 65), (33, 129), (5, 2048), (3, 5000)]
SHAPES += [(33, 2), (70, 10), (65, 32), (97, 33)]
REDUCTIONS = ["none", "mean", "sum"]


def sample_inputs(dtype, requires_grad=True, shapes=SHAPES):
    """(input, target, keywords) over shapes, reductions, weights, ignored rows and smoothing."""
    for shape, reduction, weighted, smoothing in itertools.product(shapes, REDUCTIONS, (False, True), (0.0, 0.3)):
        x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_(requires_grad)
        classes = shape[-1] if len(shape) == 1 else shape[1]
        target = torch.randint(classes, shape[:1] * (len(shape) > 1) + shape[2:])
        keywords = {"reduction": reduction, "label_smoothing": smoothing}
        if target.dim() and len(target) > 2:
            keywords["ignore_index"] = int(target[1].flatten()[0]) if weighted else -7
            target[2] = keywords["ignore_index"]
        if weighted:
            keywords["weight"] = (torch.rand(classes, dtype=torch.float64) + 0.1).to(dtype)
        yield x, target, keywords


def run(function, x, target, keywords, grad_out=None):
    """Output and gradient of one call."""
    output = function(x, target, **keywords)
    grad_out = torch.ones_like(output) if grad_out is None else grad_out.to(output.dtype)
    return output, *torch.autograd.grad(output, x, grad_out)


def compare(x, target, keywords, grad_out=None, what=""):
    exact = {k: double(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    with served("cross_entropy", "cross_entropy_backward"):
        ours = run(F.cross_entropy, x, target, keywords, grad_out)
    torchs = run(TF.cross_entropy, x, target, keywords, grad_out)
    true = run(reference.cross_entropy, double(x), target, exact, grad_out)
    # The terms cancel in the loss, and in the gradient where there is one class: the softmax is 1.
    scales = x.detach().double().abs().max().item(), 1.0 * (x.shape[-1] == 1)
    for name, a, b, t, scale in zip(("loss", "gradient"), ours, torchs, true, scales, strict=True):
        assert_close(a, b, t, f"{what} {tuple(x.shape)} {keywords}: {name}", scale)


def random_grad(target, keywords):
    return torch.randn(target.shape) if keywords["reduction"] == "none" else torch.randn(())


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    """C1: against float64, over shapes, reductions, weights, ignored rows and smoothing."""
    for x, target, keywords in sample_inputs(dtype):
        compare(x, target, keywords, random_grad(target, keywords))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    """C1: logits and target with any strides and offsets; classes last in memory beside more dimensions."""
    x, target = torch.randn(6, 37).to(dtype), torch.randint(37, (6,))
    for (name, logits), y in itertools.product(layouts(x).items(), (target, target.repeat_interleave(2)[::2])):
        for keywords in ({"reduction": "none"}, {"weight": torch.rand(74).to(dtype)[::2]}):
            compare(logits.detach().requires_grad_(), y, {"reduction": "mean", **keywords}, what=name)
    for shape in ((3, 4, 9), (2, 3, 4, 5)):
        logits = torch.randn(shape).to(dtype).movedim(-1, 1).requires_grad_()
        target = torch.randint(shape[-1], shape[:-1])
        target[0, 1] = -100
        for reduction in REDUCTIONS:
            compare(logits, target, {"reduction": reduction}, what="classes last")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_past_the_caches(dtype):
    """C1: a gradient that is written past the caches, from wherever a line begins."""
    for classes, offset in itertools.product((33, 70, 2111), (0, 1, 5)):
        x = torch.randn(3 * classes + offset).to(dtype)[offset:].view(3, classes).requires_grad_()
        with thresholds(stream_bytes=0, cross_entropy__streamed_row_bytes=0), served("streamed"):
            compare(x, torch.randint(classes, (3,)), {"label_smoothing": 0.1})


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("classes", [5000, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype, classes):
    """C1: -inf, infinity, NaN and large values give what torch's give, in ignored rows too."""
    inf, nan = float("inf"), float("nan")
    rows, last = torch.randn(9, classes, dtype=dtype), classes - 1
    rows[0, 7], rows[1, :last], rows[2], rows[3, 4], rows[4, last - 9], rows[5] = -inf, -inf, -inf, inf, nan, 1e30
    rows[6, : classes // 2], rows[7, 0], rows[8] = -inf, 1e4, rows[8] * 1e4
    for smoothing, reduction, first in itertools.product((0.0, 0.1), REDUCTIONS, range(9)):
        for target in (torch.full((9,), last), torch.full((9,), -100), torch.arange(9)):
            x = rows[first:].clone().requires_grad_()
            keywords = {"label_smoothing": smoothing, "reduction": reduction}
            ours, torchs = (run(f, x, target[first:], keywords) for f in (F.cross_entropy, TF.cross_entropy))
            # torch adds a smoothed target up, class by class.
            unit = torch.finfo(dtype).eps
            tolerance = {"rtol": 16 * unit, "atol": max(classes, 100) * unit * max(smoothing, 0.02)}
            torch.testing.assert_close(ours, torchs, **tolerance, equal_nan=True)


@pytest.mark.usefixtures("cpu_kernels")
def test_all_ignored():
    """C1: torch's NaN for a mean over nothing, with a gradient of zeros."""
    x, target = torch.randn(4, 9, requires_grad=True), torch.full((4,), -100)
    for reduction, weight, smoothing in itertools.product(REDUCTIONS, (None, torch.rand(9)), (0.0, 0.2)):
        keywords = {"reduction": reduction, "weight": weight, "label_smoothing": smoothing}
        ours, torchs = (run(f, x, target, keywords) for f in (F.cross_entropy, TF.cross_entropy))
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_weight_of_a_class_that_no_row_has(dtype):
    """C1: without smoothing no other class's weight counts, not even times zero."""
    x, target = torch.randn(6, 9).to(dtype).requires_grad_(), torch.tensor([0, 2, 3, 4, 8, 0])
    weight = torch.rand(9).to(dtype)
    weight[1] = torch.inf
    for reduction in REDUCTIONS:
        keywords = {"reduction": reduction, "weight": weight}
        ours, torchs = (run(f, x, target, keywords) for f in (F.cross_entropy, TF.cross_entropy))
        assert all(t.isfinite().all() for t in ours)
        torch.testing.assert_close(ours, torchs)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("shift, scale", [(0, 1), (0, 8), (1000, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_accurate_than_torch(dtype, shift, scale):
    """C1: loss and gradient over many values, with large logits too."""
    x = (shift + scale * torch.randn(256, 5003)).to(dtype).requires_grad_()
    target = torch.randint(5003, (256,))
    results = (
        run(F.cross_entropy, x, target, {"reduction": "none"}),
        run(TF.cross_entropy, x, target, {"reduction": "none"}),
        run(reference.cross_entropy, double(x), target, {"reduction": "none"}),
    )
    for name, a, b, true in zip(("loss", "gradient"), *results, strict=True):
        # Both are samples of a rounding error: a twentieth more is not worse.
        assert rms(a.double() - true) <= 1.05 * rms(b.double() - true), name


@pytest.mark.usefixtures("cpu_kernels")
def test_the_result_repeats():
    """C1: to the bit, for any number of threads."""
    x, target = torch.randn(300, 1000, requires_grad=True), torch.randint(1000, (300,))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results += [run(F.cross_entropy, x, target, {"weight": torch.ones(1000) / 3}) for _ in range(2)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("cpu_kernels")
def test_gradcheck():
    for x, target, keywords in sample_inputs(torch.float64, shapes=[(3, 7), (4,), (2, 1)]):
        assert torch.autograd.gradcheck(lambda a, t=target, k=keywords: F.cross_entropy(a, t, **k), x)
        assert torch.autograd.gradgradcheck(lambda a, t=target, k=keywords: F.cross_entropy(a, t, **k), x)
    x = torch.randn(2, 4, 5, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: F.cross_entropy(a, torch.randint(5, (2, 4)) * 0 + 2), x)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    """C1: float32, as torch lists cross_entropy_loss on a CPU; the gradient has the logits' dtype."""
    for (x, target, keywords), own in itertools.product(sample_inputs(dtype, shapes=[(4, 7), (3, 129)]), (True, False)):
        if not own and "weight" in keywords:
            keywords["weight"] = keywords["weight"].float()
        with torch.autocast("cpu", dtype=dtype), served("cross_entropy", "cross_entropy_backward"):
            ours = run(F.cross_entropy, x, target, keywords)
        with torch.autocast("cpu", dtype=dtype):
            torchs = run(TF.cross_entropy, x, target, keywords)
        exact = {k: double(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        true = run(reference.cross_entropy, double(x), target, exact)
        for a, b, t in zip(ours, torchs, true, strict=True):
            assert_close(a, b, t, f"{keywords}")
    with torch.autocast("cpu", dtype=dtype):
        assert F.cross_entropy(x.double(), target, reduction="sum").dtype == torch.float64


@pytest.mark.usefixtures("cpu_kernels")
def test_logits_that_nobody_reads_become_their_gradient():
    """C2: no memory is taken for it."""
    target = torch.randint(50, (20,))
    x = torch.randn(20, 50, requires_grad=True)
    (expected,) = torch.autograd.grad(TF.cross_entropy(x * 2, target), x)
    for logits in (lambda: x * 2, lambda: (x * 2).view(4, 5, 50).view(-1, 50)):
        loss = F.cross_entropy(logits(), target)
        with served("cross_entropy_backward_"):
            (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(grad, expected)


@pytest.mark.usefixtures("cpu_kernels")
def test_logits_that_somebody_reads_are_left_alone():
    """C2: a variable, a view, the base of a view, what another node saved, a numpy array, a second backward."""
    target = torch.randint(50, (20,))
    x = torch.randn(20, 50, requires_grad=True)
    outside = torch.randn(20, 50)
    holders = {
        "variable": lambda y: y,
        "detached": lambda y: y.detach(),
        "view": lambda y: y[3:, 7],
        "numpy": lambda y: y.detach().numpy(),
        "saved": lambda y: y.exp().sum(),
        "square": lambda y: y.square().sum(),
        "storage": lambda y: y.untyped_storage(),
    }
    for name, hold in holders.items():
        logits = x * 2
        before = logits.detach().clone()
        loss = F.cross_entropy(logits, target)
        held = hold(logits)
        still = hold(before)
        del logits
        if isinstance(held, torch.Tensor) and held.dim() == 0:
            (both,) = torch.autograd.grad(loss + held, x)
            a = x.detach().requires_grad_()
            (expected,) = torch.autograd.grad(TF.cross_entropy(a * 2, target) + hold(a * 2), a)
            torch.testing.assert_close(both, expected, msg=name)
        else:
            loss.backward()
            if name == "storage":
                held, still = (torch.tensor([], dtype=torch.float32).set_(s) for s in (held, still))
            assert (held == still).all(), name
    base = (x * 2).view(4, 5, 50)
    before = base.detach().clone()
    F.cross_entropy(base.view(-1, 50), target).backward()
    assert torch.equal(base, before)

    array = outside.clone().numpy()
    logits = torch.from_numpy(array)
    logits.mul_(x)
    before = array.copy()
    loss = F.cross_entropy(logits, target)
    del logits
    gc.collect()
    loss.backward()
    assert (array == before).all()

    loss = F.cross_entropy(x * 2, target)
    first, second = (torch.autograd.grad(loss, x, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.usefixtures("cpu_kernels")
def test_saved_logits_are_guarded():
    """C2: an edit of the logits in place makes the backward raise (torch's does not: docs/same.md); checkpointing
    recomputes them."""
    x, target = torch.randn(20, 50, requires_grad=True), torch.randint(50, (20,))
    logits = x * 2
    loss = F.cross_entropy(logits, target)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    expected = run(TF.cross_entropy, x, target, {})[1]
    for reentrant in (True, False):
        a = x.detach().requires_grad_()
        torch.utils.checkpoint.checkpoint(F.cross_entropy, a * 1, target, use_reentrant=reentrant).backward()
        torch.testing.assert_close(a.grad, expected)
    with torch.autograd.graph.save_on_cpu():
        loss = F.cross_entropy(x * 1, target)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.usefixtures("cpu_kernels")
def test_batched_gradients():
    """C1: one backward for many gradients at once, which writes over no logits."""
    target = torch.tensor([1, 2])

    def jacobian(function):
        return torch.autograd.functional.jacobian(
            lambda x: function(x * 2, target, reduction="none"), torch.ones(2, 4), vectorize=True
        )

    with served("cross_entropy"):
        ours = jacobian(F.cross_entropy)
    torch.testing.assert_close(ours, jacobian(TF.cross_entropy))


@pytest.mark.usefixtures("cpu_kernels")
def test_no_rows():
    """C1: no rows: the mean is NaN, the gradients are zeros."""
    target = torch.empty(0, dtype=torch.int64)
    for reduction in REDUCTIONS:
        x = torch.empty(0, 80, requires_grad=True)
        with served("cross_entropy", "cross_entropy_backward"):
            ours = run(F.cross_entropy, x, target, {"reduction": reduction})
        for a, b in zip(ours, run(TF.cross_entropy, x, target, {"reduction": reduction}), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((0, 8), (20, 8), (20,)))
    with served("linear_cross_entropy"):
        loss = F.linear_cross_entropy(x, w, target, linear_bias=b, reduction="sum")
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (x, w, b)))


@pytest.mark.usefixtures("cpu_kernels")
def test_nothing_is_packed_in_the_backward():
    """C2: hooks of saved tensors see the forward's alone, also where somebody else holds the logits."""
    x, packed = torch.randn(16, 32, requires_grad=True), []
    logits = x * 1
    loss = F.cross_entropy(logits, torch.randint(32, (16,)))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)
    with hooks, served("cross_entropy_backward"):
        loss.backward()
    assert not packed and logits.isfinite().all()


@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_errors_are_torchs():
    """C1: type and text; nothing is read out of range."""
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for args, keywords in (
        ((x, torch.tensor([0, 4, 1])), {}),
        ((x, torch.tensor([0, -1, 1])), {}),
        ((x, torch.tensor([0, -100, 2**40])), {"reduction": "none"}),
        ((x, torch.tensor([0, 4, 1])), {"label_smoothing": 0.1}),
        ((x, target[:2]), {}),
        ((x, target.int()), {}),
        ((x, target.float()), {}),
        ((x.long(), target), {}),
        ((x, target, torch.rand(5)), {}),
        ((x, target, torch.rand(4).double()), {}),
        ((x, target, torch.rand(4, requires_grad=True)), {}),
        ((x, target), {"reduction": "most"}),
        ((x, target), {"label_smoothing": 1.5}),
        ((x, target), {"ignore_index": 0.5}),
        ((x.requires_grad_(), None), {}),
    ):
        assert_same_error(F.cross_entropy, TF.cross_entropy, *args, **keywords)


@pytest.mark.torch_serves("calls that ours does not cover")
def test_what_is_torchs():
    """C1: probabilities, planes, the deprecated arguments, negative smoothing."""
    x, target = torch.randn(3, 4, 5), torch.randint(4, (3, 5))
    for args, keywords in (
        ((x, target), {}),
        ((x, x.softmax(1)), {}),
        ((x[:, :, 0], target[:, 0]), {"size_average": False}),
        ((x[:, :, 0], target[:, 0]), {"reduce": False}),
        ((x[:, :, 0], target[:, 0]), {"label_smoothing": -0.5}),
        ((x[0, :, 0], target[0, :1]), {}),
        ((x[:, :, 0], target[:, 0].byte()), {}),
    ):
        torch.testing.assert_close(
            F.cross_entropy(*args, **keywords), TF.cross_entropy(*args, **keywords), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.usefixtures("some_kernels")
def test_rows_of_a_register_are_torchs():
    """In float32 alone, and where ours has AVX-512: torch is faster there."""
    for classes, dtype in ((16, torch.float32), (17, torch.float32), (16, torch.bfloat16)):
        torchs = (classes, dtype) == (16, torch.float32) and backend.native.cpu_kernels().startswith("avx512")
        with (left_to_torch if torchs else served)("cross_entropy"):
            F.cross_entropy(torch.randn(30, classes).to(dtype), torch.randint(classes, (30,)))


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    """Schema, autograd registration, fake tensors and AOT dispatch, with static and dynamic shapes."""
    ops = torch.ops.nnfast
    for x, target, keywords in sample_inputs(torch.float32, shapes=[(4, 7), (5,)]):
        reduction = REDUCTIONS.index(keywords["reduction"])
        args = (x, target, keywords.get("weight"), reduction, keywords.get("ignore_index", -100))
        args += (keywords["label_smoothing"],)
        torch.library.opcheck(ops.cross_entropy.default, args)
        loss, stats = ops.cross_entropy(*args)
        backward = (torch.ones_like(loss).detach(), x.detach(), stats, *args[1:])
        torch.library.opcheck(ops.cross_entropy_backward.default, backward)
        torch.library.opcheck(ops.cross_entropy_backward_.default, backward)
    x = torch.randn(2, 3, 5).bfloat16().movedim(-1, 1)
    torch.library.opcheck(ops.cross_entropy.default, (x, torch.ones(2, 3).long()), {"dtype": torch.float32})
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        ops.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 4]))
    with pytest.raises(NotImplementedError):
        ops.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 3]), label_smoothing=-1.0)


def test_module():
    """C1: constructor, attributes, repr, state_dict; what accelerate makes of torch's, and undoes."""
    for keywords in ({}, {"weight": torch.rand(6), "ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1}):
        ours, theirs = nn.CrossEntropyLoss(**keywords), torch.nn.CrossEntropyLoss(**keywords)
        assert isinstance(ours, torch.nn.CrossEntropyLoss) and repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        x, target = torch.randn(4, 6), torch.randint(6, (4,))
        torch.testing.assert_close(ours(x, target), theirs(x, target))
        assert type(nnfast.accelerate(theirs)) is nn.CrossEntropyLoss
        torch.testing.assert_close(torch.jit.script(ours)(x, target), ours(x, target))
        assert type(nnfast.restore(theirs)) is torch.nn.CrossEntropyLoss


# ---- linear_cross_entropy ----


def linear_inputs(dtype, requires_grad=True, shapes=((1, 3, 1), (9, 5, 7), (40, 24, 70), (33, 16, 129))):
    """(input, linear_weight, target, keywords) over shapes (rows, features, classes) and options."""
    for (n, h, c), reduction, biased, smoothing in itertools.product(shapes, REDUCTIONS, (False, True), (0.0, 0.2)):

        def make(*size):
            return torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

        keywords = {"reduction": reduction, "label_smoothing": smoothing}
        if biased:
            keywords |= {"linear_bias": make(c), "weight": torch.rand(c, dtype=torch.float64).to(dtype) + 0.1}
        if n > 1:
            keywords["ignore_index"] = 0
        yield make(n, h), make(c, h), torch.randint(c, (n,)), keywords


def two_calls(function, input, linear_weight, target, linear_bias=None, **keywords):
    return function(TF.linear(input, linear_weight, linear_bias), target, **keywords)


def linear_run(function, input, linear_weight, target, keywords, grad_out=None):
    output = function(input, linear_weight, target, **keywords)
    leaves = [t for t in (input, linear_weight, keywords.get("linear_bias")) if t is not None and t.requires_grad]
    grad_out = torch.ones_like(output) if grad_out is None else grad_out.to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, grad_out)]


def linear_compare(input, linear_weight, target, keywords, grad_out=None):
    exact = {k: double(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    with served("linear_cross_entropy"):
        ours = linear_run(F.linear_cross_entropy, input, linear_weight, target, keywords, grad_out)
    theirs = functools.partial(two_calls, TF.cross_entropy)
    torchs = linear_run(theirs, input, linear_weight, target, keywords, grad_out)
    formula = functools.partial(two_calls, reference.cross_entropy)
    true = linear_run(formula, double(input), double(linear_weight), target, exact, grad_out)
    # The size of terms that cancel: the logits' in the loss; with one class, the softmax's and target's in gradients.
    scale = 4 * input.shape[1] ** 0.5
    for i, (a, b, t) in enumerate(zip(ours, torchs, true, strict=True)):
        one_class = (1.0 + scale) * (len(linear_weight) == 1)
        assert_close(a, b, t, f"{tuple(input.shape)} {keywords}: {i}", one_class if i else scale)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype):
    """C2: equals the two calls to rounding, in one block and in many, for any gradient of the loss."""
    for input, weight, target, keywords in linear_inputs(dtype):
        grad_out = random_grad(target, keywords)
        linear_compare(input, weight, target, keywords, grad_out)
        block, part = 8 * len(weight) * input.element_size(), 16 * input.shape[1] * input.element_size()
        with thresholds(linear_cross_entropy__block_bytes=block, linear_cross_entropy__part_bytes=part):
            paths = ["linear_cross_entropy.blocks"] if len(input) > 8 else []
            with served(*paths):
                linear_compare(input, weight, target, keywords, grad_out)
                linear_compare(input, weight, target, keywords)


@pytest.mark.usefixtures("cpu_kernels")
def test_linear_cross_entropy_layouts_and_wanted_gradients():
    """C2: any strides of every argument; None where torch has None."""
    for mask in itertools.product((True, False), repeat=3):
        if not any(mask):
            continue
        input, weight = torch.randn(7, 20).t()[:20:2], torch.randn(7, 11).t()
        bias, target = torch.randn(22)[::2], torch.randint(11, (10, 2))[:, 0]
        for t, wanted in zip((input, weight, bias), mask, strict=True):
            t.requires_grad_(wanted)
        for reduction in REDUCTIONS:
            keywords = {"linear_bias": bias, "reduction": reduction, "weight": torch.rand(22)[::2]}
            with thresholds(linear_cross_entropy__block_bytes=160):
                linear_compare(input, weight, target, keywords)


@pytest.mark.usefixtures("cpu_kernels")
def test_linear_cross_entropy_again_and_twice():
    """C2: a second backward, gradients that are added to in place, the second derivative, checkpointing."""
    for input, weight, target, keywords in linear_inputs(torch.float64, shapes=[(3, 2, 4)]):
        leaves = [t for t in (input, weight, keywords.pop("linear_bias", None)) if t is not None]

        def call(x, w, b=None, target=target, keywords=keywords):
            return F.linear_cross_entropy(x, w, target, linear_bias=b, **keywords)

        assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
        loss = call(*leaves).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        for g, k in zip(torch.autograd.grad(loss, leaves, torch.tensor(3.0).double()), kept, strict=True):
            torch.testing.assert_close(g, 3 * k)
        a = [t.detach().requires_grad_() for t in leaves]
        torch.utils.checkpoint.checkpoint(lambda *t, call=call: call(*t).sum(), *a, use_reentrant=False).backward()
        torch.testing.assert_close([t.grad for t in a], kept)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("factor", [1, 2])
def test_linear_cross_entropy_leaves_what_a_hook_packed(factor):
    """C2: gradients that a hook of saved tensors has kept are not handed out as well."""
    kept = []
    x, w = (torch.randn(n, 32, requires_grad=True) for n in (16, 40))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, served("linear_cross_entropy"):
        loss = F.linear_cross_entropy(x, w, torch.randint(40, (16,)))
    before = [t.detach().clone() for t in kept]
    expected = torch.autograd.grad(factor * loss, (x, w), retain_graph=True)
    (factor * loss).backward()
    for leaf, grad in zip((x, w), expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
        leaf.grad.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_linear_cross_entropy_under_autocast(dtype):
    """C2: the products in the lower precision, the loss in float32."""
    for input, weight, target, keywords in linear_inputs(torch.float32, shapes=[(40, 24, 70)]):
        with torch.autocast("cpu", dtype=dtype), served("linear_cross_entropy"):
            ours = linear_run(F.linear_cross_entropy, input, weight, target, keywords)
        with torch.autocast("cpu", dtype=dtype):
            torchs = linear_run(functools.partial(two_calls, TF.cross_entropy), input, weight, target, keywords)
        exact = {k: double(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        formula = functools.partial(two_calls, reference.cross_entropy)
        true = linear_run(formula, double(input), double(weight), target, exact)
        for i, (a, b, t) in enumerate(zip(ours, torchs, true, strict=True)):
            assert_close(a, b, t, f"{keywords}: {i}")


@pytest.mark.usefixtures("cpu_kernels")
def test_linear_cross_entropy_never_holds_all_logits():
    """C2: a block of them, and the gradients."""
    x, w = torch.randn(512, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    target, logits = torch.randint(4096, (512,)), 512 * 4096 * 4
    torch.use_deterministic_algorithms(False)

    def call():
        torch.autograd.grad(F.linear_cross_entropy(x, w, target), (x, w))

    with thresholds(linear_cross_entropy__block_bytes=logits // 8, linear_cross_entropy__part_bytes=1 << 15):
        assert peak_memory(call, "cpu") < logits // 8 + 4 * (x.nbytes + w.nbytes)


@pytest.mark.torch_serves("bad input, and calls that ours does not cover")
def test_linear_cross_entropy_errors_and_what_is_torchs():
    """C1, C2: torch's errors; 1-D inputs, probabilities and losses of more dimensions are torch's."""
    if not hasattr(TF, "linear_cross_entropy"):
        pytest.skip("torch 2.12 has it")
    x, w, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    for args, keywords in (
        ((x, w, torch.tensor([0, 5, 1])), {}),
        ((x, w, target[:2]), {}),
        ((x, w[:, :3], target), {}),
        ((x, w.double(), target), {}),
        ((x, w, target), {"linear_bias": torch.randn(4)}),
        ((x, w, target), {"reduction": "most"}),
        ((x, w, target, torch.rand(5)), {}),
    ):
        with pytest.raises(Exception) as ours:
            F.linear_cross_entropy(*args, **keywords)
        with pytest.raises(Exception) as theirs:
            TF.linear_cross_entropy(*args, **keywords)
        said = [str(e.value).replace("nnfast.functional.", "") for e in (ours, theirs)]
        assert type(ours.value) is type(theirs.value) and said[0] == said[1], keywords
    deep = torch.randn(5, 2, 4), torch.randint(5, (3, 2))
    for args in ((x[0], w, target[0]), (x, w, torch.rand(3, 5)), (x, *deep)):
        ours, theirs = F.linear_cross_entropy(*args), TF.linear_cross_entropy(*args)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.usefixtures("cpu_kernels")
def test_linear_opcheck():
    ops = torch.ops.nnfast
    for x, w, target, k in linear_inputs(torch.float32, shapes=[(4, 3, 7)]):
        args = (x, w, target, k.get("linear_bias"), k.get("weight"), REDUCTIONS.index(k["reduction"]), 0)
        torch.library.opcheck(ops.linear_cross_entropy.default, (*args, k["label_smoothing"]))
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        grad = torch.ones(4 if k["reduction"] == "none" else ())
        torch.library.opcheck(ops.linear_cross_entropy_backward.default, (grad, *args, 0.0, (True, True, True)))


def test_linear_module():
    """C1: keys, names and values as torch's, and as the two modules'."""
    for keywords in ({}, {"bias": True, "reduction": "sum", "ignore_index": 1}, {"out_features": (2,), "bias": True}):
        torch.manual_seed(1)
        ours = nn.LinearCrossEntropyLoss(4, 6, **keywords)
        torch.manual_seed(1)
        linear = torch.nn.Linear(4, 6 * (2 if "out_features" in keywords else 1), bias=keywords.get("bias", False))
        assert list(ours.state_dict()) == [f"linear.{name}" for name in linear.state_dict()]
        x, target = torch.randn(5, 4), torch.randint(6, (5, 2) if "out_features" in keywords else (5,))
        logits = linear(x).unflatten(-1, (6, -1)) if "out_features" in keywords else linear(x)
        ignored = keywords.get("ignore_index", -100)
        expected = TF.cross_entropy(logits, target, reduction=keywords.get("reduction", "mean"), ignore_index=ignored)
        torch.testing.assert_close(ours(x, target), expected)
        if hasattr(torch.nn, "LinearCrossEntropyLoss"):
            theirs = torch.nn.LinearCrossEntropyLoss(4, 6, **keywords)
            assert repr(ours) == repr(theirs) and isinstance(ours, torch.nn.LinearCrossEntropyLoss)
            ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 40, 5000])
def test_logits_changed_behind_autograds_back(dtype, classes):
    """torch saves a copy, and gives the gradient of the logits as they were. We keep none, and say so; but not of an
    ignored row, whose gradient is zero, nor of a copy of less precision that a hook of saved tensors makes."""
    target = torch.randint(classes, (64,))
    target[5] = -100

    def backward(change, hooks=None):
        x = torch.randn(64, classes, dtype=dtype, requires_grad=True)
        with hooks or contextlib.nullcontext():
            loss = F.cross_entropy(logits := x * 2, target)
        change(logits)
        loss.backward()
        return x.grad

    for change in (lambda y: y.data.exp_(), lambda y: y.data[7].sub_(1), lambda y: y.data[63, 1].fill_(9)):
        with served("cross_entropy"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(change)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(lambda y: y.data[7, 1].fill_(float("nan")))
    # The memory of these logits became that of the gradient: a second try must not take that for logits.
    x = torch.zeros(64, classes, dtype=dtype, requires_grad=True)
    loss = F.cross_entropy(logits := x * 2, target)
    logits.data[7].sub_(1)
    del logits
    for _ in range(2):
        with served("cross_entropy_backward_"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert (backward(lambda y: y.data[5].add_(3))[5] == 0).all()
    rough = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.to(torch.float8_e5m2) if t.is_floating_point() and t.shape == (64, classes) else t,
        lambda t: t.to(dtype) if t.dtype is torch.float8_e5m2 else t,
    )
    assert backward(lambda y: None, rough).isfinite().all()


@pytest.mark.usefixtures("cpu_kernels")
def test_a_hook_that_rounds_is_no_change():
    """C2: the memory that it unpacks into may well be that of the logits, which nobody held."""
    x, y, w = torch.randn(32, 64), torch.randint(1000, (32,)), torch.randn(1000, 64, requires_grad=True)

    def pack(t):
        return t.bfloat16() if t.shape == (32, 1000) else t

    def unpack(t):
        return t.float() if t.dtype is torch.bfloat16 else t

    for _ in range(20):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), served("cross_entropy"):
            loss = F.cross_entropy(x @ w.t(), y)
        loss.backward()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_past_the_dtypes_range_is_infinity(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    x[:, 0] = torch.finfo(dtype).min
    with served("cross_entropy"):
        assert F.cross_entropy(x, torch.zeros(2, dtype=torch.long), reduction="sum") == torch.inf


@pytest.mark.usefixtures("cpu_kernels")
def test_the_scale_of_a_loss_is_not_rounded():
    """C2: under autocast grad_out is of float beside gradients in 16 bits. Rounded to them, a third would be 0.2% off
    in every element."""
    x, w, y = torch.randn(256, 64, requires_grad=True), torch.randn(500, 64, requires_grad=True), torch.arange(256)
    with torch.autocast("cpu", torch.bfloat16), served("linear_cross_entropy"):
        loss = F.linear_cross_entropy(x, w, y)
    for retained in (True, False):
        whole = torch.autograd.grad(loss, (x, w), retain_graph=True)
        third = torch.autograd.grad(loss / 3, (x, w), retain_graph=retained)
        for a, b in zip(whole, third, strict=True):
            assert abs(a.double().norm() / b.double().norm() - 3) < 1e-3
