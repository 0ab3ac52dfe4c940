"""LayerNorm: values, gradients, layouts, dtypes. L1 .. L11 are the rows of the contract (tests/README.md)."""

import functools
import itertools

import common
import pytest
import torch
import torch.nn.functional as TF
from common import DTYPES, HALF, assert_close, assert_same_error, available_memory, double, layouts, rms, run
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import nnfast.nn as nn
import nnfast.nn.functional as F
from nnfast import reference

# (input's shape, how many last dimensions are normalized): rows shorter and longer than a register and a block of
# four, one over and one under, ranks 1 to 5, rows of one element, a single row.
SHAPES = [
    ((5,), 1),
    ((1, 1), 1),
    ((3, 1), 1),
    ((4, 7), 1),
    ((3, 15), 1),
    ((3, 16), 1),
    ((3, 17), 1),
    ((2, 3, 63), 1),
    ((2, 3, 64), 1),
    ((2, 65), 1),
    ((33, 129), 1),
    ((5, 3, 4, 6), 2),
    ((2, 3, 4, 5, 6), 3),
    ((70, 768), 1),
    ((3, 5000), 1),
]


def sample_inputs(dtype, requires_grad=True, shapes=SHAPES, affine=((True, True), (True, False), (False, False))):
    """(input, normalized_shape, weight, bias, eps) over the shapes, with and without weight and bias."""
    for (shape, ndim), (has_weight, has_bias) in itertools.product(shapes, affine):
        normalized_shape = shape[len(shape) - ndim :]

        def make(*size, wanted=True):
            return torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) if wanted else None

        yield (
            make(*shape),
            normalized_shape,
            make(*normalized_shape, wanted=has_weight),
            make(*normalized_shape, wanted=has_bias),
            1e-5,
        )


compare = functools.partial(common.compare, F.layer_norm, TF.layer_norm, reference.layer_norm)


def to_float32(*args):
    """Ours as a GPU's autocast calls it: 16 bits come in and float32 goes out."""
    return torch.ops.nnfast.layer_norm(*args, dtype=torch.float32)[0]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    """L4, L6: against float64, over shapes and dtypes."""
    for args in sample_inputs(dtype):
        compare(args, torch.randn_like(args[0]), f"{tuple(args[0].shape)}")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_float_weight_beside_16_bit_input(dtype):
    """L7: native on a CPU."""
    for input, shape, weight, bias, eps in sample_inputs(dtype):
        affine = [None if t is None else t.detach().float().requires_grad_() for t in (weight, bias)]
        compare((input, shape, *affine, eps), torch.randn_like(input), f"{tuple(input.shape)}")


def torchs_to_float32(x, *args):
    return TF.layer_norm(x.float(), *args)


def compare_to_float32(args, grad_out, what):
    """From 16 bits to float32, beside a cast and torch's LayerNorm; the gradient of the input is rounded once."""
    input, shape, weight, bias, eps = args
    affine = [None if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in (weight, bias)]
    args = input, shape, *affine, eps
    common.compare(to_float32, torchs_to_float32, reference.layer_norm, args, grad_out.float(), what)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_to_float32(dtype):
    """L7: what autocast asks for on a GPU; its double backward, and an input that is changed afterwards."""
    for args in sample_inputs(dtype):
        compare_to_float32(args, torch.randn_like(args[0]), f"{tuple(args[0].shape)}")
    x, w = torch.randn(4, 9).to(dtype).requires_grad_(), torch.randn(9).requires_grad_()
    results = []
    for f, a, b in (
        (to_float32, x, w),
        (torchs_to_float32, x, w),
        (reference.layer_norm, double(x), double(w)),
    ):
        (first,) = torch.autograd.grad(f(a, (9,), b, None, 1e-5).square().sum(), a, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (a, b)))
    for ours, torchs, exact in zip(*results, strict=True):
        assert_close(ours, torchs, exact)
    leaf = x * 1
    output = to_float32(leaf, (9,), w, None, 1e-5)
    expected = torch.autograd.grad(output.square().sum(), (x, w), retain_graph=True)
    leaf.add_(1)  # no error: torch, too, has saved the cast that autocast made
    for a, b in zip(torch.autograd.grad(output.square().sum(), (x, w)), expected, strict=True):
        assert torch.equal(a, b)
    for refused in ((x, (9,), w.to(dtype), None), (x.float(), (9,), w, None), (x.double(), (9,), None, None)):
        out = dtype if refused[0].dtype != dtype else torch.float32
        with pytest.raises(NotImplementedError, match="does not cover"):
            torch.ops.nnfast.layer_norm(*refused, 1e-5, dtype=out)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.nnfast.layer_norm.default, (x.detach(), (9,), w, None, 1e-5), {"dtype": torch.float32})
    _, stats = torch.ops.nnfast.layer_norm(x.detach(), (9,), w, None, 1e-5, dtype=torch.float32)
    args = (torch.randn(4, 9), x.detach(), (9,), stats, w, None, (True, True, False))
    opcheck(torch.ops.nnfast.layer_norm_backward.default, args)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    """L5: input and gradient with any strides and offsets."""
    x, g = torch.randn(2, 6, 5, 37).to(dtype), torch.randn(6, 5, 37).to(dtype)
    weight, bias = torch.randn(2, 37).to(dtype).requires_grad_()
    for (name, input), (grad_name, grad_out) in itertools.product(layouts(x[0]).items(), layouts(g).items()):
        args = (input.detach().requires_grad_(), (37,), weight, bias, 1e-5)
        compare(args, grad_out, f"{name}, gradient {grad_name}")
    channels_last = torch.randn(2, 8, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    args = (channels_last.requires_grad_(), (5, 6), None, None, 1e-5)
    compare(args, torch.randn_like(channels_last), "channels last")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("mean", [0.0, 2000.0])
def test_no_less_accurate_than_torch(mean):
    """L6: over many values, with a mean far from zero too, where a one-pass variance fails."""
    x = (mean + torch.randn(512, 1000)).requires_grad_()
    weight, bias, grad_out = (
        torch.randn(1000).requires_grad_(),
        torch.randn(1000).requires_grad_(),
        torch.randn(512, 1000),
    )
    exact = run(reference.layer_norm, (double(x), (1000,), double(weight), double(bias)), grad_out.double())
    ours = run(F.layer_norm, (x, (1000,), weight, bias), grad_out)
    torchs = run(TF.layer_norm, (x, (1000,), weight, bias), grad_out)
    for name, a, b, true in zip(("output", "input", "weight", "bias"), ours, torchs, exact, strict=True):
        # Both are samples of a rounding error: a twentieth more is not worse.
        assert rms(a.double() - true) <= 1.05 * rms(b.double() - true), name


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_weight_gradients_are_summed_in_float(dtype):
    """L6: over 4096 rows a sum kept in 16 bits is lost."""
    x, g = torch.randn(4096, 24).to(dtype), torch.randn(4096, 24).to(dtype)
    weight, bias = torch.ones(24, dtype=dtype, requires_grad=True), torch.zeros(24, dtype=dtype, requires_grad=True)
    compare((x.requires_grad_(), (24,), weight, bias, 1e-5), g, "4096 rows")


@pytest.mark.usefixtures("cpu_kernels")
def test_gradcheck():
    for args in sample_inputs(torch.float64, shapes=[((3, 7), 1), ((2, 3, 4), 2), ((2, 1), 1)]):
        assert torch.autograd.gradcheck(lambda *a: F.layer_norm(*a), args)
        assert torch.autograd.gradgradcheck(lambda *a: F.layer_norm(*a), args)


@pytest.mark.usefixtures("cpu_kernels")
def test_second_derivative_in_float32():
    x, w = torch.randn(4, 9).requires_grad_(), torch.randn(9).requires_grad_()
    results = []
    for f, a, b in ((F.layer_norm, x, w), (TF.layer_norm, x, w), (reference.layer_norm, double(x), double(w))):
        (first,) = torch.autograd.grad(f(a, (9,), b, None).square().sum(), a, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (a, b)))
    for ours, torchs, exact in zip(*results, strict=True):
        assert_close(ours, torchs, exact)


@pytest.mark.usefixtures("cpu_kernels")
def test_only_the_gradients_that_are_wanted():
    """L9: every combination of frozen input, weight and bias."""
    for mask in itertools.product((True, False), repeat=3):
        args = [torch.randn(3, 10), (10,), torch.randn(10), torch.randn(10), 1e-5]
        for t, wanted in zip((args[0], args[2], args[3]), mask, strict=True):
            t.requires_grad_(wanted)
        output = F.layer_norm(*args)
        assert output.requires_grad == any(mask)
        if any(mask):
            compare(args, torch.randn(3, 10), str(mask))
            output.sum().backward()
            assert [args[0].grad is not None, args[2].grad is not None, args[3].grad is not None] == list(mask)


@pytest.mark.usefixtures("cpu_kernels")
def test_saved_input_is_guarded_and_output_is_free():
    """L9: editing the saved input raises at backward; the output may be edited."""
    x, w = torch.randn(3, 8).requires_grad_(), torch.ones(8, requires_grad=True)
    leaf = x * 1
    output = F.layer_norm(leaf, (8,), w)
    output.add_(1)
    output.sum().backward(retain_graph=True)
    leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.usefixtures("cpu_kernels")
def test_nan_and_infinity_stay_in_their_row():
    """L10."""
    x = torch.randn(5, 33)
    x[1, 3], x[3, 4] = float("nan"), float("inf")
    x[4] = 2.5
    x.requires_grad_()
    bias = torch.randn(33)
    output = F.layer_norm(x, (33,), None, bias)
    (grad,) = torch.autograd.grad(output, x, torch.randn(5, 33))
    for row, ok in enumerate((True, False, True, False, True)):
        assert output[row].isfinite().all() == ok and grad[row].isfinite().all() == ok
    assert torch.equal(output[4], bias), "a row without variance gives the bias"


@pytest.mark.usefixtures("cpu_kernels")
def test_a_row_whose_sum_overflows():
    """The mean is finite, and so is the result, where torch's is for some sizes and dtypes alone."""
    for dtype, size in itertools.product((torch.float32, torch.bfloat16, torch.float64), (7, 300, 4096)):
        x = torch.full((3, size), torch.finfo(dtype).max / 3, dtype=dtype)
        x[1] *= -1
        y = F.layer_norm(x, (size,))
        assert torch.equal(y, torch.zeros_like(y)), (dtype, size)
        x[:, ::2] *= -1  # squares overflow as well, and the reciprocal deviation is 0
        assert torch.equal(F.layer_norm(x, (size,)), torch.zeros_like(y)), (dtype, size)


@pytest.mark.usefixtures("cpu_kernels")
def test_gradients_repeat_to_the_bit():
    """L10."""
    args = (
        torch.randn(2000, 100).requires_grad_(),
        (100,),
        torch.randn(100).requires_grad_(),
        torch.randn(100).requires_grad_(),
    )
    grad_out = torch.randn(2000, 100)
    first = run(F.layer_norm, args, grad_out)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(F.layer_norm, args, grad_out), strict=True))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype):
    """L4: the output is empty and the gradients of weight and bias are zero, not None."""
    for shape in ((0, 5), (3, 0, 5)):
        args = [torch.empty(shape, dtype=dtype, requires_grad=True), (5,)]
        args += [torch.randn(5, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]
        output = F.layer_norm(*args)
        output.sum().backward()
        assert output.shape == shape and args[0].grad.shape == shape
        assert args[2].grad.eq(0).all() and args[3].grad.eq(0).all()


@pytest.mark.usefixtures("cpu_kernels")
def test_the_gradient_that_comes_in_is_left_alone():
    """L9: it is not written over."""
    x, grad_out = torch.randn(40, 64).requires_grad_(), torch.randn(40, 64)
    before = grad_out.clone()
    F.layer_norm(x, (64,)).backward(grad_out)
    assert torch.equal(grad_out, before) and grad_out._version == 0


@pytest.mark.usefixtures("cpu_kernels")
def test_more_rows_than_16_bits_count():
    """L4, L6."""
    x, w = torch.randn(70000, 3).requires_grad_(), torch.randn(3).requires_grad_()
    compare((x, (3,), w, None, 1e-5), torch.randn(70000, 3), "70000 rows")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.skipif(available_memory() < 10e9, reason="takes 4.3 GB")
def test_more_elements_than_31_bits_count():
    """L4: offsets are 64 bits wide. The input is one row, expanded."""
    torch.use_deterministic_algorithms(False)  # which would fill the output first
    row = torch.randn(1, 4096).bfloat16()
    output = F.layer_norm(row.expand(2**19 + 3, 4096), (4096,))
    assert output.numel() > 2**31 and torch.equal(output[-3:], output[:1].expand(3, 4096))
    assert torch.equal(output[:1], F.layer_norm(row, (4096,)))


def test_per_sample_gradients():
    """L8: of ExpandedWeights, which stand in for the parameters."""
    m, x = nn.LayerNorm(6), torch.randn(4, 3, 6)
    torch.nn.init.normal_(m.weight)
    call_for_per_sample_grads(m)(x).sum().backward()
    for i in range(4):
        expected = torch.autograd.grad(m(x[i]).sum(), [*m.parameters()])
        torch.testing.assert_close([p.grad_sample[i] for p in m.parameters()], [*expected])


@pytest.mark.parametrize("eps", [0.0, 1e-12, -0.5, 10.0])
def test_eps(eps):
    """L4: as torch does, a negative one too."""
    x = torch.randn(6, 50)
    torch.testing.assert_close(F.layer_norm(x, (50,), eps=eps), TF.layer_norm(x, (50,), eps=eps), equal_nan=True)


@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_errors_are_torchs():
    """L3: type and text."""
    x = torch.randn(3, 4)
    for args in (
        (x, ()),
        (x, (5,)),
        (x, (3, 4, 5)),
        (x, (4,), torch.randn(5)),
        (x, (4,), torch.randn(4), torch.randn(5)),
        (x.to(torch.complex64), (4,)),
        (x.long(), (4,)),
        (x, (4,), torch.randn(4).double()),
        (x, 4),
        (x, (4.0,)),
        (None, (4,)),
    ):
        assert_same_error(F.layer_norm, TF.layer_norm, *args)


@pytest.mark.usefixtures("cpu_kernels")
def test_backward_checks_what_it_reads():
    """An op that anyone can call: torch's kind of error, whoever asks, and statistics with any strides."""
    x, w = torch.randn(7, 12), torch.randn(12)
    output, stats = torch.ops.nnfast.layer_norm(x, (12,), w, None, 1e-5)
    g, mask = torch.randn(7, 12), (True, True, False)

    def backward(g=g, stats=stats, w=w):
        return torch.ops.nnfast.layer_norm_backward(g, x, (12,), stats, w, None, mask)

    expected = backward()
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for weight in (w, w.clone().requires_grad_()):
            with guard():
                for bad in (g[:1], g[:, :6], g.T, g.double(), g.bfloat16(), torch.empty(0)):
                    with pytest.raises(RuntimeError, match="expected grad_out of size"):
                        backward(g=bad, w=weight)
                for bad in (stats[:1], stats[:, :1], stats.T, stats.double(), torch.empty(0)):
                    with pytest.raises(RuntimeError, match="expected stats of size"):
                        backward(stats=bad, w=weight)
                for lying in (stats.T.contiguous().T, stats.repeat(1, 2)[:, :7], stats.repeat_interleave(2, 1)[:, ::2]):
                    for a, b in zip(backward(stats=lying, w=weight)[:2], expected, strict=False):
                        torch.testing.assert_close(a, b)


def test_autocast():
    """L7: on a CPU layer_norm is not listed, and runs in the input's dtype."""
    x, m = torch.randn(3, 8), nn.LayerNorm(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert m(x).dtype == torch.float32 and m(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    """Schema, autograd registration, fake tensors and AOT dispatch, with static and dynamic shapes."""
    shapes = [((3, 7), 1), ((2, 3, 4), 2), ((0, 5), 1)]
    for requires_grad in (True, False):
        for args in sample_inputs(torch.float32, requires_grad, shapes):
            torch.library.opcheck(torch.ops.nnfast.layer_norm.default, args)
    x = torch.randn(4, 6, 5).transpose(0, 1)
    w = torch.randn(5)
    _, stats = torch.ops.nnfast.layer_norm(x, (5,), w, None, 1e-5)
    for mask in ((True, True, False), (False, True, False), (True, False, False)):
        args = (torch.randn(6, 4, 5), x, (5,), stats, w, None, mask)
        torch.library.opcheck(torch.ops.nnfast.layer_norm_backward.default, args)


def test_module():
    """L1, L2: constructor, attributes, repr, state_dict both ways, reset."""
    for kwargs in ({}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-3, "dtype": torch.float64}):
        for shape in (6, (2, 6), [6]):
            ours, theirs = nn.LayerNorm(shape, **kwargs), torch.nn.LayerNorm(shape, **kwargs)
            assert isinstance(ours, torch.nn.LayerNorm) and repr(ours) == repr(theirs)
            assert ours.__constants__ == theirs.__constants__
            assert ours.normalized_shape == theirs.normalized_shape and ours.eps == theirs.eps
            assert list(ours.state_dict()) == list(theirs.state_dict())
            assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
            ours.load_state_dict(theirs.state_dict(), strict=True)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            x = torch.randn(5, 2, 6, dtype=kwargs.get("dtype", torch.float32))
            torch.testing.assert_close(ours(x), theirs(x))
    meta = nn.LayerNorm(6, device="meta")
    meta.to_empty(device="cpu").reset_parameters()
    assert meta.weight.eq(1).all() and meta.bias.eq(0).all()
