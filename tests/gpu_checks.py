"""What the Triton kernels in Triton's interpreter (interpreted.py) and the CUDA kernels on a CPU (emulated.py) are both
asked. Each file brings its sizes, chosen for its kernels' tiles and chunks."""

import itertools
from collections.abc import Callable

import torch
from common import assert_close, layouts
from test_adamw import exact, train
from test_layer_norm import compare as compare_layer_norm
from test_linear_gelu import compare as compare_linear_gelu

import nnfast.nn.functional as F
import nnfast.optim as optim

ADAMW_OPTIONS = [{}, {"amsgrad": True, "weight_decay": 0.3}, {"maximize": True, "betas": (0.0, 0.9), "lr": 0.1}]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def of_several_dtypes(sizes, dtypes):
    """A tensor of each size, in the dtypes by turns."""
    return [randn(*size, dtype=dtype) for size, dtype in zip(sizes, itertools.cycle(dtypes), strict=False)]


def check_nan_stays_in_its_row(size: int) -> None:
    """Of LayerNorm: NaN and infinity; a row without variance is finite."""
    x = torch.randn(5, size)
    x[1, 3], x[3, 4], x[4] = float("nan"), float("inf"), 2.5
    x.requires_grad_()
    output = F.layer_norm(x, (size,))
    (grad,) = torch.autograd.grad(output, x, torch.randn(5, size))
    for row, ok in enumerate((True, False, True, False, True)):
        assert output[row].isfinite().all() == ok and grad[row].isfinite().all() == ok


def check_only_what_is_wanted(size: int) -> None:
    """Of LayerNorm: one or two of the gradients of input, weight and bias."""
    for mask in itertools.product((True, False), repeat=3):
        if sum(mask) in (1, 2):
            tensors = [randn(*s).requires_grad_(m) for s, m in zip(((4, size), (size,), (size,)), mask, strict=True)]
            compare_layer_norm((tensors[0], (size,), *tensors[1:], 1e-5), torch.randn(4, size), str(mask))


def check_empty() -> None:
    """No rows: the gradients of weight and bias are zeros."""
    x = torch.empty(0, 5, requires_grad=True)
    for call, sizes in ((lambda w, b: F.layer_norm(x, (5,), w, b), [(5,), (5,)]),
                        (lambda w, b: F.linear_gelu(x, w, b), [(3, 5), (3,)])):  # fmt: skip
        weight, bias = (randn(*size).requires_grad_() for size in sizes)
        grads = torch.autograd.grad(call(weight, bias).sum(), (x, weight, bias))
        assert grads[0].shape == (0, 5) and grads[1].eq(0).all() and grads[2].eq(0).all()


def check_linear_gelu_layouts() -> None:
    """Strides and offsets of input, gradient and weight."""
    weight, bias = (randn(*s, dtype=torch.float16).requires_grad_() for s in ((16, 24), (16,)))
    x, g = randn(3, 4, 24, dtype=torch.float16), randn(3, 4, 16, dtype=torch.float16)
    for name, input in layouts(x).items():
        compare_linear_gelu((input.detach().requires_grad_(), weight, bias, "none"), g, name)
    x.requires_grad_()
    for name, grad in layouts(g).items():
        compare_linear_gelu((x, weight, bias, "none"), grad, f"gradient {name}")
    for name, w in layouts(weight.detach()).items():
        compare_linear_gelu((x, w.detach().requires_grad_(), bias, "tanh"), g, f"weight {name}")


def check_adamw(sizes, dtypes, options, steps: int) -> None:
    """One launch for all sizes and dtypes of a group."""
    params, *grads = (of_several_dtypes(sizes, dtypes) for _ in range(1 + steps))
    ours, optimizer = train(optim.AdamW, params, grads, **options)
    torchs, _ = train(torch.optim.AdamW, params, grads, **{"fused": True, **options})
    for p, q, true in zip(ours, torchs, exact(params, grads, **options), strict=True):
        assert_close(p, q, true, f"{p.dtype} {tuple(p.shape)}")
    assert all(optimizer.state[p]["step"] == steps for p in ours)


def check_adamw_on_the_device(sizes, amsgrad: bool, found: float) -> None:
    """Counts, lr, grad_scale and found_inf that are on the GPU, where the caller has seen to it that they count so."""
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        lists = [[torch.rand(s) for s in sizes] for _ in range(4)]
        top = [v.clone() for v in lists[3]] if amsgrad else []
        steps = [torch.tensor(float(t)) for t in (3, 4, 9)]
        options = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
        scale, inf, lr = torch.tensor(4.0), torch.tensor(found), torch.tensor(0.1)
        if fused:
            for step in steps:
                step += 1
            torch._fused_adamw_(*lists, top, steps, lr=0.1, amsgrad=amsgrad, grad_scale=scale, found_inf=inf, **options)
            for step in steps:
                step -= found
        else:
            torch.ops.nnfast.adamw_(
                *lists, top, [], steps, lr=0.0, tensor_lr=lr, grad_scale=scale, found_inf=inf, **options
            )
        results.append((lists, top, steps))
    torch.testing.assert_close(*results)


def check_clipping(sizes, dtypes, rtol: float, in_another_order: Callable[[int], None] = lambda time: None) -> None:
    """Norm and factor in one launch, to the bit the same every time; the scaling in another. ``rtol``: of the norm.
    ``in_another_order`` is called before each of three times."""
    grads = of_several_dtypes(sizes, dtypes)
    grads.append(torch.randn(400)[5:365].to(dtypes[0]))
    true = torch.cat([g.double().flatten() for g in grads]).norm()
    promoted = torch.float32 if len(dtypes) > 1 else dtypes[0]
    for max_norm, scale in ((1.0, None), (1e9, None), (2.0, 8.0)):
        wanted = true / (scale or 1)
        found = []
        for time in range(3):
            in_another_order(time)
            given = None if scale is None else torch.tensor(scale)
            found.append(torch.ops.nnfast.clip_coef(grads, max_norm, given))
        (norm, coef), *others = found
        assert norm.dtype is promoted and all(torch.equal(norm, n) and torch.equal(coef, c) for n, c in others)
        torch.testing.assert_close(norm, wanted.to(promoted), rtol=2 * torch.finfo(promoted).eps, atol=0)
        torch.testing.assert_close(coef, (max_norm / (wanted + 1e-6)).clamp(max=1).float(), rtol=1e-6, atol=0)
        scaled = [g.clone() for g in grads]
        torch.ops.nnfast.scale_by_(scaled, coef)
        for g, s in zip(grads, scaled, strict=True):
            assert torch.equal(s, (g.float() * coef).to(g.dtype))
    torch.testing.assert_close(torch.ops.nnfast.total_norm(grads, 2.0), true, rtol=rtol, atol=0)
    grads[3][0] = float("nan")
    norm, coef = torch.ops.nnfast.clip_coef(grads, 1.0)
    assert norm.isnan() and coef.isnan()
