"""nn.MultiheadAttention: torch's code with our products and attention. N2 and S1 of the contract."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from common import assert_close, assert_same_error, double, left_to_torch, served

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F

WAYS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 12, "vdim": 20},
    {"add_bias_kv": True, "add_zero_attn": True},
]


def pair(dtype=torch.float32, dropout=0.0, **options):
    theirs = torch.nn.MultiheadAttention(16, 4, dropout, dtype=dtype, **options)
    ours = nn.MultiheadAttention(16, 4, dropout, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(dtype=torch.float32, kdim=16, vdim=16, batch_first=False, **_):
    sizes = (5, 3, 16), (7, 3, kdim), (7, 3, vdim)
    made = [torch.randn(s, dtype=torch.float64).to(dtype) for s in sizes]
    return [(t.transpose(0, 1) if batch_first else t).detach().requires_grad_() for t in made]


def masks():
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[0, 4:] = hidden[2, :1] = True
    seen = torch.randn(5, 7)
    yield {}
    yield {"key_padding_mask": hidden}
    yield {"attn_mask": seen > 1}
    yield {"attn_mask": seen}
    yield {"attn_mask": torch.randn(12, 5, 7), "key_padding_mask": hidden.float()}


def run(module, arguments, **keywords):
    """Output, weights if any, and every gradient, over fresh leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    output, weights = module(*leaves, **keywords)
    found = [t for t in (output, weights) if t is not None]
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in found)
    parameters = [p for p in module.parameters() if p is not None]
    return [*found, *torch.autograd.grad(loss, [*leaves, *parameters])]


@pytest.mark.usefixtures("some_kernels")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_and_gradients(dtype, way, need_weights):
    """N2, S1: beside torch's and float64: projections, masks, weights."""
    ours, theirs = pair(dtype, **way)
    arguments = inputs(dtype, **way)
    for mask in masks():
        mask = {k: v.to(dtype) if v.is_floating_point() else v for k, v in mask.items()}
        keywords = {**mask, "need_weights": need_weights, "average_attn_weights": dtype is torch.float32}
        attention = [] if need_weights or dtype is torch.float64 else ["scaled_dot_product_attention"]
        with served("linear", "linear_backward", *attention):
            found = run(ours, arguments, **keywords)
        numbers = {k: v.double() for k, v in mask.items() if v.is_floating_point()}
        true = copy.deepcopy(theirs).double()
        exact = run(true, [double(t) for t in arguments], **{**keywords, **numbers})
        # The largest term of a sum is some times the largest sum: a parameter's gradient cancels over rows.
        for i, (a, b, true) in enumerate(zip(found, run(theirs, arguments, **keywords), exact, strict=True)):
            assert_close(a, b, true, f"{i} of {mask.keys()}", scale=4 * true.detach().abs().max().item())


@pytest.mark.usefixtures("cpu_kernels")
def test_causal_unbatched_and_autocast():
    """S1: torch's hints and shapes, and its dtypes under autocast."""
    ours, theirs = pair()
    x, causal = torch.randn(6, 16), torch.nn.Transformer.generate_square_subsequent_mask(6)
    for mask in ({}, {"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}):
        for need_weights in (True, False):
            with served("linear"):
                a = ours(x, x, x, need_weights=need_weights, **mask)
            b = theirs(x, x, x, need_weights=need_weights, **mask)
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16), served("linear", "scaled_dot_product_attention"):
        a, b = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0, atol=0.02)


@pytest.mark.usefixtures("some_kernels")
def test_dropout_draws_as_torchs():
    ours, theirs = pair(dropout=0.5)
    arguments = inputs()
    for need_weights in (True, False):
        results = []
        for m in (ours, theirs):
            torch.manual_seed(1)
            results.append(m(*arguments, need_weights=need_weights)[0])
        torch.testing.assert_close(*results)


@pytest.mark.usefixtures("some_kernels")
def test_errors_are_torchs():
    ours, theirs = pair()
    q, k, v = inputs()
    for arguments, keywords in (
        ((q[..., :3], k, v), {}),
        ((q, k, v[:2]), {}),
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"attn_mask": torch.zeros(2, 2)}),
        ((q[0, 0], k, v), {}),
    ):
        assert_same_error(ours, theirs, *arguments, **keywords)
    ours(q, k, v)


@pytest.mark.usefixtures("some_kernels")
def test_module():
    """N2: signature, RNG order, keys, repr; copies, pickles, accelerate and restore, hooks, scripts."""
    made = []
    for kind in (nn.MultiheadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(3)
        made.append(kind(16, 4))
    ours, theirs = made
    assert isinstance(ours, torch.nn.MultiheadAttention) and repr(ours) == repr(theirs)
    a, b = (inspect.signature(m.forward).parameters.values() for m in made)
    assert [(p.name, p.default) for p in a] == [(p.name, p.default) for p in b]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    model = torch.nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True)
    expected = model(x := torch.randn(2, 5, 16), x)
    assert type(nnfast.accelerate(model).self_attn) is type(model.multihead_attn) is nn.MultiheadAttention
    assert "MultiheadAttention" in str(nnfast.report(model))
    seen = []
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        m.self_attn.register_forward_hook(lambda *_: seen.append("hook"))
        with served("linear", "scaled_dot_product_attention"):
            torch.testing.assert_close(m(x, x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert len(seen) == 3 and type(nnfast.restore(model).self_attn) is torch.nn.MultiheadAttention
    torch.testing.assert_close(model(x, x), expected)
    torch.testing.assert_close(torch.jit.script(ours)(*inputs())[0].shape, torch.Size((5, 3, 16)))


@pytest.mark.usefixtures("cpu_kernels")
def test_inference_takes_torchs_fast_path():
    """To the bit, and no op of ours is called."""
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True).eval()
    ours = nnfast.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), left_to_torch("linear"):
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.self_attn(x, x, x)[0], theirs.self_attn(x, x, x)[0])
    with served("linear", "scaled_dot_product_attention"):
        ours(x)


@pytest.mark.usefixtures("some_kernels")
def test_the_function():
    """F.multi_head_attention_forward stays torch's own, for whoever calls it; and a subclass of Tensor gets it."""
    assert F.multi_head_attention_forward is torch.nn.functional.multi_head_attention_forward

    calls = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    ours, _ = pair()
    q, k, v = inputs()
    ours(q.detach().as_subclass(Seen), k, v)
    assert torch.nn.functional.multi_head_attention_forward in calls
    ours(q, k, v)
