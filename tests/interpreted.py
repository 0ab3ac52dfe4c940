"""The Triton kernels in Triton's interpreter, on CPU tensors, through the ops: run by test_triton.py.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted.py

Triton chooses between its interpreter and its compiler when it is imported, so this is a process of its own. Here its
kernels are registered at the CPU key of the dispatcher. The tests bring tiles and GPUs that are small, so that
programs have neighbours, several rounds, and edges.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
import triton
import triton.language as tl
from common import FLOAT_AND_HALF as DTYPES
from common import HALF, assert_close, double, layouts, served
from gpu_checks import (
    ADAMW_OPTIONS,
    check_adamw,
    check_adamw_on_the_device,
    check_clipping,
    check_empty,
    check_linear_gelu_layouts,
    check_nan_stays_in_its_row,
    check_only_what_is_wanted,
)
from machine import Machine
from test_adamw import train
from test_layer_norm import compare as compare_layer_norm
from test_layer_norm import compare_to_float32
from test_layer_norm import sample_inputs as layer_norm_inputs
from test_linear_gelu import AHEAD, compare_mlp, mlp_leaves
from test_linear_gelu import compare as compare_linear_gelu
from triton.runtime import driver
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import kernels, reference
from nnfast.kernels import adamw, clip_grad, layer_norm, linear_gelu


def _bits_of_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, even).astype(np.uint16)


def _values(t: TensorHandle) -> TensorHandle:
    if t.dtype.scalar != tl.bfloat16:
        return t
    return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    """The interpreter of Triton 3.6 keeps bfloat16 as 16-bit integers, which it multiplies as such, and cuts a float
    short where the GPU rounds it. Mended here."""
    cast, dot = InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        return TensorHandle(_bits_of_bfloat16(src.data), tl.bfloat16)

    def create_dot(self, a, b, d, *options):
        return dot(self, _values(a), _values(b), d, *options)

    InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot = create_fp_trunc, create_dot
    yield
    InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot = cast, dot


@pytest.fixture(autouse=True)
def _triton_serves(monkeypatch):
    """Calls go through the gate, which takes the kernels for the CPU's, and the dispatcher to Triton's launchers."""
    driver.set_active(Machine("sm_90", processors=2))
    library = torch.library.Library("nnfast", "IMPL")
    served = set()
    for op in kernels.OPS:

        def record(*args, op=op, **kwargs):
            served.add(op)
            return kernels.launcher(op)(*args, **kwargs)

        library.impl(op, record, "CPU", allow_override=True)
    monkeypatch.setattr(layer_norm, "TILE", 256)
    monkeypatch.setattr(layer_norm, "WARPS_PER_PROCESSOR", 4)
    monkeypatch.setattr(linear_gelu, "GRAD_PROGRAMS", 1)
    monkeypatch.setattr(adamw, "CHUNK", 64)
    monkeypatch.setattr(clip_grad, "PARTS", 4)
    linear_gelu._tuned.clear()
    adamw._tables.clear()
    yield
    library._destroy()
    assert served, "nothing came to Triton"


@pytest.fixture(params=["short", "long"])
def rows(request, monkeypatch):
    """Both ways of LayerNorm: the whole row in one tile, and piece by piece."""
    if request.param == "long":
        monkeypatch.setattr(layer_norm, "LONGEST", 8)
        monkeypatch.setattr(layer_norm, "LONGEST_BACKWARD", 8)
        monkeypatch.setattr(layer_norm, "LONG_COLS", 16)
        monkeypatch.setattr(layer_norm, "LONG_COLS_FORWARD", 16)


# One element, one tile exactly, one over; programs with several rounds; two normalized dimensions.
SHAPES = [((5,), 1), ((3, 1), 1), ((2, 3, 16), 1), ((19, 33), 1), ((2, 3, 4, 6), 2)]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    for args in layer_norm_inputs(dtype, shapes=SHAPES, affine=[(True, True)]):
        compare_layer_norm(args, torch.randn_like(args[0]), f"{tuple(args[0].shape)}")
    for input, shape, weight, bias, eps in layer_norm_inputs(dtype, shapes=SHAPES[3:4]):
        if dtype in HALF:
            compare_to_float32((input, shape, weight, bias, eps), torch.randn_like(input), "to float32")


@pytest.mark.usefixtures("rows")
def test_layer_norm_layouts():
    x, g = torch.randn(2, 3, 2, 13), torch.randn(3, 2, 13)
    weight, bias = torch.randn(2, 13).requires_grad_()
    plain = [(input, name, g) for name, input in layouts(x[0]).items()]
    for input, name, grad in plain + [(x[1], f"gradient {name}", t) for name, t in layouts(g).items()]:
        compare_layer_norm((input.detach().requires_grad_(), (13,), weight, bias, 1e-5), grad, name)


@pytest.mark.usefixtures("rows")
def test_layer_norm_far_from_zero():
    """A one-pass variance, or one into which lanes beyond the row enter, fails."""
    x = (2000 + torch.randn(4, 60)).requires_grad_()
    compare_layer_norm((x, (60,), None, None, 1e-5), torch.randn(4, 60), "mean 2000")


@pytest.mark.usefixtures("rows")
def test_layer_norm_nan_stays_in_its_row():
    check_nan_stays_in_its_row(33)


@pytest.mark.usefixtures("rows")
def test_layer_norm_only_what_is_wanted():
    check_only_what_is_wanted(10)


def test_empty():
    check_empty()
    nothing = F.linear_gelu(torch.randn(3, 0), torch.randn(4, 0), bias=torch.ones(4))
    torch.testing.assert_close(nothing, TF.gelu(torch.ones(3, 4)))
    p = torch.empty(0, requires_grad=True)
    p.grad = torch.empty(0)
    optim.AdamW([p]).step()


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match="does not cover"):
        torch.ops.nnfast.layer_norm(torch.randn(3, 4).double(), (4,), None, None, 1e-5)


# The sides of a tile and one over; TMA wants multiples of 8 and gets them in the last two.
PRODUCTS = [((5,), 3), ((2, 3, 17), 33), ((70, 40), 136), ((130, 72), 64)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu(dtype, target):
    driver.set_active(Machine(target, processors=2))
    for (shape, out), approximate, has_bias in itertools.product(PRODUCTS, ("none", "tanh"), (True, False)):
        if approximate == "tanh" and not has_bias:
            continue
        x, weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, (out, shape[-1]), (out,)))
        args = x, weight, bias if has_bias else None, approximate
        compare_linear_gelu(args, torch.randn(*shape[:-1], out).to(dtype), f"{shape} -> {out}, {approximate}")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_linear_that_reads_a_gelu(dtype, target):
    """The gradient of the GELU ends the product for it; weights by rows and by columns."""
    driver.set_active(Machine(target, processors=2))
    for (shape, hidden), approximate, columns in itertools.product(PRODUCTS, ("none", "tanh"), (False, True)):
        if approximate == "tanh" and columns:
            continue
        for out in (5, 72):
            leaves = mlp_leaves(dtype, shape, hidden, out)
            weight = (lambda v: v.t().contiguous().t()) if columns else (lambda v: v)
            with served(*AHEAD):
                what = f"{shape} -> {hidden} -> {out}, {approximate}"
                compare_mlp(leaves, torch.randn(*shape[:-1], out), what, approximate, weight)


def test_layouts_of_a_linear_that_reads_a_gelu():
    g, weight, pre = (torch.randn(s).half() for s in ((3, 4, 16), (16, 24), (3, 4, 24)))
    cases = [(*case, pre, f"gradient {name}") for name, t in layouts(g).items() for case in [(t, weight)]]
    cases += [(g, t, pre, f"weight {name}") for name, t in layouts(weight).items()]
    cases += [(g, weight, t, f"input {name}") for name, t in layouts(pre).items()]
    for grad_out, w, x, what in cases:
        found = torch.ops.nnfast.gelu_linear_backward(grad_out, w, x)
        exact = grad_out.double() @ w.double()
        leaf = double(x).requires_grad_()
        (exact_pre,) = torch.autograd.grad(reference.gelu(leaf), leaf, exact)
        torchs = (grad_out.float() @ w.float()).half()
        torchs_pre = torch.ops.aten.gelu_backward(torchs, x.contiguous())
        for ours, other, true in zip(
            found, (torchs, torchs_pre, torchs_pre.sum((0, 1))), (exact, exact_pre, exact_pre.sum((0, 1))), strict=True
        ):
            assert_close(ours, other, true, what, scale=1)


def test_linear_gelu_layouts():
    check_linear_gelu_layouts()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_pre_activation_is_rounded_before_its_gelu(dtype, target):
    """The output is the GELU of what is stored, as from torch's two calls: to the bit, where GELU is not tiny."""
    driver.set_active(Machine(target, processors=2))
    x, weight = torch.randn(60, 40).to(dtype), torch.randn(64, 40).to(dtype)
    output, pre = torch.ops.nnfast.linear_gelu(x, weight, None)
    same = output == reference.gelu(pre.double()).to(dtype)
    assert same[pre > -1].double().mean() > 0.99


@triton.jit
def _gelu_kernel(x, y, TANH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, linear_gelu.gelu(tl.load(x + i), TANH))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_formulas(approximate):
    """Forward and derivative in float, against float64 and beside the CPU's, which are compiled from csrc/math."""
    x = torch.linspace(-14, 14, 4096)
    y = torch.empty_like(x)
    _gelu_kernel[(4,)](x, y, TANH=approximate == "tanh", BLOCK=1024)
    leaf = double(x).requires_grad_()
    true = reference.gelu(leaf, approximate)
    assert_close(y, torch.ops.nnfast.gelu(x, approximate=approximate), true, scale=14)
    (true,) = torch.autograd.grad(true.sum(), leaf)
    pre = x.view(-1, 8)
    grad, sums = torch.ops.nnfast.gelu_backward_sum(torch.ones_like(pre), pre, approximate=approximate)
    torch.testing.assert_close(sums, grad.sum(0))
    whole = torch.ones(()).expand_as(pre)  # as y.sum() gives it
    for ours, same in zip(
        torch.ops.nnfast.gelu_backward_sum(whole, pre, approximate=approximate), (grad, sums), strict=True
    ):
        torch.testing.assert_close(ours, same, check_stride=True)
    cpu = torch.ops.nnfast.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    assert_close(grad.flatten(), cpu, true, scale=1)


SIZES = [(0,), (1,), (63,), (64,), (65,), (), (3, 0, 2), (5, 13), (300,), (0, 4)]


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES], ids=str)
def test_adamw(dtypes, options):
    check_adamw(SIZES, dtypes, options, steps=3)


def test_adam():
    """With a weight decay that is not decoupled, and with none."""
    for options in ({"weight_decay": 0.3}, {"weight_decay": 0.3, "amsgrad": True, "maximize": True}, {}):
        params, *grads = ([torch.randn(s) for s in SIZES] for _ in range(4))
        ours, _ = train(optim.Adam, params, grads, lr=0.1, **options)
        torchs, _ = train(torch.optim.Adam, params, grads, lr=0.1, **options)
        torch.testing.assert_close(ours, torchs)


def test_adamw_layouts():
    """Other strides, and addresses that are no multiple of 16 bytes, whole chunks among them."""
    base = torch.randn(20, 18)
    cases = {
        "transposed": (base.t().contiguous().t(), base),
        "gradient transposed": (base.clone(), base.t().contiguous().t()),
        "gradient with gaps": (base.clone(), torch.randn(20, 36)[:, ::2]),
        "misaligned": (torch.randn(400)[3:363].view(20, 18), torch.randn(400)[5:365].view(20, 18)),
    }
    for name, (param, grad) in cases.items():
        results = []
        for kind, p in ((optim.AdamW, param.detach()), (torch.optim.AdamW, param.clone())):
            p.requires_grad_().grad = grad.clone(memory_format=torch.preserve_format)
            optimizer = kind([p], lr=0.1)
            optimizer.step()
            optimizer.step()
            results.append(p.detach())
        torch.testing.assert_close(*results, msg=name)
        *_, (columns, _) = adamw._tables.values()
        assert (columns[adamw.KIND.value] == [4]) == (name == "misaligned"), "16-byte loads only from 16-byte addresses"


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES], ids=str)
def test_clipping(dtypes):
    check_clipping(SIZES, dtypes, rtol=1e-6)


def test_adamw_tables_are_kept():
    """No new table while addresses stay and steps advance together; one for a new gradient or a lagging step."""
    params = [torch.randn(size, requires_grad=True) for size in (100, 70, 130)]
    others = [p.detach().clone().requires_grad_() for p in params]
    pairs = (optim.AdamW(params, lr=0.1), params), (torch.optim.AdamW(others, lr=0.1), others)
    tables = []
    for step in range(6):
        for optimizer, group in pairs:
            for p in group:
                if p.grad is None or step == 2:
                    p.grad = torch.ones_like(p)
                p.grad.copy_(torch.arange(len(p)) % 7 - step)
            if step == 4:
                group[1].grad = None
            optimizer.step()
        (table,) = adamw._tables.values()
        tables.append(table[1][0][1])
    assert [a is b for a, b in itertools.pairwise(tables)] == [True, False, True, False, False]
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_adamw_on_the_device(monkeypatch, amsgrad, found):
    """Nothing is read by the host."""
    monkeypatch.setattr(adamw, "on_gpu", lambda t: True)
    check_adamw_on_the_device((0, 5, 130), amsgrad, found)
