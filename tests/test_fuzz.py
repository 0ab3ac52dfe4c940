"""Random cases of the ops against float64: shapes with 0 and 1, any strides and offsets of every argument, masks,
options, threads, and every number that chooses an internal path.

`make test` runs a slice that is the same each time; `make fuzz` runs 20,000 new cases an op (conftest.py).
"""

import collections
import contextlib
import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as TF
from common import DTYPES, FLOAT_AND_HALF, HALF, assert_close, double, threads, thresholds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import sizes as attention_sizes
from test_linear_gelu import torchs_linear_gelu

import nnfast.nn
import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import reference
from nnfast._torch import one_dnn_has
from nnfast.backend import native

SIZES = st.one_of(st.integers(0, 5), st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 257]))
FEW = st.sampled_from([1, 2, 3, 0, 4, 5])
SEEDS = st.integers(0, 2**31)
# Which of three arguments want a gradient, and whether any is taken at all.
WANTED = st.sampled_from([m for m in itertools.product([True, False], repeat=3) for _ in range(1 + 3 * all(m))])
GRAD_MODE = st.sampled_from([True] * 5 + [False])


@st.composite
def layouts(draw, shape, gaps=True, overlap=True):
    """A function that makes a tensor of `shape` from values: dimensions in any order, apart, expanded, at an offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) if gaps else 1 for _ in shape]
    expanded = [overlap and draw(st.sampled_from([False] * 7 + [True])) for _ in shape]
    offset = draw(st.integers(0, 7))
    sizes = [1 if e else s * k for s, k, e in zip(shape, steps, expanded, strict=True)]

    def make(dtype, scale=1.0, shift=0.0):
        flat = torch.full((offset + torch.Size(sizes).numel(),), float("nan"), dtype=dtype)
        t = flat[offset:].view([sizes[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
        t = t[tuple(slice(None, None, 1 if e else k) for k, e in zip(steps, expanded, strict=True))]
        t.copy_(torch.randn(t.shape, dtype=torch.float64) * scale + shift)
        return t.expand(shape)

    return make


@pytest.fixture(scope="module")
def bar(request):
    """One more case done: a progress bar, where there are many to do."""
    if settings.default.max_examples < 1000:
        yield lambda name: None
        return
    from rich.progress import MofNCompleteColumn, Progress

    tasks, capture = {}, request.config.pluginmanager.getplugin("capturemanager")
    with (
        capture.global_and_fixture_disabled(),
        Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress,
    ):

        def one_more(name):
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=settings.default.max_examples)
            progress.advance(tasks[name])

        yield one_more


# Taken by no case here, but by a test of its own: test_adamw.py::test_master_weights, ::test_stochastic_rounding,
# test_embedding.py, test_linear_gelu.py, test_optimizers.py::test_parameters_that_share_memory.
ELSEWHERE = {
    "adamw_.master", "adamw_.stochastic", "step.in_order", "embedding", "embedding.into_memory",
    "linear_backward.gelu_worked_ahead", "gelu_backward.found_ahead",  # a GPU's
}  # fmt: skip

# How many cases took each op and internal path.
cases = collections.Counter()


@contextlib.contextmanager
def settings_of_a_case(draw):
    """Any number of threads, and numbers that choose a path so low that a small case crosses them, or as they are."""
    # One draw for all of it: drawn one by one, some hardly ever come together.
    dice = random.Random(draw(SEEDS))
    drawn = {}
    if native and dice.random() < 0.7:
        for name in sorted(native.thresholds()):
            low = {"memory.huge_page": [4096, 4096, 8192], "product.gemm_16_bits": [0, 2, 2]}
            low = low.get(name, [1, 1, 1, 64, 1000])
            if (value := dice.choice([None, *low])) is not None:
                drawn[name] = value
    before, count = native.paths() if native else {}, torch.get_num_threads()
    with threads(dice.choice([count, count, 1, 2, 3])), thresholds(**drawn):
        yield
    if native:
        cases.update(name for name, count in native.paths().items() if count > before[name])


def same(ours, directly):
    """Autograd's gradients are what the backward op gives when it is called directly."""
    for a, b in zip(ours, directly, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a.nan_to_num(), b.nan_to_num()))


def outcome(function, leaves, grad_mode, grad_layout):
    """Output, then a gradient or None for each leaf; or the error; or None where the backward alone raises."""
    with contextlib.nullcontext() if grad_mode else torch.no_grad():
        try:
            output = function()
        except Exception as e:
            return type(e), str(e)
    if not output.requires_grad:
        return [output] + [None] * len(leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    try:
        grads = torch.autograd.grad(output, wanted, grad_layout(output))
    except RuntimeError:
        return None
    grads = dict(zip(map(id, wanted), grads, strict=True))
    return [output] + [grads.get(id(t)) for t in leaves]


def strides(t):
    """The strides of the dimensions of more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


def check(ours, torchs, exact, scales):
    if isinstance(torchs, tuple):
        assert ours == torchs
        return
    if torchs is None:  # such as bfloat16 with a float bias and no weight
        return
    assert ours[0].requires_grad == torchs[0].requires_grad and strides(ours[0]) == strides(torchs[0])
    for i, (a, b, true, scale) in enumerate(zip(ours, torchs, exact, scales, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, true, f"result {i}", scale=scale())


def largest(t):
    return t.abs().max().item() if t.numel() else 0.0


def rows(t, ndim=1):
    """All dimensions but the last `ndim` as one."""
    return t.unsqueeze(0).flatten(0, -1 - ndim)


def walk(count):
    """How many roundings of the whole a sum of so many terms may be off, where a library adds one after another.

    After i of n terms of one sign, for which it is worst, the sum is i/n of the whole. The addition's rounding u has a
    deviation of u / sqrt(3) times that, and their squares add up: u / sqrt(3) sqrt(sum of (i/n)^2) = u sqrt(n) / 3.
    """
    return max(1.0, count**0.5 / 3)


def like(grad, dtype):
    """The gradient for an output: the drawn one, in the output's dtype or in float64."""
    return lambda output: grad.to(output.dtype) if output.dtype != dtype else grad


@given(data=st.data())
def test_layer_norm(data, bar):
    """L3 .. L6, L9."""
    with settings_of_a_case(data.draw):
        layer_norm_case(data.draw)
    bar("layer_norm")


def layer_norm_case(draw):
    outer, inner = draw(st.lists(FEW, max_size=3)), draw(st.lists(SIZES, min_size=1, max_size=2))
    if len(inner) > 1:
        inner[0] = min(inner[0], 8)
    shape, dtype = (*outer, *inner), draw(st.sampled_from(DTYPES))
    affine_dtype = draw(st.sampled_from([dtype, dtype, torch.float32]))
    make_x, make_g = draw(layouts(shape)), draw(layouts(shape))
    make_w, make_b = (draw(st.none() | layouts(inner)) for _ in range(2))
    eps, shift = draw(st.sampled_from([1e-5, 1e-5, 1e-12, 0.1])), draw(st.sampled_from([0.0, 0.0, 3.0, -50.0]))
    if dtype == torch.float16:  # torch keeps 1 / std in the input's dtype: with 1e-12 it overflows, and gives NaN
        eps = max(eps, 1e-5)
    mask, grad_mode = draw(WANTED), draw(GRAD_MODE)
    torch.manual_seed(draw(SEEDS))
    x, g = make_x(dtype, shift=shift), make_g(dtype)
    w, b = (None if m is None else m(affine_dtype) for m in (make_w, make_b))
    leaves = [None if t is None else t.requires_grad_(m) for t, m in zip((x, w, b), mask, strict=True)]
    true = [double(t) for t in leaves]

    def call(function, x, w, b):
        return lambda: function(x, inner, w, b, eps)

    results = [
        outcome(call(f, *ts), ts, grad_mode, like(g, dtype))
        for f, ts in ((F.layer_norm, leaves), (TF.layer_norm, leaves), (reference.layer_norm, true))
    ]
    # The size of the terms, in units of the precision that they are summed in.
    summed_in = dtype if dtype == torch.float64 else torch.float32
    finer, finer_affine = (torch.finfo(summed_in).eps / torch.finfo(d).eps for d in (dtype, affine_dtype))
    dims = tuple(range(-len(inner), 0))
    with torch.no_grad():
        x64, g64, w64 = double(x), g.double(), 1.0 if w is None else w.double()
        centred = x64 - x64.mean(dims, keepdim=True)
        rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
        reach = x64.abs().amax(dims, keepdim=True) * rstd if x64.numel() else x64  # of x and mean, before they cancel
        each = (g64 * w64).abs()
        mean = each.mean(dims, keepdim=True) if x64.numel() else each
    scales = [
        lambda: finer * largest(reach * w64),
        lambda: finer * largest((each + mean * (1 + reach * reach)) * rstd),
        lambda: finer_affine * largest(rows((g64 * reach).abs(), len(inner)).sum(0)),
        lambda: finer_affine * largest(rows(g64.abs(), len(inner)).sum(0)),
    ]
    check(*results, scales)
    grads = results[0][1:] if results[0] else ()  # none where the call is refused
    if any(t is not None for t in grads) and native and native.layer_norm(x, inner, w, b, eps) is not None:
        with torch.no_grad():
            output, stats = torch.ops.nnfast.layer_norm(x, inner, w, b, eps)
            stats = draw(layouts(tuple(stats.shape), overlap=False))(stats.dtype).copy_(stats)
            wanted = [t is not None for t in grads]
            same(grads, torch.ops.nnfast.layer_norm_backward(like(g, dtype)(output), x, inner, stats, w, b, wanted))


@given(data=st.data())
def test_linear_gelu(data, bar):
    """G1, G6, and GELU alone."""
    with settings_of_a_case(data.draw):
        linear_gelu_case(data.draw)
    bar("linear_gelu")


def linear_gelu_case(draw):
    outer, n, k = draw(st.lists(FEW, max_size=3) | st.just([300])), draw(SIZES), draw(SIZES)
    dtype, approximate = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["none", "tanh"]))
    make_x, make_w, make_g = draw(layouts((*outer, k))), draw(layouts((n, k))), draw(layouts((*outer, n)))
    make_b = draw(st.one_of(layouts((n,)), layouts((n,)), st.none()))
    mask, grad_mode = draw(WANTED), draw(GRAD_MODE)
    scale = draw(st.sampled_from([1.0, 0.1, 3.0]))
    torch.manual_seed(draw(SEEDS))
    x, w, g = make_x(dtype, scale), make_w(dtype), make_g(dtype)
    b = None if make_b is None else make_b(dtype)
    leaves = [None if t is None else t.requires_grad_(m) for t, m in zip((x, w, b), mask, strict=True)]
    true = [double(t) for t in leaves]

    results = [
        outcome(lambda f=f, ts=ts: f(*ts, approximate), ts, grad_mode, like(g, dtype))
        for f, ts in ((F.linear_gelu, leaves), (torchs_linear_gelu, leaves), (reference.linear_gelu, true))
    ]
    # The size of the terms: of the product, whose rounding the GELU and its derivative carry on.
    with torch.no_grad():
        x64, w64, b64 = x.double().abs(), w.double().abs(), 0.0 if b is None else b.double().abs()
        pre = x64 @ w64.T + b64
        d = rows(g.double().abs() * (1 + pre))
    scales = [
        lambda: largest(pre) * walk(k),
        lambda: largest(d @ w64) * walk(n),
        lambda: largest(d.T @ rows(x64)) * walk(len(d)),
        lambda: largest(d.sum(0)),
    ]
    check(*results, scales)
    grads = results[0][1:] if results[0] else ()  # none where the call is refused
    if any(t is not None for t in grads) and native and native.linear_gelu(x, w, b, approximate) is not None:
        with torch.no_grad():
            output, pre = torch.ops.nnfast.linear_gelu(x, w, b, approximate=approximate)
            pre = draw(layouts(tuple(pre.shape), overlap=False))(pre.dtype).copy_(pre)
            mask = [t is not None for t in grads]
            grad_pre, sums = torch.ops.nnfast.gelu_backward_sum(like(g, dtype)(output), pre, approximate=approximate)
            found = torch.ops.nnfast.linear_backward(grad_pre, x, w, [*mask[:2], False])
            check([results[0][0], *found[:2], sums if mask[2] else None], *results[1:], scales)
            if dtype in HALF:
                # As under autocast, where gradients are wanted in float32.
                asked = {"dtype": torch.float32, "input_dtype": torch.float32}
                wide = torch.ops.nnfast.linear_backward(grad_pre, x, w, mask, **asked)
                assert all(t is None or t.dtype is torch.float32 for t in wide)
                wide = [None if t is None else t.to(dtype) for t in wide]
                check([results[0][0], *wide], *results[1:], scales)
    results = [
        outcome(lambda f=f, ts=ts: f(*ts), ts, grad_mode, like(g, dtype))
        for f, ts in ((F.linear, leaves), (TF.linear, leaves), (TF.linear, true))
    ]
    check(*results, scales)
    results = [
        outcome(lambda f=f, t=t: f(t, approximate=approximate), [t], grad_mode, lambda output: torch.ones_like(output))
        for f, t in (
            (F.gelu, leaves[0]),
            (TF.gelu, leaves[0]),
            (lambda t, approximate: reference.gelu(t, approximate), true[0]),
        )
    ]
    check(*results, [lambda: largest(x64), lambda: 1 + largest(x64)])


@given(data=st.data())
def test_adamw(data, bar):
    """A5 .. A8: one step from any state, which shows every rounding."""
    with settings_of_a_case(data.draw):
        adamw_case(data.draw)
    bar("adamw")


def adamw_case(draw):
    dtype = draw(st.sampled_from(DTYPES))
    options = {
        "lr": draw(st.sampled_from([1e-3, 0.1, 0.0])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.01, 0.0, 0.5])),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }
    shapes = draw(st.lists(st.lists(SIZES, max_size=2).map(tuple), min_size=1, max_size=4))
    makers = [(draw(layouts(s, gaps=draw(st.booleans()), overlap=False)), draw(layouts(s))) for s in shapes]
    missing = [draw(st.sampled_from([False] * 5 + [True])) for _ in shapes]
    draw_step = draw(st.integers(0, 2))
    steps = [draw(st.sampled_from([0, 1, 9, 999])) for _ in shapes]
    # The state as it lies after a step, or anyhow, as after a checkpoint of another layout.
    lying = [draw(st.none() | st.none() | layouts(s, overlap=False)) for s in shapes]
    torch.manual_seed(draw(SEEDS))
    values = [(make_p(dtype), make_g(dtype)) for make_p, make_g in makers]
    moments = [
        [torch.randn(s).to(dtype), *(torch.rand(s).add(0.01).to(dtype) for _ in range(1 + options["amsgrad"]))]
        for s in shapes
    ]
    results = []
    # torch's fused code misreads state whose strides are not the parameter's.
    right = dtype != torch.float64 and not any(lying)
    for kind, fused in ((optim.AdamW, None), (torch.optim.AdamW, right)):
        params = []
        for (p, g), absent in zip(values, missing, strict=True):
            q = torch.empty_strided(p.size(), p.stride(), dtype=dtype).copy_(p).requires_grad_()
            q.grad = None if absent else g.clone()
            params.append(q)
        optimizer = kind(params, **options, fused=fused)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for q, state, step, lie in zip(params, moments, steps, lying, strict=True):
            made = [lie(dtype) if lie else torch.zeros_like(q) for _ in state]
            kept = {n: m.copy_(t) for n, m, t in zip(names, made, state, strict=False)}
            optimizer.state[q] = {"step": torch.full((3,), float(step))[draw_step], **kept}
        optimizer.step()
        results.append([[q, *optimizer.state[q].values()] for q in params])
    for i, (ours, torchs) in enumerate(zip(*results, strict=True)):
        assert ours[1] == torchs[1] == steps[i] + (not missing[i])
        p, g, state = *values[i], moments[i]
        if missing[i]:
            assert all(torch.equal(a, b) for a, b in zip((ours[0], *ours[2:]), (p, *state), strict=True))
            continue
        m, v, top = [t.double() for t in state] + [None] * (not options["amsgrad"])
        true = reference.adamw(
            p.double(), g.double(), m, v, top, steps[i] + 1, lr=options["lr"], beta1=options["betas"][0],
            beta2=options["betas"][1], weight_decay=options["weight_decay"], eps=options["eps"],
            maximize=options["maximize"],
        )  # fmt: skip
        # The size of the terms, in units of the precision of the arithmetic: the moving average's two; some eight
        # roundings that lead to the update (assert_close allows two of one); and the least that the dtype can tell.
        beta1, beta2 = options["betas"]
        finer = 1.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        average = m.abs() + g.double().abs()
        deviation = true[2 + options["amsgrad"]].sqrt() / (1 - beta2 ** (steps[i] + 1)) ** 0.5 + options["eps"]
        update = options["lr"] / (1 - beta1 ** (steps[i] + 1)) * average / deviation
        terms = [
            largest(p.double()) + 4 * largest(update),
            largest(average),
            *(2 * largest(t) for t in true[2:] if t is not None),
        ]
        scales = [largest(t) + finer * extra + torch.finfo(dtype).tiny for t, extra in zip(true, terms, strict=False)]
        for a, b, t, scale in zip((ours[0], *ours[2:]), (torchs[0], *torchs[2:]), true, scales, strict=False):
            assert_close(a, b, t, scale=scale)


@given(data=st.data())
def test_cross_entropy(data, bar):
    """C1, C2: of logits, and of what a linear layer makes them of."""
    with settings_of_a_case(data.draw):
        cross_entropy_case(data.draw)
    bar("cross_entropy")


def cross_entropy_case(draw):
    n, c = draw(st.integers(1, 5) | st.just(70)), draw(SIZES.filter(bool) | st.just(2100))
    planes = draw(st.sampled_from([(), (), (2,), (3, 2)]))  # classes last in memory, or torch's
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1.0, 4.0, 30.0]))
    keywords = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.2])),
        "ignore_index": draw(st.sampled_from([-100, 0])),
    }
    make_x, turned = draw(layouts((n, *planes, c))), draw(st.booleans())
    make_w = draw(st.none() | layouts((c,)))
    make_target = draw(layouts((n, *planes)))
    make_g = draw(layouts((n, *planes) if keywords["reduction"] == "none" else ()))
    alone, grad_mode = draw(st.booleans()), draw(GRAD_MODE)
    torch.manual_seed(draw(SEEDS))
    x = make_x(dtype, scale).movedim(-1, 1) if turned or not planes else make_x(dtype, scale).reshape(n, c, *planes)
    x, g = x.requires_grad_(), make_g(dtype)
    target = (make_target(torch.float32).abs() * 1e4).long() % c
    if make_w:
        keywords["weight"] = make_w(dtype).abs() + 0.1

    def in_dtype_of(t):
        return {k: v.to(t.dtype) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}

    def call(function, x):
        # Logits that nobody else reads may become their gradient.
        return lambda: function(x * 1 if alone else x, target, **in_dtype_of(x))

    true = double(x)
    results = [
        outcome(call(f, t), [t], grad_mode, like(g, dtype))
        for f, t in ((F.cross_entropy, x), (TF.cross_entropy, x), (reference.cross_entropy, true))
    ]
    with torch.no_grad():
        reach, terms = largest(true), cross_entropy_terms(keywords, target, g, c)
    check(*results, [lambda: reach * terms[0], lambda: (1 + reach) * terms[1]])

    if planes:
        return
    h = draw(SIZES.filter(bool))
    makers = draw(layouts((n, h))), draw(layouts((c, h))), draw(st.none() | layouts((c,)))
    mask = draw(WANTED)
    leaves = [m and m(dtype).requires_grad_(wanted) for m, wanted in zip(makers, mask, strict=True)]
    true = [double(t) for t in leaves]

    def two_calls(function, *leaves):
        return function(TF.linear(*leaves), target, **in_dtype_of(leaves[0]))

    def ours(x, w, b):
        return F.linear_cross_entropy(x, w, target, linear_bias=b, **keywords)

    results = [
        outcome(lambda f=f, ts=ts: f(*ts), ts, grad_mode, like(g, dtype))
        for f, ts in (
            (ours, leaves),
            (functools.partial(two_calls, TF.cross_entropy), leaves),
            (functools.partial(two_calls, reference.cross_entropy), true),
        )
    ]
    with torch.no_grad():
        x64, w64 = (t.detach().abs() for t in true[:2])
        reach = largest(x64 @ w64.T + (0.0 if true[2] is None else true[2].abs())) * walk(h)
        each = (1 + reach) * terms[1]
    scales = [
        lambda: reach * terms[0],
        lambda: each * largest(w64.sum(0)) * walk(c),
        lambda: each * largest(x64.sum(0)) * walk(n),
        lambda: each * n * walk(n),
    ]
    check(*results, scales)


def cross_entropy_terms(keywords, target, g, classes):
    """How many times a row's loss the loss may be, and how large a gradient of the logits may be."""
    weight = keywords.get("weight", torch.ones(1)).double()
    counts = target != keywords["ignore_index"]
    all_weights = (weight.expand(max(int(target.max()) + 1, len(weight)))[target] * counts).sum().item()
    total = (all_weights or 1.0) if keywords["reduction"] == "mean" else 1.0
    losses = 1 if keywords["reduction"] == "none" else target.numel()
    # A smoothed target's loss is a sum over all classes.
    smoothed = walk(classes) if keywords["label_smoothing"] else 1.0
    return losses * largest(weight) / total * smoothed, largest(weight) * largest(g.double()) / total


@given(data=st.data())
def test_attention(data, bar):
    """S1."""
    with settings_of_a_case(data.draw):
        attention_case(data.draw)
    bar("attention")


def attention_case(draw):
    length = st.sampled_from([1, 2, 3, 5, 17, 33, 64, 65, 70, 130])
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    queries, keys, size = draw(length), draw(length), draw(st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64]))
    value_size = draw(st.just(size) | st.sampled_from([1, 9, 40]))
    dtype = draw(st.sampled_from(FLOAT_AND_HALF))
    shapes = (queries, size), (keys, size), (keys, value_size), (queries, value_size)
    heads = kv_heads * group, kv_heads, kv_heads, kv_heads * group
    makers = [draw(layouts((batch, h, *shape))) for h, shape in zip(heads, shapes, strict=True)]
    keywords = {"enable_gqa": True} if group > 1 else {}
    kind = draw(st.sampled_from(["none", "causal", "boolean", "added", "float"]))
    sizes = [1 if draw(st.sampled_from([False] * 4 + [True])) else s for s in (batch, heads[0], queries, keys)]
    make_mask = draw(layouts(sizes[draw(st.integers(0, 2)) :]))
    keywords["scale"] = draw(st.sampled_from([None, None, 0.3, -0.2]))
    mask, grad_mode = draw(WANTED), draw(GRAD_MODE)
    torch.manual_seed(draw(SEEDS))
    *leaves, g = (make(dtype) for make in makers)
    for t, wanted in zip(leaves, mask, strict=True):
        t.requires_grad_(wanted)
    true = [double(t) for t in leaves]
    exact = dict(keywords)
    if kind == "causal":
        keywords["is_causal"] = exact["is_causal"] = True
    elif kind == "boolean":
        keywords["attn_mask"] = exact["attn_mask"] = make_mask(torch.float32) < 0.5
    elif kind != "none":
        keywords["attn_mask"] = make_mask(torch.float32 if kind == "float" else dtype)
        exact["attn_mask"] = keywords["attn_mask"].double()
    results = [
        outcome(lambda f=f, ts=ts, ks=ks: f(*ts, **ks), ts, grad_mode, like(g, dtype))
        for f, ts, ks in (
            (F.scaled_dot_product_attention, leaves, keywords),
            (TF.scaled_dot_product_attention, leaves, keywords),
            (reference.scaled_dot_product_attention, true, exact),
        )
    ]
    # A key's and a value's gradients are sums over the queries that see it.
    with torch.no_grad():
        seen = torch.eye(keys, dtype=torch.float64).expand(batch, kv_heads, keys, keys)
        seen = reference.scaled_dot_product_attention(*true[:2], seen, **exact).sum(2).unflatten(1, (kv_heads, group))
        seen = max(1.0, largest(seen.sum(2)))
    # A score's gradient is the difference of two sums over a value's elements, which may cancel in each too.
    of_query = attention_sizes([t.detach().abs() for t in leaves], g.abs(), keywords["scale"]).values()
    check(*results, [lambda v=v * n: v for v, n in zip(of_query, (1, 1, seen, seen), strict=True)])


@given(data=st.data())
def test_optimizers(data, bar):
    """O1: two steps of Adam, SGD and RMSprop from the start, beside torch's loops; and O2, the norm before them."""
    with settings_of_a_case(data.draw):
        optimizers_case(data.draw)
    bar("optimizers")


OPTIONS_OF = {
    "Adam": {"weight_decay": [0.0, 0.3], "amsgrad": [False, True], "maximize": [False, True], "eps": [1e-3]},
    "SGD": {"momentum": [0.0, 0.9], "weight_decay": [0.0, 0.3], "nesterov": [False, True], "maximize": [False, True]},
    "RMSprop": {
        "momentum": [0.0, 0.9], "weight_decay": [0.0, 0.3], "centered": [False, True], "maximize": [False, True],
        "eps": [1e-3], "alpha": [0.9],
    },
}  # fmt: skip


def optimizers_case(draw):
    name, dtype = draw(st.sampled_from(sorted(OPTIONS_OF))), draw(st.sampled_from(DTYPES))
    options = {"lr": 0.1, **{k: draw(st.sampled_from(values)) for k, values in OPTIONS_OF[name].items()}}
    if not options.get("momentum"):
        options.pop("nesterov", None)
    shapes = draw(st.lists(st.lists(SIZES, max_size=2).map(tuple), min_size=1, max_size=4))
    makers = [(draw(layouts(s, gaps=draw(st.booleans()), overlap=False)), draw(layouts(s))) for s in shapes]
    missing = [draw(st.sampled_from([False] * 5 + [True])) for _ in shapes]
    max_norm, norm_type = draw(st.sampled_from([0.5, 1e6])), draw(st.sampled_from([2.0, 2.0, float("inf"), 3.0]))
    torch.manual_seed(draw(SEEDS))
    values = [(make_p(dtype), make_g(dtype)) for make_p, make_g in makers]

    def made(kind, dtype, **more):
        params = []
        for (p, g), absent in zip(values, missing, strict=True):
            q = torch.empty_strided(p.size(), p.stride(), dtype=dtype).copy_(p).requires_grad_()
            q.grad = None if absent else g.clone().to(dtype)
            params.append(q)
        return params, kind(params, **options, **more)

    torchs = getattr(torch.optim, name)
    # Ours; torch's loop, which in 16 bits rounds on the way; and that loop in float64.
    results = [
        made(kind, d, **more)
        for kind, d, more in (
            (getattr(optim, name), dtype, {}),
            (torchs, dtype, {"foreach": False}),
            (torchs, torch.float64, {"foreach": False}),
        )
    ]
    for _, optimizer in results:
        optimizer.step()
        optimizer.step()
    for p, q, true in zip(*(params for params, _ in results), strict=True):
        states = [list(o.state[t].items()) for (_, o), t in zip(results, (p, q, true), strict=True)]
        assert [k for k, _ in states[0]] == [k for k, _ in states[1]]
        # The size of a step's terms: the parameter, its decay, and a gradient of a few times lr.
        size = largest(true.detach()) + (largest(true.grad) if true.grad is not None and name == "SGD" else 1.0)
        assert_close(p, q, true, name, scale=2 * size)
        for (key, a), (_, b), (_, t) in zip(*states, strict=True):
            if a is not None:
                # torch's first buffer of momentum lies as the gradient, ours as the parameter, as all other state does.
                like = torch.empty_like(p) if key == "momentum_buffer" and name == "SGD" else b
                assert (a.dtype, strides(a)) == (b.dtype, strides(like)), key
                assert_close(a, b, t.double(), key, scale=2 * size)

    params, _ = made(torchs, dtype)
    others, _ = made(torchs, dtype)
    grads = [p.grad for p in params if p.grad is not None]
    if norm_type == float("inf") and not all(g.numel() for g in grads):
        return
    true = [g.double() for g in grads]
    norm = nnfast.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    theirs = torch.nn.utils.clip_grad_norm_(others, max_norm, norm_type)
    exact = torch.linalg.vector_norm(torch.cat([g.flatten() for g in true]), norm_type) if true else torch.zeros(())
    assert_close(norm, theirs, exact.double())
    coef = min(1.0, max_norm / (exact.item() + 1e-6))
    for p, q, t in zip(grads, (q.grad for q in others if q.grad is not None), true, strict=True):
        assert_close(p, q, t * coef)


def test_every_path_was_taken():
    """By 50 of 20,000 cases, and by one of the suite's."""
    if not native or not native.cpu_kernels() or not cases:
        pytest.skip("nothing of ours was called")
    assert settings.default.max_examples >= 200
    enough = max(1, settings.default.max_examples * 50 // 20000)
    # Without bfloat16 on the CPU, oneDNN writes into no memory of ours.
    elsewhere = ELSEWHERE | ({"product.into_memory"} if not one_dnn_has(torch.bfloat16) else set())
    rare = {name: cases[name] for name in native.paths() if name not in elsewhere and cases[name] < enough}
    assert not rare, rare
