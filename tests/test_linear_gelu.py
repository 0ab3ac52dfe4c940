"""Linear+GELU, and GELU. G1 .. G7 are the rows of the contract (tests/README.md)."""

import functools
import inspect
import itertools
from collections import OrderedDict

import common
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
    thresholds,
)
from test_linear import SHAPES
from test_linear import sample_inputs as linear_inputs
from torch.utils.checkpoint import checkpoint

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F
from nnfast import reference
from nnfast.backend import native
from nnfast.benchmarks.harness import peak_memory

APPROXIMATE = ("none", "tanh")


def sample_inputs(dtype, requires_grad=True, shapes=SHAPES):
    """(input, weight, bias, approximate) over the shapes, with and without bias."""
    for args, approximate in itertools.product(linear_inputs(dtype, requires_grad, shapes), APPROXIMATE):
        yield *args, approximate


def torchs_linear_gelu(input, weight, bias=None, approximate="none"):
    return TF.gelu(TF.linear(input, weight, bias), approximate=approximate)


class TorchsLinearGELU(torch.nn.Linear):
    def forward(self, input):
        return torchs_linear_gelu(input, self.weight, self.bias)


compare = functools.partial(common.compare, F.linear_gelu, torchs_linear_gelu, reference.linear_gelu)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    """G1: against float64, over shapes and dtypes."""
    for args in sample_inputs(dtype):
        grad_out = torch.randn(*args[0].shape[:-1], len(args[1])).to(dtype)
        compare(args, grad_out, f"{tuple(args[0].shape)} -> {len(args[1])}, {args[3]}")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_values_and_gradients(dtype, approximate):
    for shape in ((), (1,), (5,), (16,), (17,), (64,), (3, 65), (2, 3, 1000), (40000,)):
        x, g = (4 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
        results = []
        for f, a, b in ((F.gelu, x, g), (TF.gelu, x, g), (reference.gelu, double(x), g.double())):
            output = f(a, approximate=approximate)
            results.append((output, *torch.autograd.grad(output, a, b)))
        for ours, torchs, exact in zip(*results, strict=True):
            assert_close(ours, torchs, exact, f"{shape}", scale=x.abs().max().item())


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu_is_no_less_accurate_than_torch(approximate):
    x = torch.linspace(-12, 12, 200001, requires_grad=True)
    exact_x = double(x)
    exact, ours, torchs = (
        reference.gelu(exact_x, approximate),
        F.gelu(x, approximate=approximate),
        TF.gelu(x, approximate=approximate),
    )
    assert rms(ours.double() - exact) <= 1.05 * rms(torchs.double() - exact)
    grads = [torch.autograd.grad(y.sum(), leaf)[0].double() for y, leaf in ((exact, exact_x), (ours, x), (torchs, x))]
    assert rms(grads[1] - grads[0]) <= 1.05 * rms(grads[2] - grads[0])
    # Near zero gelu(x) is x / 2, and far out it is x or 0, to the last bit.
    tiny = torch.tensor([1e-30, -1e-30, 1e-10])
    assert torch.equal(F.gelu(tiny, approximate=approximate), tiny / 2)
    far = torch.tensor([20.0, 1e30, -20.0, -1e30])
    assert torch.equal(F.gelu(far, approximate=approximate), torch.tensor([20.0, 1e30, 0.0, 0.0]))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("size", [1, 8, 16, 70])
def test_nan_and_infinity(approximate, size):
    """As in float64: gelu(inf) is inf, gelu(-inf) is 0 times infinity; the neighbours do not see it."""
    for value, expected in ((float("inf"), float("inf")), (float("-inf"), float("nan")), (float("nan"), float("nan"))):
        x = torch.randn(size)
        x[size // 2] = value
        output = F.gelu(x, approximate=approximate)
        torch.testing.assert_close(output[size // 2], torch.tensor(expected), equal_nan=True)
        assert output.isfinite().sum() == size - 1


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    weight, bias = torch.randn(9, 37).to(dtype).requires_grad_(), torch.randn(9).to(dtype).requires_grad_()
    inputs, grads = layouts(torch.randn(6, 5, 37).to(dtype)), layouts(torch.randn(6, 5, 9).to(dtype))
    for (name, input), (grad_name, grad_out) in itertools.product(inputs.items(), grads.items()):
        compare((input.detach().requires_grad_(), weight, bias, "none"), grad_out, f"{name}, gradient {grad_name}")
    for name, w in layouts(weight.detach()).items():
        compare(
            (inputs["contiguous"], w.detach().requires_grad_(), bias, "tanh"), grads["contiguous"], f"weight {name}"
        )
    for name, x in layouts(torch.randn(4, 3, 21).to(dtype)).items():
        ours, torchs = F.gelu(x), TF.gelu(x)
        assert_close(ours, torchs, reference.gelu(x.double()), name)
        assert ours.stride() == torchs.stride(), name


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("features", [37, 1])
def test_layouts_in_one_dnn(features):
    """Every layout of every argument, where the library that takes large products is given small ones."""
    tensors = (torch.randn(2, 3, features), torch.randn(9, features), torch.randn(1, 9), torch.randn(2, 3, 9))
    dense, *others = zip(*(layouts(t).values() for t in tensors), strict=True)
    # Each argument in each layout beside dense ones, and all of them in the same.
    cases = [dense, *others] + [(*dense[:i], o[i], *dense[i + 1 :]) for o in others for i in range(4)]
    for x, w, b, grad_out in cases:
        leaves = [t.detach().requires_grad_() for t in (x, w, b[0])]
        with thresholds(product__one_dnn_multiply_adds=0, product__one_dnn_float32=1):
            what = str([t.stride() for t in (*leaves, grad_out)])
            if native.cpu_kernels() == "avx2":  # where oneDNN serves what lies by rows alone
                compare((*leaves, "none"), grad_out, what)
                continue
            with served("product.one_dnn"):
                compare((*leaves, "none"), grad_out, what)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gradcheck(approximate):
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
    for bias in (b, None):
        f = lambda *a: F.linear_gelu(*a, approximate=approximate)  # noqa: E731
        assert torch.autograd.gradcheck(f, (x, w, bias))
        assert torch.autograd.gradgradcheck(f, (x, w, bias))
    g = lambda a: F.gelu(a, approximate=approximate)  # noqa: E731
    assert torch.autograd.gradcheck(g, (x,)) and torch.autograd.gradgradcheck(g, (x,))


@pytest.mark.usefixtures("cpu_kernels")
def test_only_the_gradients_that_are_wanted():
    """G6: every combination of frozen input, weight and bias."""
    for mask in itertools.product((True, False), repeat=3):
        if not any(mask):
            continue
        tensors = [torch.randn(3, 10), torch.randn(7, 10), torch.randn(7)]
        for t, wanted in zip(tensors, mask, strict=True):
            t.requires_grad_(wanted)
        compare((*tensors, "none"), torch.randn(3, 7), str(mask))
        F.linear_gelu(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == list(mask)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_gradient_that_somebody_holds_is_left_alone():
    """The backward writes over no gradient that comes in."""
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((6, 10), (7, 10), (7,)))
    expected = torch.autograd.grad(torchs_linear_gelu(x, w, b), (x, w, b), torch.ones(6, 7))

    def gradients(through, **kwargs):
        y = F.linear_gelu(x, w, b)
        return torch.autograd.grad(through(y), (x, w, b), **kwargs)

    mine = torch.ones(6, 7)
    seen, kept = [], []
    for _ in range(2):
        torch.testing.assert_close(gradients(lambda y: y, grad_outputs=mine), expected)
    assert mine.eq(1).all() and mine._version == 0

    def hooked(y):
        y.register_hook(seen.append)
        return (y * 1.0).sum()

    def twice(y):  # one gradient for two
        kept.append(y * 1)
        kept[0].retain_grad()
        return kept[0].sum() + 0 * y.sum()

    def viewed(y):
        return (y.view(-1) * torch.ones(42)).sum()

    def expanded(y):
        return y.sum()

    for through in (hooked, twice, viewed, expanded):
        torch.testing.assert_close(gradients(through), expected)
    assert seen[0].eq(1).all() and kept[0].grad.eq(1).all()
    y = F.linear_gelu(x, w, b)
    loss = (y * torch.ones(6, 7)).sum()
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, (x, w, b), retain_graph=True), expected)


@pytest.mark.usefixtures("cpu_kernels")
def test_modes_tied_weights_and_checkpointing():
    """G6: no_grad, inference_mode, train and eval; one weight used twice; recomputation under checkpointing."""
    ours, theirs = (
        lib.Sequential(lib.LayerNorm(9), lib.Linear(9, 9), lib.GELU(), lib.Linear(9, 9), lib.GELU())
        for lib in (nn, torch.nn)
    )
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model[3].weight = model[1].weight
    x = torch.randn(5, 9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = ours.eval()(x)
            torch.testing.assert_close(output, theirs.eval()(x))
            assert not output.requires_grad and output.is_inference() == (mode is torch.inference_mode)
    for reentrant in (None, True, False):
        grads = []
        for model in (ours.train(), theirs.train()):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            output = model(leaf) if reentrant is None else checkpoint(model, leaf, use_reentrant=reentrant)
            output.square().sum().backward()
            grads.append([leaf.grad, *(p.grad for p in model.parameters())])
        assert len(grads[0]) == len(grads[1]) == 6, "the tied weight counts once"
        torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_precision_of_float32_products(precision):
    """G2: where the user lets them be less precise, torch decides how, and the product is torch's to the bit."""
    x, w = torch.randn(256, 256), torch.randn(256, 256)
    exact, before = reference.linear_gelu(x.double(), w.double()), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        path = "product.one_dnn" if precision == "highest" else "product.torch"
        low = {"product__one_dnn_multiply_adds": 1, "product__one_dnn_float32": 1}
        with thresholds(**low), served("linear_gelu", path):
            ours = F.linear_gelu(x, w)
        if precision == "medium":
            assert torch.equal(ours, F.gelu(TF.linear(x, w)))
        else:
            assert_close(ours, torchs_linear_gelu(x, w), exact)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("cpu_kernels")
def test_saves_the_input_and_the_pre_activation_alone():
    saved = []
    x, w, b = torch.randn(6, 10).requires_grad_(), torch.randn(7, 10).requires_grad_(), torch.randn(7).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear_gelu(x, w, b)
    shapes = sorted(tuple(t.shape) for t in saved if t.data_ptr() != w.data_ptr())
    assert shapes == [(6, 7), (6, 10)]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype):
    x = torch.empty(0, 5, dtype=dtype, requires_grad=True)
    w, b = torch.ones(3, 5, dtype=dtype, requires_grad=True), torch.ones(3, dtype=dtype, requires_grad=True)
    output = F.linear_gelu(x, w, b)
    output.sum().backward()
    assert output.shape == (0, 3) and x.grad.shape == (0, 5) and w.grad.eq(0).all() and b.grad.eq(0).all()


@pytest.mark.parametrize("features, out", [(0, 3), (5, 0), (0, 0)])
@pytest.mark.torch_serves("without features nothing tells how many rows there are")
def test_no_features(features, out):
    """G1: torch serves."""
    args = [torch.ones(s, requires_grad=True) for s in ((2, features), (out, features), (out,))]
    ours, torchs = (f(*args) for f in (F.linear_gelu, torchs_linear_gelu))
    torch.testing.assert_close(ours, torchs)
    ours.sum().backward()
    assert all(t.grad.shape == t.shape for t in args)


@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_errors_are_torchs():
    """G1: type and text, for the shapes, the dtypes and approximate."""
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for args in (
        (x, torch.randn(5, 3), b, "none"),
        (x, w, torch.randn(4), "none"),
        (x, w.double(), b, "none"),
        (x.long(), w, b, "none"),
        (x, w, b, "sigmoid"),
        (torch.randn(()), w, b, "none"),
        (x, None, b, "none"),
        (x, w, b, None),
    ):
        assert_same_error(F.linear_gelu, torchs_linear_gelu, *args)
    for input, approximate in ((x.long(), "none"), (x, "erf"), (None, "none")):
        assert_same_error(F.gelu, TF.gelu, input, approximate=approximate)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    """G2: the output has autocast's dtype, the gradients the parameters'."""
    ours = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 4))
    theirs = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.GELU(), torch.nn.Linear(30, 4))
    theirs.load_state_dict(ours.state_dict())
    for input_dtype in (torch.float32, dtype):
        x, grads = torch.randn(8, 20).to(input_dtype), []
        for model in (ours, theirs):
            model.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                output = model(x)
                assert output.dtype == dtype and model[:2](x).dtype == dtype
                output.float().square().sum().backward()
            grads.append([output, *(p.grad for p in model.parameters())])
        for a, b in zip(*grads, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    shapes = [((5,), 3), ((4, 7), 9), ((2, 3, 4), 5), ((0, 4), 5)]
    for requires_grad in (True, False):
        for x, w, b, approximate in sample_inputs(torch.float32, requires_grad, shapes):
            torch.library.opcheck(torch.ops.nnfast.linear_gelu.default, (x, w, b), {"approximate": approximate})
        x = torch.randn(3, 4, 5).transpose(0, 2).requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.nnfast.gelu.default, (x,), {"approximate": "tanh"})
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for pre in (torch.randn(6, 5), torch.randn(0, 5), torch.randn(5, 6).t(), channels_last, torch.randn(6, 10)[:, ::2]):
        for requires_grad in (False, True):
            args = [torch.randn(pre.shape), pre.detach()]
            for op in (torch.ops.nnfast.gelu_backward.default, torch.ops.nnfast.gelu_backward_sum.default):
                torch.library.opcheck(op, [t.requires_grad_(requires_grad) for t in args], {"approximate": "none"})


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu_backward_keeps_strides(approximate):
    """As torch's: channels_last and transposed stay so, whatever the gradient's are."""
    for x in (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 6).t(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(4, 1).expand(4, 6),
    ):
        for g in (torch.randn(x.shape), torch.randn(x.shape[::-1]).permute(*reversed(range(x.dim())))):
            ours = torch.ops.nnfast.gelu_backward(g, x, approximate=approximate)
            torchs = torch.ops.aten.gelu_backward(g, x, approximate=approximate)
            assert ours.stride() == torch.empty_like(x).stride()
            torch.testing.assert_close(ours, torchs)


@pytest.mark.usefixtures("cpu_kernels")
def test_backward_ops_check_what_they_read():
    """One row beside many, another dtype: torch's kind of error, before anything is read."""
    x = torch.randn(1000, 8)
    for grad in (torch.randn(1, 8), torch.randn(1000, 8).double(), torch.randn(1000, 8, device="meta")):
        for op in (torch.ops.nnfast.gelu_backward, torch.ops.nnfast.gelu_backward_sum):
            with pytest.raises((RuntimeError, NotImplementedError)):
                op(grad, x)


def test_linear_gelu_module():
    """G1: Linear's signature, RNG order, keys and repr."""
    for kwargs in ({}, {"bias": False}, {"dtype": torch.float64}, {"approximate": "tanh"}):
        torch.manual_seed(3)
        ours = nn.LinearGELU(6, 4, **kwargs)
        torch.manual_seed(3)
        theirs = torch.nn.Linear(6, 4, **{k: v for k, v in kwargs.items() if k != "approximate"})
        assert not isinstance(ours, torch.nn.Linear) and list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        x = torch.randn(5, 6, dtype=kwargs.get("dtype", torch.float32))
        torch.testing.assert_close(ours(x), TF.gelu(theirs(x), approximate=ours.approximate))
        assert repr(theirs)[:-1].split("(")[1] in repr(ours) and repr(ours.approximate) in repr(ours)
        torch.manual_seed(4)
        ours.to_empty(device="cpu").reset_parameters()
        torch.manual_seed(4)
        theirs.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_a_linear_and_a_gelu_of_ours(approximate):
    """G3, G4, G5: in a Sequential, and as a call of F.gelu; values, gradients, and what turns it off."""
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(approximate))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(approximate))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)

    def step(model, call):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        return y, [p.grad for p in model.parameters()]

    for call in (model, lambda x: F.gelu(model[0](x), approximate=approximate)):
        step(model, call)
        with served("linear_backward.sums_found"):
            torch.testing.assert_close(step(model, call), step(plain, plain))
    patched = nn.Linear(4, 6)
    patched.forward = lambda x: TF.linear(x, patched.weight) * 2
    torch.testing.assert_close(nn.Sequential(patched, nn.GELU())(x), TF.gelu(TF.linear(x, patched.weight) * 2))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_blocks(dtype):
    """The product in blocks, with and without the pre-activation: to the bit what the whole gives."""
    x, w, b = (torch.randn(s).to(dtype) for s in ((300, 33), (65, 33), (65,)))
    for approximate in APPROXIMATE:
        whole = torch.ops.nnfast.linear_gelu(x, w, b, approximate=approximate)
        with thresholds(linear_gelu__block_bytes=1), served(*["linear_gelu.blocks"][: dtype != torch.float64]):
            parts = torch.ops.nnfast.linear_gelu(x, w, b, approximate=approximate)
            output, none = torch.ops.nnfast.linear_gelu(x, w, b, approximate=approximate, want_pre=False)
        assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
        assert torch.equal(whole[0], output) and none.numel() == 0


@pytest.mark.usefixtures("cpu_kernels")
def test_a_backward_that_failed_can_be_tried_again():
    """Nothing is let go before the last thing that can fail."""
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((64, 96), (128, 96), (128,)))
    fail = [True]

    def raising(t):
        if fail.pop():
            raise MemoryError
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, raising):
        y = F.linear_gelu(x, w, b)
    grad = torch.randn(64, 128)
    with pytest.raises(MemoryError):
        y.backward(grad)
    fail[:] = [False] * 9
    y.backward(grad)
    expected = torch.autograd.grad(torchs_linear_gelu(x, w, b), (x, w, b), grad)
    torch.testing.assert_close((x.grad, w.grad, b.grad), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("cpu_kernels")
def test_without_gradients_the_pre_activation_is_not_written():
    x, w, b = torch.randn(512, 64), torch.randn(2048, 64), torch.randn(2048)

    def peak(f):
        return peak_memory(f, "cpu")

    with torch.no_grad(), thresholds(linear_gelu__block_bytes=1):
        assert peak(lambda: F.linear_gelu(x, w, b)) < peak(lambda: torchs_linear_gelu(x, w, b))


def test_sequential_is_torchs():
    """G5: get, set, insert, delete, slice, pop, extend, +, *, names; children looked at afresh."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    assert nn.Sequential is torch.nn.Sequential and len(model[:2]) == 2 and len(model) == 3
    model.insert(1, nn.ReLU())
    assert [type(m).__name__ for m in model] == ["Linear", "ReLU", "GELU", "Linear"]
    del model[1]
    model[2] = nn.Tanh()
    assert isinstance(model.pop(2), nn.Tanh) and len(model.extend([nn.GELU()])) == 3
    assert len(model + model) == 6 and len(model * 2) == 6 and len(nn.Sequential(model, model)) == 2
    named = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), act=nn.GELU()))
    assert list(named.state_dict()) == ["fc.weight", "fc.bias"] and [n for n, _ in named.named_children()] == [
        "fc",
        "act",
    ]
    x = torch.randn(2, 4)
    before = named(x)
    named.act = nn.ReLU()
    torch.testing.assert_close(named(x), named.fc(x).relu())
    assert not torch.equal(before, named(x))


def test_transformer_encoder_layer():
    assert inspect.signature(nn.TransformerEncoderLayer) == inspect.signature(torch.nn.TransformerEncoderLayer)
    for kwargs in (
        {"activation": "gelu"},
        {"activation": F.gelu, "norm_first": True},
        {"activation": nn.GELU("tanh")},
        {},
    ):
        ours = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
        theirs = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x, grads = torch.randn(3, 5, 16), []
        for layer in (ours, theirs):
            layer(x).square().sum().backward()
            grads.append([p.grad for p in layer.parameters()])
        torch.testing.assert_close(*grads)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
        stacked = torch.nn.TransformerEncoder(ours, 2)
        assert all(isinstance(m, nn.TransformerEncoderLayer) for m in stacked.layers) and stacked(x).shape == x.shape


# ---- a Linear that reads a GELU: where a kernel can, its backward works out the GELU's gradient ahead ----


@pytest.fixture
def works_ahead():
    """A GPU's kernel of ``gelu_linear_backward``, for which the ops of a CPU stand in; it fails while the list that is
    given holds something."""
    library, fails = torch.library.Library("nnfast", "IMPL"), []

    def backward(grad_output, weight, self, *, approximate="none"):
        if fails:
            raise MemoryError
        grad = (grad_output @ weight).contiguous()
        return grad, *torch.ops.nnfast.gelu_backward_sum(grad, self.contiguous(), approximate=approximate)

    library.impl("gelu_linear_backward", backward, "CPU")
    yield fails
    library._destroy()


AHEAD = ("linear_backward.gelu_worked_ahead", "gelu_backward.found_ahead")


def mlp(linear, gelu, approximate="none", between=lambda h: h):
    def call(x, w, b, v, c):
        return linear(between(gelu(linear(x, w, b), approximate=approximate)), v, c)

    return call


def mlp_leaves(dtype, shape=(5, 7), hidden=9, out=6):
    sizes = shape, (hidden, shape[-1]), (hidden,), (out, hidden), (out,)
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def compare_mlp(leaves, grad_out, what, approximate="none", weight=lambda v: v):
    """The MLP of ours beside torch's and float64; ``weight`` lays out the second weight."""
    kinds = (F.linear, F.gelu, leaves), (TF.linear, TF.gelu, leaves), (TF.linear, reference.gelu, map(double, leaves))
    results = []
    for linear, gelu, own in kinds:
        x, w, b, v, c = own = list(own)
        if gelu is reference.gelu:
            gelu = lambda x, approximate: reference.gelu(x, approximate)  # noqa: E731
        output = mlp(linear, gelu, approximate)(x, w, b, weight(v), c)
        wanted = [t for t in own if t.requires_grad]
        results.append([output, *torch.autograd.grad(output, wanted, grad_out.to(output.dtype))])
    for k, (ours, torchs, true) in enumerate(zip(*results, strict=True)):
        assert_close(ours, torchs, true, f"{what}: {k}")


@pytest.mark.usefixtures("cpu_kernels", "works_ahead")
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", HALF)
def test_a_linear_that_reads_a_gelu(dtype, approximate):
    """Values and gradients; the bias's sums go on to the first Linear."""
    for shape, hidden, out in (((5, 7), 9, 6), ((2, 3, 16), 64, 24), ((7,), 3, 2), ((0, 7), 5, 3)):
        leaves = mlp_leaves(dtype, shape, hidden, out)
        with served(*AHEAD, "linear_backward.sums_found"):
            compare_mlp(leaves, torch.randn(*shape[:-1], out), f"{shape} {hidden} {out}", approximate)


@pytest.mark.usefixtures("cpu_kernels", "works_ahead")
def test_a_gradient_worked_ahead_is_only_ever_a_saving():
    """X2: whatever stands between, reads or changes the gradient on the way, results are torch's; a second time too."""
    leaves = mlp_leaves(torch.bfloat16)
    seen = []

    def keeps(h):
        h.retain_grad()
        seen.append(h)
        return h

    def hooked(hook):
        def between(h):
            h.register_hook(hook)
            return h

        return between

    def node_hooked(h):
        h.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
        return h

    def posted(h):
        h.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 3,))
        return h

    def in_place(grad):
        grad.mul_(2)

    def in_data(grad):
        grad.data.mul_(2)

    betweens = {
        "nothing": lambda h: h,
        "kept": keeps,
        "a hook": hooked(lambda g: g * 2),
        "a hook in place": hooked(in_place),
        "a hook behind autograd's back": hooked(in_data),
        "a hook that looks": hooked(lambda g: seen.append(g)),
        "a prehook of the node": node_hooked,
        "a hook after the node": posted,
        "two readers": lambda h: h + 0 * h,
        "a view": lambda h: h.view(-1, 9),
        "the hidden changed": lambda h: h.mul_(2),
        "dropout": lambda h: TF.dropout(h, 0.0),
        "detached": lambda h: h.detach().requires_grad_(),
    }
    for name, between in betweens.items():
        results, looked = [], []
        for linear, gelu in ((F.linear, F.gelu), (TF.linear, TF.gelu)):
            seen.clear()
            output = mlp(linear, gelu, between=between)(*leaves)
            for _ in range(2):
                grads = torch.autograd.grad(
                    output.square().sum(), leaves, retain_graph=True, allow_unused=name == "detached"
                )
            results.append([output, *(g for g in grads if g is not None)])
            looked.append([t.grad if t.grad_fn is not None else t for t in seen])
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(*looked, rtol=0.05, atol=0.05, msg=lambda m, name=name: f"{name}: {m}")

    # Two readers of the GELU's output; what it gives is asked for itself; a Linear whose hook changes what it sends.
    for case in ("two Linears", "asked for", "hook"):
        results = []
        for linear, gelu in ((F.linear, F.gelu), (TF.linear, TF.gelu)):
            x, w, b, v, c = leaves
            with left_to_torch(AHEAD[1]):
                h = gelu(linear(x, w, b))
                y = linear(h, v, c)
                if case == "hook":
                    y.grad_fn.register_hook(lambda inputs, outputs: tuple(t if t is None else 2 * t for t in inputs))
                    results.append(torch.autograd.grad(y.sum(), leaves))
                elif case == "asked for":
                    results.append(torch.autograd.grad(y.sum(), (h, v)))
                else:
                    results.append(torch.autograd.grad((y + linear(h, v, None)).sum(), leaves))
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05, msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.usefixtures("cpu_kernels", "works_ahead")
def test_a_gradient_worked_ahead_again_and_twice():
    """Checkpointing, hooks on what is saved, frozen weights, the second derivative."""
    leaves = mlp_leaves(torch.bfloat16)
    ours, torchs = mlp(F.linear, F.gelu), mlp(TF.linear, TF.gelu)
    with served(*AHEAD):
        again = [
            torch.autograd.grad(checkpoint(ours, *leaves, use_reentrant=False).sum(), leaves),
            torch.autograd.grad(ours(*leaves).sum(), leaves),
        ]
    assert all(map(torch.equal, *again))
    packed, unpacked = [], []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: unpacked.append(1) or t),
        served(*AHEAD),
    ):
        torch.autograd.grad(ours(*leaves).sum(), leaves)
    assert len(packed) == len(unpacked), "what is saved is unpacked once"
    for mask in itertools.product((True, False), repeat=5):
        if any(mask):
            for t, wanted in zip(leaves, mask, strict=True):
                t.requires_grad_(wanted)
            wanted = [t for t in leaves if t.requires_grad]
            results = [torch.autograd.grad(f(*leaves).square().sum(), wanted) for f in (ours, torchs)]
            torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
    for t in leaves:
        t.requires_grad_()
    second = []
    for f in (ours, torchs):
        first = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*second, rtol=0.1, atol=1.0)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_gradient_worked_ahead_that_fails(works_ahead):
    """Its Linear has let its input go, as torch's has when the GELU's backward fails: torch's error for a second try.
    With retain_graph there is one."""
    leaves = mlp_leaves(torch.bfloat16)
    for retain in (False, True):
        y = mlp(F.linear, F.gelu)(*leaves).sum()
        works_ahead.append("memory")
        with pytest.raises(MemoryError):
            torch.autograd.grad(y, leaves, retain_graph=retain)
        works_ahead.clear()
        if not retain:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(y, leaves)
        else:
            with served(*AHEAD):
                assert all(map(torch.equal, torch.autograd.grad(y, leaves), torch.autograd.grad(
                    mlp(F.linear, F.gelu)(*leaves).sum(), leaves)))  # fmt: skip


@pytest.mark.torch_serves("on a CPU it is torch's ops")
def test_gelu_linear_backward_checks_what_it_reads():
    g, weight, pre = torch.randn(2, 3, 4), torch.randn(4, 5), torch.randn(2, 3, 5)
    op = torch.ops.nnfast.gelu_linear_backward
    torch.library.opcheck(op.default, (g, weight, pre), {"approximate": "tanh"})
    grad, grad_pre, sums = op(g, weight, pre)
    torch.testing.assert_close(grad, g @ weight)
    torch.testing.assert_close(grad_pre, torch.ops.aten.gelu_backward(g @ weight, pre))
    torch.testing.assert_close(sums, grad_pre.sum((0, 1)))
    for bad in ((g[0], weight, pre), (g, weight.t(), pre), (g, weight, pre[:, :2]), (g, weight.half(), pre)):
        for guard in (torch.no_grad, torch.enable_grad):
            with guard(), pytest.raises(RuntimeError, match="a Linear that reads a GELU"):
                op(*bad)


@pytest.mark.usefixtures("works_ahead")
def test_models_in_which_a_linear_reads_a_gelu(cpu_kernels):
    """Whoever calls the modules; not where dropout stands between."""

    def layer(library, p):
        return library.TransformerEncoderLayer(16, 2, 32, dropout=p, activation="gelu", batch_first=True)

    def sequential(library):
        return library.Sequential(library.Linear(16, 32), library.GELU("tanh"), library.Linear(32, 16))

    makes = [lambda library: layer(library, 0.0), sequential]
    for make, how in itertools.product(makes, ("ours", "accelerated")):
        torch.manual_seed(0)
        theirs = make(torch.nn).bfloat16()
        ours = make(nn).bfloat16() if how == "ours" else nnfast.accelerate(make(torch.nn).bfloat16())
        ours.load_state_dict(theirs.state_dict())
        x, results = torch.randn(3, 5, 16).bfloat16(), []
        with served(*AHEAD):
            for model in (ours, theirs):
                model(x).float().square().sum().backward()
                results.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*results, rtol=0.1, atol=0.5)
    dropping = layer(nn, 0.5).bfloat16()
    dropping.self_attn.dropout = 0.0  # attention with dropout is torch's
    with left_to_torch(AHEAD[1]):
        dropping(torch.randn(3, 5, 16).bfloat16()).sum().backward()
        sequential(nn)(torch.randn(3, 16)).sum().backward()  # a product in float32 does not work it out


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_a_hook_packs_in_half(approximate):
    """A hook of saved tensors may give the backward another dtype: torch's op takes it."""
    x = torch.randn(40, requires_grad=True)
    grads = []
    for function in (F.gelu, TF.gelu):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t)
        with hooks, served("gelu", when=function is F.gelu):
            y = function(x, approximate=approximate)
        grads += torch.autograd.grad(y.sum(), x)
    assert grads[0].dtype == grads[1].dtype
    torch.testing.assert_close(*grads)
