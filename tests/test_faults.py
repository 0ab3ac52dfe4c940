"""An allocation that fails, each in its turn: torch's error, nothing changed or leaked, and the call works after."""

import contextlib
import copy
import itertools

import pytest
import torch
from common import DTYPES, every_allocation_fails, failing_allocation, served, thresholds

import nnfast.nn.functional as F
import nnfast.optim as optim

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# SMALL: outputs come from at::empty. LOW: they are blocks of ours, and a small case takes every path that it can.
SMALL = {}
LOW = {"memory__large_bytes": 256, "linear_gelu__block_bytes": 1, "thread_elements": 64, "stream_bytes": 1}
LOW |= {"product__one_dnn_multiply_adds": 1, "product__gemm_16_bits": 2, "product__gemm_multiply_adds": 1}
PATHS = pytest.mark.parametrize("numbers", [SMALL, LOW], ids=["as they are", "low"])


def forward_and_backward(function, *args):
    """A call that gives the output and every gradient."""
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]

    def call():
        output = function(*args)
        return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones(()).to(output).expand_as(output))]

    return call


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(numbers, dtype):
    x, w, b = leaf(70, 64, dtype=dtype), leaf(64, dtype=dtype), leaf(64, dtype=dtype)
    apart = torch.stack([w, b], -1).detach()
    with thresholds(**numbers):
        assert every_allocation_fails(forward_and_backward(F.layer_norm, x, (64,), w, b)) >= 7
        every_allocation_fails(forward_and_backward(F.layer_norm, x.detach().T.requires_grad_(), (70,)))
        every_allocation_fails(forward_and_backward(F.layer_norm, x, (64,), apart[:, 0].requires_grad_(), apart[:, 1]))


@PATHS
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gelu(numbers, approximate, dtype):
    x, w, b = leaf(300, 24, dtype=dtype), leaf(40, 24, dtype=dtype), leaf(40, dtype=dtype)
    with thresholds(**numbers):
        call = forward_and_backward(lambda *args: F.linear_gelu(*args, approximate), x, w, b)
        assert every_allocation_fails(call) >= 6
        call = forward_and_backward(lambda *args: F.linear_gelu(*args, approximate), x, w.detach(), b)
        every_allocation_fails(call)
        for t in (x, x.detach().T.requires_grad_(), x.detach()[:, ::2].requires_grad_()):
            every_allocation_fails(forward_and_backward(lambda t: F.gelu(t, approximate=approximate), t))


@PATHS
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_linear(numbers, dtype):
    x, w, b = leaf(70, 24, dtype=dtype), leaf(40, 24, dtype=dtype), leaf(40, dtype=dtype)
    with thresholds(**numbers):
        for args in ((x, w, b), (x, w.detach(), b), (x.detach(), w), (x.detach().T.requires_grad_(), leaf(9, 70))):
            args = [t.to(dtype).detach().requires_grad_(t.requires_grad) for t in args]
            assert every_allocation_fails(forward_and_backward(F.linear, *args)) >= 2


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(numbers, dtype):
    q, k, v = leaf(2, 2, 70, 16, dtype=dtype), leaf(2, 1, 40, 16, dtype=dtype), leaf(2, 1, 40, 24, dtype=dtype)
    mask = torch.randn(70, 40).to(dtype)
    options = {"attn_mask": mask, "enable_gqa": True}
    with thresholds(**numbers):
        call = forward_and_backward(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), q, k, v)
        assert every_allocation_fails(call) >= 5


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(numbers, dtype):
    """Also where the logits become their gradient: they have not changed when memory runs out."""
    x, w, target = leaf(40, 50, dtype=dtype), torch.rand(50).to(dtype), torch.randint(50, (40,))
    target[3] = -100
    with thresholds(**numbers):
        for options in ({}, {"reduction": "none"}, {"weight": w, "label_smoothing": 0.1, "reduction": "sum"}):
            call = forward_and_backward(lambda x, options=options: F.cross_entropy(x, target, **options), x)
            assert every_allocation_fails(call) >= 2
            call = forward_and_backward(lambda x, options=options: F.cross_entropy(x * 2, target, **options), x)
            with served("cross_entropy_backward_"):
                every_allocation_fails(call)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy(numbers, dtype):
    x, w, b = leaf(40, 24, dtype=dtype), leaf(50, 24, dtype=dtype), leaf(50, dtype=dtype)
    target = torch.randint(50, (40,))
    with thresholds(**numbers):
        call = forward_and_backward(lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b), x, w, b)
        assert every_allocation_fails(call) >= 4


def lowered(function, *args, **keywords):
    with torch.autocast("cpu", torch.bfloat16):
        return function(*args, **keywords)


@PATHS
@pytest.mark.parametrize(
    "op", ["layer_norm", "gelu", "linear", "linear_gelu", "cross_entropy", "linear_cross_entropy", "attention"]
)
def test_a_backward_that_failed_can_be_taken_again(numbers, op):
    """The node keeps what it saved until its gradients are there, as torch's do. Linear and GELU are two nodes, as
    torch's are: where the second fails, the first has let go, and says so."""
    x, w, b, target = leaf(300, 24), leaf(24, 24), leaf(24), torch.randint(24, (300,))
    qkv = [leaf(2, 3, 50, 24) for _ in range(3)]
    calls = {
        "layer_norm": (lambda: F.layer_norm(x, (24,), w[0], b), (x, b)),
        "gelu": (lambda: F.gelu(x), (x,)),
        "linear": (lambda: F.linear(x, w, b), (x, w, b)),
        "linear_gelu": (lambda: F.linear_gelu(x, w, b), (x, w, b)),
        "cross_entropy": (lambda: F.cross_entropy(x * 2, target), (x,)),
        "linear_cross_entropy": (lambda: lowered(F.linear_cross_entropy, x, w, target, linear_bias=b), (x, w, b)),
        "attention": (lambda: F.scaled_dot_product_attention(*qkv), qkv),
    }
    call, leaves = calls[op]
    g = torch.randn_like(call())
    with thresholds(**numbers):
        expected = torch.autograd.grad(call(), leaves, g)
        for n in itertools.count():
            output = call()
            with failing_allocation(n) as failed, contextlib.suppress(RuntimeError):
                grads = torch.autograd.grad(output, leaves, g)
            if not failed:
                break
            try:
                grads = torch.autograd.grad(output, leaves, g)
            except RuntimeError as e:
                # linear_gelu fails in its second node, the losses in torch's of x * 2, and of autocast's conversions:
                # the one before has let go.
                assert op in ("cross_entropy", "linear_cross_entropy") or op == "linear_gelu" and n > 0
                assert "a second time" in str(e)
                continue
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True)), n
        assert n > 0


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}, {"lr": torch.tensor(0.1)}], ids=str)
def test_adamw(numbers, dtype, options):
    """The counts of steps included."""
    params = [leaf(30, 20, dtype=dtype), leaf(7, dtype=dtype), leaf(12, 6, dtype=dtype)]
    for p in params:
        p.grad = torch.randn_like(p)
    params[0].grad = torch.randn(20, 30).to(dtype).T
    optimizer = optim.AdamW(params, **options)
    optimizer.step()

    def state():
        return [*params, *(p.grad for p in params), *(t for p in params for t in optimizer.state[p].values())]

    with thresholds(**numbers):
        every_allocation_fails(lambda: optimizer.step(), state)


@PATHS
@pytest.mark.parametrize(
    "name, options",
    [
        ("AdamW", {"amsgrad": True}),
        ("Adam", {"fused": True}),
        ("AdamW", {"master_weights": True}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
    ],
    ids=str,
)
def test_the_first_step(numbers, name, options):
    """Whichever allocation of the first step fails, no state is left, and the step that follows is the first."""
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    start = [torch.randn(30, 20).to(dtype), torch.randn(7).to(dtype)]
    grads = [torch.randn(20, 30).to(dtype).T, torch.randn(7).to(dtype)]

    def optimizer():
        params = [t.clone().requires_grad_() for t in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return getattr(optim, name)(params, **options), params

    with thresholds(**numbers):
        expected, values = optimizer()
        expected.step()
        for n in itertools.count():
            ours, params = optimizer()
            before = copy.deepcopy(ours.state_dict())
            with failing_allocation(n) as failed, contextlib.suppress(RuntimeError):
                ours.step()
            if not failed:
                break
            assert all(torch.equal(p, t) for p, t in zip(params, start, strict=True))
            assert before == ours.state_dict() and not ours.state, n
            ours.step()
            for p, q in zip(params, values, strict=True):
                pairs = zip((p, *ours.state[p].values()), (q, *expected.state[q].values()), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), n
        assert n >= 3
