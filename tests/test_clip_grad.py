"""clip_grad_norm_, get_total_norm, clip_grads_with_norm_: O2. Beside torch's, and against float64."""

import functools
import inspect
import itertools
import math

import pytest
import torch
from common import DTYPES, assert_same_error, is_error, outcome, served, threads, thresholds
from torch.nn.utils import clip_grad_norm_ as torchs_clip

import nnfast.nn as nn
from nnfast.backend import native
from nnfast.nn import utils

pytestmark = pytest.mark.usefixtures("some_kernels")

SIZES = [(0,), (1,), (15,), (17,), (), (5, 13), (64, 64), (70000,)]


def torchs(case):
    return pytest.param(case, marks=pytest.mark.torch_serves("a norm, or a layout, that ours does not cover"))


def leaves(dtype, sizes=SIZES, scale=1.0):
    params = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    for p in params:
        p.grad = (scale * torch.randn(p.shape, dtype=torch.float64)).to(dtype)
    return params


def twin(params):
    others = [p.detach().clone().requires_grad_() for p in params]
    for p, q in zip(params, others, strict=True):
        q.grad = None if p.grad is None else p.grad.clone(memory_format=torch.preserve_format)
    return others


@pytest.mark.parametrize("norm_type", [2, 2.0, "inf", float("inf"), *map(torchs, [1.0, 3.0, 0.0])])
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, max_norm, norm_type):
    sizes = SIZES if norm_type not in ("inf", float("inf")) else SIZES[1:]
    params = leaves(dtype, sizes)
    others, before = twin(params), [p.grad.clone() for p in params]
    versions = [p.grad._version for p in params]
    ours = norm_type in (2, "inf", float("inf"))
    with served("total_norm", when=ours):
        norm = utils.clip_grad_norm_(params, max_norm, norm_type)
    torchs = torchs_clip(others, max_norm, norm_type)
    assert (norm.dtype, norm.shape, norm.device, norm.requires_grad) == (
        torchs.dtype, torchs.shape, torchs.device, False,
    )  # fmt: skip
    flat = torch.cat([g.flatten() for g in before]).double()
    true = torch.linalg.vector_norm(flat, float(norm_type))
    if norm_type == 2:  # so exact that it judges float64 too
        true = torch.tensor(math.sqrt(math.fsum(flat.square().tolist())), dtype=torch.float64)
    unit = torch.finfo(dtype).eps
    assert abs(norm.double() - true) <= abs(torchs.double() - true) + unit / 2 * true
    coef = min(1.0, max_norm / (true + 1e-6))
    for p, q, g in zip(params, others, before, strict=True):
        if coef == 1 and ours:
            assert torch.equal(p.grad, g)
        torch.testing.assert_close(p.grad, q.grad, rtol=8 * unit, atol=unit)
        if ours:
            tiny = torch.finfo(dtype).tiny
            torch.testing.assert_close(p.grad.double(), g.double() * coef, rtol=max(unit, 1e-14), atol=tiny)
    if ours and coef == 1:
        assert [p.grad._version for p in params] == versions, "nothing is multiplied where nothing is clipped"
    if ours and coef < 1:
        assert all(p.grad._version == v + 1 for p, v in zip(params, versions, strict=True))


def test_the_two_halves():
    params = leaves(torch.float32)
    others = twin(params)
    with served("total_norm", "scale_"):
        norm = utils.get_total_norm([p.grad for p in params])
        assert utils.clip_grads_with_norm_(params, 0.5, norm) is None
    torchs = torch.nn.utils.get_total_norm([p.grad for p in others])
    torch.nn.utils.clip_grads_with_norm_(others, 0.5, torchs)
    torch.testing.assert_close(norm, torchs)
    torch.testing.assert_close([p.grad for p in params], [p.grad for p in others])


def test_repeats_for_any_number_of_threads():
    params = leaves(torch.float32, [(1_000_003,), (77, 1001)])
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found.append(native.total_norm([p.grad for p in params], 2.0)[1].item())
    assert len({*found}) == 1


def test_accurate():
    """Summed in double: a float sum of this many would be off in the fourth digit."""
    g = torch.full((20_000_000,), 0.1)
    true = g[0].double() * g.numel() ** 0.5
    assert abs(native.total_norm([g], 2.0)[1] - true) <= 1e-12 * true


LAYOUTS = {
    "gaps": lambda: torch.randn(8, 12)[:, ::2],
    "transposed": lambda: torch.randn(6, 8).t(),
    "expanded": lambda: torch.randn(1, 6).expand(8, 6),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "misaligned": lambda: torch.randn(51)[3:].view(8, 6),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "complex": lambda: torch.randn(4, dtype=torch.complex64),
}


@pytest.mark.parametrize(
    "layout", [torchs(name) if name in ("gaps", "expanded", "sparse", "complex") else name for name in LAYOUTS]
)
@pytest.mark.parametrize("call", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_layouts(layout, call):
    def clipped(clip):
        torch.manual_seed(2)
        g = LAYOUTS[layout]()
        p = torch.zeros(g.shape, dtype=g.dtype, requires_grad=True)
        other = torch.zeros(3, requires_grad=True)
        p.grad, other.grad = g, torch.ones(3)
        return clip([p, other], 0.5, **call), p.grad, other.grad

    results = [outcome(clipped, clip) for clip in (utils.clip_grad_norm_, torchs_clip)]
    if any(map(is_error, results)):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)


def test_other_python_threads_may_run_meanwhile():
    """What takes long gives Python's lock back, and holds its tensors itself: nobody else may."""
    params = leaves(torch.float32, [(5,), (64, 64)])
    others = twin(params)
    for p, q in zip(params, others, strict=True):
        (p * 1).sum().backward(inputs=[p])
        q.grad = p.grad.clone()
    with thresholds(release_gil_elements=1), served("without_gil", "total_norm", "scale_"):
        norm = utils.clip_grad_norm_(params, 0.1)
    torch.testing.assert_close(norm, torchs_clip(others, 0.1))
    torch.testing.assert_close([p.grad for p in params], [p.grad for p in others])


@pytest.mark.torch_serves("no memory, or nothing to take the norm of")
def test_foreach_goes_on_to_torch():
    meta = [torch.ones(3, device="meta")]
    for foreach in (None, False, True):
        ours, torchs = (
            outcome(lambda norm=norm, foreach=foreach: norm(meta, foreach=foreach).shape)
            for norm in (utils.get_total_norm, torch.nn.utils.get_total_norm)
        )
        assert ours == torchs


def test_what_may_be_given():
    """A tensor, a list, a generator, nothing; gradients that are not there; mixed dtypes."""
    p, q = leaves(torch.float32, [(5,), (6,)])
    for given in (p, [p, q], (p, q), {p: 1}.keys()):
        a, b = (clip(given, 1e9) for clip in (utils.clip_grad_norm_, torchs_clip))
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(utils.clip_grad_norm_((t for t in [p, q]), 1e9), torchs_clip([p, q], 1e9))
    for empty in ([], [torch.zeros(2, requires_grad=True)]):
        a, b = (clip(empty, 1.0) for clip in (utils.clip_grad_norm_, torchs_clip))
        assert a.dtype == b.dtype and a == b == 0
    with pytest.warns(UserWarning, match="empty generator"):
        utils.clip_grad_norm_((t for t in []), 1.0)
    for dtypes in itertools.permutations(DTYPES, 2):
        mixed = leaves(dtypes[0], [(20,)]) + leaves(dtypes[1], [(30,)])
        others = twin(mixed)
        a, b = utils.clip_grad_norm_(mixed, 0.1), torchs_clip(others, 0.1)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)
        torch.testing.assert_close([p.grad for p in mixed], [p.grad for p in others], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_nonfinite(value, norm_type):
    def clipped(clip, strict):
        torch.manual_seed(0)
        (p,) = leaves(torch.float32, [(100,)])
        p.grad[37] = value
        return clip([p], 1.0, norm_type, error_if_nonfinite=strict), p.grad

    ours, torchs = (functools.partial(clipped, clip) for clip in (utils.clip_grad_norm_, torchs_clip))
    torch.testing.assert_close(ours(strict=False), torchs(strict=False), equal_nan=True)
    assert_same_error(ours, torchs, strict=True)


def test_large_and_small():
    """Where the sum of squares leaves float's range, torch's norm is infinite or zero, and ours is right."""
    for size in (1e30, 1e-30):
        p = torch.zeros(100, requires_grad=True)
        p.grad = torch.full((100,), size)
        assert abs(utils.get_total_norm([p.grad]).double() / (10 * size) - 1) < 1e-6


@pytest.mark.torch_serves("nothing is computed")
def test_names():
    """Everything of torch.nn.utils, and the same signatures."""
    assert nn.utils is utils and {*dir(torch.nn.utils)} <= {*dir(utils)}
    for name in torch.nn.utils.__all__:
        ours, torchs = getattr(utils, name), getattr(torch.nn.utils, name)
        if name in ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"):
            assert ours is not torchs and inspect.signature(ours) == inspect.signature(torchs)
        else:
            assert ours is torchs
    import nnfast.nn.utils.parametrize

    assert nnfast.nn.utils.parametrize is torch.nn.utils.parametrize
    from nnfast.nn.utils.clip_grad import clip_grad_value_

    assert clip_grad_value_ is torch.nn.utils.clip_grad_value_


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    tensors = [torch.randn(5), torch.randn(3, 4)]
    for op in (torch.ops.nnfast.total_norm.default, torch.ops.nnfast.scale_.default):
        torch.library.opcheck(op, (tensors, 2.0), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.torch_serves("tensors without memory, which nothing of ours computes with")
def test_shapes_of_the_ops():
    """The shapes and dtypes that a tracer sees, of a GPU's two ops as well."""
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.bfloat16,)):
        tensors = [torch.empty(3, 4, dtype=dtype, device="meta") for dtype in dtypes]
        norm = torch.ops.nnfast.total_norm(tensors, 2.0)
        assert norm.shape == () and norm.dtype == torch.float64 and norm.device.type == "meta"
        norm, coef = torch.ops.nnfast.clip_coef(tensors, 1.0)
        expected = torch.float32 if len(dtypes) > 1 else dtypes[0]
        assert norm.shape == coef.shape == () and norm.dtype == expected and coef.dtype == torch.float32
        before = [t._version for t in tensors]
        torch.ops.nnfast.scale_(tensors, 2.0)
        torch.ops.nnfast.scale_by_(tensors, coef)
        assert [t._version for t in tensors] == [version + 2 for version in before]
        leaf = torch.empty(3, device="meta", requires_grad=True)
        for scale in (lambda leaf=leaf: torch.ops.nnfast.scale_([leaf], 2.0),
                      lambda leaf=leaf, coef=coef: torch.ops.nnfast.scale_by_([leaf], coef)):  # fmt: skip
            with pytest.raises(RuntimeError, match="in-place"):
                scale()
    for op in (torch.ops.nnfast.total_norm, torch.ops.nnfast.clip_coef):
        with pytest.raises(RuntimeError, match="empty list"):
            op([], 2.0)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_gradient_twice():
    """O2: it is scaled twice, as torch does, and not by two threads at once."""
    results = []
    for clip in (utils.clip_grad_norm_, torchs_clip):
        p = torch.nn.Parameter(torch.zeros(50000))
        p.grad = torch.linspace(-1, 1, 50000)
        with served("scale_", "step.in_order", when=clip is utils.clip_grad_norm_):
            clip([p, p], 1.0)
        results.append(p.grad)
    torch.testing.assert_close(*results)
