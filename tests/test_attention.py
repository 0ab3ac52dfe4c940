"""Scaled dot product attention: values, gradients, masks, layouts, dtypes. S1 and S2 are the contract's rows."""

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as TF
from common import FLOAT_AND_HALF as DTYPES
from common import assert_close, double, is_error, left_to_torch, outcome, rms, run, served, threads, thresholds
from torch.nn.attention import SDPBackend, sdpa_kernel

import nnfast.nn.functional as F
from nnfast import reference

NAMES = ("output", "query", "key", "value")
FORWARD, BACKWARD = "scaled_dot_product_attention", "scaled_dot_product_attention_backward"

# (batch, heads, heads of keys, queries, keys, size, size of values): below, at and over a register, a tile and a block,
# odd, fewer and more keys than queries, groups of heads.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 8, 8),
    (1, 2, 2, 64, 64, 64, 64),
    (1, 2, 2, 65, 63, 16, 16),
    (1, 1, 1, 128, 200, 17, 17),
    (2, 1, 1, 150, 70, 33, 33),
    (1, 4, 2, 67, 67, 24, 24),
    (1, 6, 1, 3, 130, 40, 40),
    (1, 2, 2, 30, 40, 20, 12),
    (1, 1, 1, 70, 70, 9, 130),
    (1, 1, 1, 1, 300, 64, 64),
]


def randn(*size, dtype=torch.float32):
    return torch.randn(size, dtype=torch.float64).to(dtype)


def sample_inputs(shape, dtype):
    batch, heads, kv_heads, queries, keys, size, value_size = shape
    sizes = (batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size)
    qkv = [randn(*s, dtype=dtype).requires_grad_() for s in sizes]
    return qkv, randn(*sizes[0][:3], value_size, dtype=dtype), {"enable_gqa": True} if kv_heads != heads else {}


def masks(shape, dtype):
    """Masks of every kind, shape and stride; some queries see no key."""
    batch, heads, _, queries, keys, *_ = shape
    seen = torch.rand(batch, heads, queries, keys) < 0.6
    seen[..., queries // 2, :] = False
    bias = randn(batch, heads, queries, keys, dtype=dtype)
    yield "boolean", seen
    yield "boolean, queries by keys", seen[0, 0]
    yield "boolean, keys alone", seen[:, :1, :1]
    yield "of one column", seen[:, :, :, :1]
    yield "of three dimensions", seen[0]
    yield "added", bias
    yield "added, minus infinity", bias.masked_fill(~seen, -math.inf)
    yield "added in float", bias.float()[:1]
    yield "added, transposed", bias.transpose(-2, -1).contiguous().transpose(-2, -1)


def sizes(qkv, grad_out, scale=None, **_):
    """How large the terms of each result are. A score's gradient is p (dp - delta), where the two may cancel."""
    q, k, v, g = (t.detach().double() for t in (*qkv, grad_out))
    q_size, k_size, v_size, g_size = (t.abs().max().item() for t in (q, k, v, g))
    group = q.shape[1] // k.shape[1]
    scores = (g @ v.repeat_interleave(group, 1).transpose(-2, -1)).abs().max().item()
    scores *= q.shape[-1] ** -0.5 if scale is None else abs(scale)
    return dict(zip(NAMES, (v_size, scores * k_size, scores * q_size, g_size), strict=True))


def compare(qkv, grad_out, what, **kwargs):
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    with served(FORWARD, BACKWARD):
        ours = run(F.scaled_dot_product_attention, qkv, grad_out, **kwargs)
    torchs = run(TF.scaled_dot_product_attention, qkv, grad_out, **kwargs)
    true = run(reference.scaled_dot_product_attention, [double(t) for t in qkv], grad_out.double(), **exact)
    assert ours[0].stride() == torchs[0].stride(), what
    for (name, size), a, b, c in zip(sizes(qkv, grad_out, **kwargs).items(), ours, torchs, true, strict=True):
        assert_close(a, b, c, f"{what}: {name}", size)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    """S1: against float64, over sizes and dtypes, causal or not, with any scale."""
    qkv, grad_out, gqa = sample_inputs(shape, dtype)
    for causal, scale in ((False, None), (True, None), (True, 0.3), (False, -0.2), (False, 0.0)):
        for count in (0, 1 << 40):  # by heads, and by blocks
            with thresholds(attention__head_bytes=count):
                compare(qkv, grad_out, f"causal {causal}, scale {scale}", is_causal=causal, scale=scale, **gqa)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] * s[4] > 30], ids=str)
def test_masks(shape, dtype):
    """S1: boolean and added ones, as they lie and broadcast, queries that see no key."""
    qkv, grad_out, gqa = sample_inputs(shape, dtype)
    for name, mask in masks(shape, dtype):
        compare(qkv, grad_out, name, attn_mask=mask, **gqa)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_that_hide_whole_blocks_or_none(dtype):
    """S1: the causal order as a mask, padding, and one key that one query of a block does not see."""
    q, k, v, g = (randn(2, 3, 200, 24, dtype=dtype) for _ in range(4))
    causal, all_but_one = torch.ones(200, 200, dtype=torch.bool).tril(), torch.ones(200, 200, dtype=torch.bool)
    all_but_one[70, 150] = False
    padding = (torch.arange(200) < torch.tensor([[200], [131]])).view(2, 1, 1, 200)
    for name, mask in {
        "causal": causal,
        "padding": padding,
        "both": causal & padding,
        "all but one": all_but_one,
        "all but one, its columns apart": all_but_one.repeat_interleave(2, 1)[:, ::2],
        "all": torch.ones(1, 1, dtype=torch.bool),
    }.items():
        compare([t.requires_grad_() for t in (q, k, v)], g, name, attn_mask=mask)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    """S1: heads within rows as models have them, gaps, odd offsets, strides of zero."""
    q, k, v, g = (randn(2, 3, 70, 20, dtype=dtype) for _ in range(4))

    def packed(t):  # one of three, side by side
        wide = t.new_empty(2, 70, 3, 3, 20)
        wide[:, :, 1] = t.transpose(1, 2)
        return wide[:, :, 1].transpose(1, 2)

    def odd(t):
        wide = t.new_empty(2, 3, 70, 23)
        wide[..., 1:21] = t
        return wide[..., 1:21]

    def offset(t):
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    ways = {
        "heads within rows": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": packed,
        "odd rows": odd,
        "offset": offset,
        "turned": lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1),
        "rows expanded": lambda t: t[:, :, :1].expand_as(t),
        "heads expanded": lambda t: t[:, :1].expand_as(t),
        "elements expanded": lambda t: t[..., :1].expand_as(t),
    }
    for name, way in ways.items():
        qkv = [way(t).detach().requires_grad_() for t in (q, k, v)]
        compare(qkv, g, name, is_causal=True)
        compare([t.detach().requires_grad_() for t in (q, k, v)], way(g), f"gradient {name}")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_no_less_accurate_than_torch(dtype, size):
    """S2: over many values, and with logits in the hundreds."""
    q, k, v, g = (randn(2, 4, 300, 64, dtype=dtype) for _ in range(4))
    q, k, v = (t.requires_grad_() for t in (q * size, k * size, v))
    true = run(reference.scaled_dot_product_attention, [double(t) for t in (q, k, v)], g.double(), is_causal=True)
    with served(FORWARD, BACKWARD):
        ours = run(F.scaled_dot_product_attention, (q, k, v), g, is_causal=True)
    torchs = run(TF.scaled_dot_product_attention, (q, k, v), g, is_causal=True)
    for name, a, b, c in zip(NAMES, ours, torchs, true, strict=True):
        # Both are samples of a rounding error: a twentieth more is not worse.
        assert rms(a.double() - c) <= 1.05 * rms(b.double() - c), name


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 200, 150, 32, 32), (3, 1, 1, 140, 140, 16, 16)], ids=str)
def test_gradients_repeat_to_the_bit(shape, dtype):
    """S2: for any number of threads, and whichever way the backward goes."""
    qkv, grad_out, gqa = sample_inputs(shape, dtype)
    results = []
    for count, room in itertools.product((1, 2, 3, 5), (0, 1 << 40)):
        way = "attention.backward_by_heads" if count == 1 and room else FORWARD
        numbers = {"attention__thread_multiply_adds": 1, "attention__head_bytes": room}
        with threads(count), thresholds(**numbers), served(BACKWARD, way):
            results.append(run(F.scaled_dot_product_attention, qkv, grad_out, is_causal=True, **gqa))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("cpu_kernels")
def test_nan_and_infinity_stay_in_their_row():
    for bad in (math.nan, math.inf):
        q, k, v = (randn(1, 1, 70, 16) for _ in range(3))
        q[0, 0, 33, 2] = bad
        with served(FORWARD):
            ours = F.scaled_dot_product_attention(q, k, v)
        torchs = TF.scaled_dot_product_attention(q, k, v)
        assert torch.equal(ours.isnan(), torchs.isnan()) and ours.isnan().any(-1).sum() == 1


@pytest.mark.usefixtures("cpu_kernels")
def test_only_the_gradients_that_are_wanted():
    for wanted, room in itertools.product(itertools.product((True, False), repeat=3), (0, 1 << 40)):
        if not any(wanted):
            continue
        qkv, grad_out, _ = sample_inputs((1, 2, 2, 70, 70, 16, 16), torch.float32)
        every = run(F.scaled_dot_product_attention, qkv, grad_out)
        some = [t.detach().requires_grad_(w) for t, w in zip(qkv, wanted, strict=True)]
        with thresholds(attention__head_bytes=room), served(BACKWARD):
            got = run(F.scaled_dot_product_attention, some, grad_out)
        kept = [every[0], *(g for g, w in zip(every[1:], wanted, strict=True) if w)]
        assert all(torch.equal(a, b) for a, b in zip(got, kept, strict=True))


@pytest.mark.usefixtures("cpu_kernels")
def test_second_derivative():
    """The formula's, where torch's fused kernel has none; of some of the three too."""
    masks = (False, None), (True, None), (False, torch.rand(5, 6) < 0.5), (False, torch.randn(5, 6))
    for (causal, mask), frozen in itertools.product(masks, (None, 0, 1, 2)):
        qkv, grad_out, gqa = sample_inputs((1, 4, 2, 5, 6, 3, 4), torch.float32)
        if frozen is not None:
            qkv[frozen].requires_grad_(False)
        results = []
        for f, args in (
            (F.scaled_dot_product_attention, qkv),
            (reference.scaled_dot_product_attention, [double(t) for t in qkv]),
        ):
            output = f(*args, attn_mask=mask, is_causal=causal, **gqa)
            wanted = [t for t in args if t.requires_grad]
            first = torch.autograd.grad(output, wanted, grad_out.to(output.dtype), create_graph=True)
            results.append(torch.autograd.grad(sum(t.square().sum() for t in first), wanted))
        torch.testing.assert_close([t.double() for t in results[0]], list(results[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("cpu_kernels")
def test_autocast():
    """As torch lists it: in bfloat16, the mask too."""
    qkv, grad_out, _ = sample_inputs((2, 3, 3, 40, 40, 16, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (None, torch.randn(40, 40), torch.rand(40, 40) < 0.5):
            with served(FORWARD, BACKWARD):
                ours = run(F.scaled_dot_product_attention, qkv, grad_out.bfloat16(), attn_mask=mask)
            torchs = run(TF.scaled_dot_product_attention, qkv, grad_out.bfloat16(), attn_mask=mask)
            for a, b in zip(ours, torchs, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=2e-2, atol=3e-2)


@pytest.mark.torch_serves("the user forbids ours")
def test_backends_that_the_user_forbids():
    qkv, _, _ = sample_inputs((1, 2, 2, 8, 8, 8, 8), torch.float32)
    for backends in ([SDPBackend.MATH], [SDPBackend.EFFICIENT_ATTENTION]):
        with sdpa_kernel(backends):
            ours, torchs = (
                outcome(lambda f=f: f(*qkv).grad_fn.name())
                for f in (F.scaled_dot_product_attention, TF.scaled_dot_product_attention)
            )
        assert ours == torchs


@pytest.mark.usefixtures("cpu_kernels")
def test_backend_that_the_user_asks_for():
    qkv, _, _ = sample_inputs((1, 2, 2, 8, 8, 8, 8), torch.float32)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), served(FORWARD):
        F.scaled_dot_product_attention(*qkv)


def torchs_calls():
    t = randn(2, 4, 5, 8)
    yield "dropout", (t, t, t), {"dropout_p": 0.5}
    yield "float64", (t.double(),) * 3, {}
    yield "three dimensions", (t[0],) * 3, {}
    yield "five dimensions", (torch.stack([t, -t, 2 * t]),) * 3, {}
    yield "no keys", (t, t[:, :, :0], t[:, :, :0]), {}
    yield "no queries", (t[:, :, :0], t, t), {}
    yield "heads broadcast", (t, t[:, :1], t[:, :1]), {}
    yield "a mask and causal", (t, t, t), {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True}
    yield "a mask with a gradient", (t, t, t), {"attn_mask": torch.zeros(5, 5, requires_grad=True)}
    yield "mixed dtypes", (t, t.double(), t), {}
    yield "heads that do not divide", (t, t[:, :3], t[:, :3]), {"enable_gqa": True}
    yield "heads that differ", (t, t[:, :2], t[:, :2]), {}
    yield "sizes that differ", (t, t[..., :4], t), {}
    yield "a mask of one dimension", (t, t, t), {"attn_mask": torch.zeros(5)}
    yield "a mask that does not fit", (t, t, t), {"attn_mask": torch.zeros(4, 5)}
    yield "a mask of another dtype", (t, t, t), {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}
    yield "integers", (t.long(),) * 3, {}
    yield "no tensor", (t, t, None), {}
    yield "scale of another type", (t, t, t), {"scale": "a"}


@pytest.mark.parametrize("name, args, kwargs", list(torchs_calls()), ids=[c[0] for c in torchs_calls()])
@pytest.mark.torch_serves("calls that ours does not cover, and bad input")
def test_what_is_torchs(name, args, kwargs):
    """S1: calls that ours does not cover, and torch's errors."""
    found = []
    for f in (F.scaled_dot_product_attention, TF.scaled_dot_product_attention):
        torch.manual_seed(0)
        found.append(outcome(f, *args, **kwargs))
    if any(map(is_error, found)):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(found[0], found[1])
        assert found[0].stride() == found[1].stride()


@pytest.mark.usefixtures("cpu_kernels")
def test_saved_tensors_are_guarded():
    qkv, _, _ = sample_inputs((1, 1, 1, 8, 8, 8, 8), torch.float32)
    for i in range(4):
        args = [t.detach().requires_grad_() * 1 for t in qkv]
        output = F.scaled_dot_product_attention(*args)
        total = output.sum()
        with torch.no_grad():
            (output if i == 3 else args[i]).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    op = torch.ops.nnfast.scaled_dot_product_attention.default
    for shape, mask, causal in (
        ((2, 3, 3, 5, 7, 8, 8), None, False),
        ((1, 4, 2, 70, 66, 8, 6), None, True),
        ((1, 2, 2, 5, 7, 8, 8), torch.rand(5, 7) < 0.5, False),
    ):
        qkv, _, _ = sample_inputs(shape, torch.float32)
        torch.library.opcheck(op, (*qkv, mask, causal))
        turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in qkv]
        torch.library.opcheck(op, (*turned, mask, causal))


@pytest.mark.usefixtures("cpu_kernels")
def test_checkpointing_and_threads():
    qkv, grad_out, _ = sample_inputs((1, 2, 2, 70, 70, 16, 16), torch.float32)
    plain = run(F.scaled_dot_product_attention, qkv, grad_out)
    again = torch.utils.checkpoint.checkpoint(F.scaled_dot_product_attention, *qkv, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], torch.autograd.grad(again, qkv, grad_out), strict=True))


def test_transforms_see_torchs_op():
    q = randn(3, 2, 4, 5, 8)
    batched = torch.vmap(F.scaled_dot_product_attention)(q, q, q)
    torch.testing.assert_close(batched, torch.stack([TF.scaled_dot_product_attention(t, t, t) for t in q]))
    with contextlib.suppress(NotImplementedError):
        torch.func.grad(lambda t: F.scaled_dot_product_attention(t, t, t).sum())(q[0])


@pytest.mark.usefixtures("cpu_kernels")
def test_a_boolean_mask_may_change_after_the_call():
    """S1: for the next layer say, or be made in inference mode: torch keeps numbers that it makes of it."""
    (q, k, v), grad_out, _ = sample_inputs((2, 3, 3, 9, 9, 8, 8), torch.float32)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = run(TF.scaled_dot_product_attention, (q, k, v), grad_out, attn_mask=mask)
    with torch.inference_mode():
        inference = mask.clone()
    for given in (mask.clone(), mask.clone().expand(2, 3, 9, 9), inference):
        with served(FORWARD, BACKWARD):
            output = F.scaled_dot_product_attention(q, k, v, given)
            if not given.is_inference():
                given[..., :1].fill_(False)
            grads = torch.autograd.grad(output, (q, k, v), grad_out)
        for a, b in zip((output, *grads), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("sizes, mask", [((24, 16), None), ((24, 24), (3, 9, 9))], ids=["sizes", "mask"])
def test_what_torch_makes_up_of_several_ops_saves_no_argument(sizes, mask):
    """S1: query, key, mask and output may then be changed in place before the backward."""
    results = []
    for function in (F.scaled_dot_product_attention, TF.scaled_dot_product_attention):
        torch.manual_seed(0)
        q, k = (torch.randn(2, 3, 9, sizes[0], requires_grad=True) for _ in range(2))
        v = torch.randn(2, 3, 9, sizes[1], requires_grad=True)
        bias = None if mask is None else torch.randn(mask)
        given = q * 1, k * 1
        with served(FORWARD, BACKWARD, when=function is F.scaled_dot_product_attention):
            output = function(*given, v, bias)
            with torch.no_grad():
                for t in filter(lambda t: t is not None, (*given, bias)):
                    t.mul_(3)
            loss = output.mul_(2).square().sum()
            plain = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
        first = torch.autograd.grad(loss, (q, k, v), create_graph=True)
        results.append([*plain, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))])
    for a, b in zip(*results, strict=True):
        assert rms(a - b) < 1e-5 * rms(b)


@pytest.mark.usefixtures("some_kernels")
def test_one_query_is_torchs():
    """In float32, without a gradient: torch is faster there. Not under autocast, whose products are of 16 bits."""
    for queries, grad, lowered in itertools.product((1, 2, 3), (False, True), (False, True)):
        q, k, v = randn(1, 2, queries, 8).requires_grad_(grad), randn(1, 2, 40, 8), randn(1, 2, 40, 8)
        expected = left_to_torch if queries < 3 and not grad and not lowered else served
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered), expected(FORWARD):
            F.scaled_dot_product_attention(q, k, v)
