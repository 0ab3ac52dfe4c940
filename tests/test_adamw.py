"""AdamW: values, state, checkpoints, hooks. A1 .. A11 are the rows of the contract (tests/README.md)."""

import contextlib
import copy
import inspect
import io
import itertools
import pickle
import sys
import warnings

import pytest
import torch
from common import DTYPES, HALF, assert_close, assert_same_error, available_memory, rms, run_script, served, threads

import nnfast.optim as optim
from nnfast import reference
from nnfast.optim import adamw

# One register and its neighbours, a block of four and one over, and nothing at the start, middle and end.
SIZES = [(0,), (1,), (15,), (16,), (17,), (67,), (), (3, 0, 2), (5, 13), (64, 64), (40000,), (0, 4)]

OPTIONS = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.0},
    {"amsgrad": True, "maximize": True, "lr": 0.02},
    {"fused": True},
]


def sample_inputs(dtype, sizes=SIZES, steps=4):
    """Parameters, and for each step a gradient for each."""
    params = [torch.randn(s, dtype=torch.float64).to(dtype) for s in sizes]
    grads = [[torch.randn(s, dtype=torch.float64).to(dtype) for s in sizes] for _ in range(steps)]
    return params, grads


def train(optimizer_class, params, grads, **options):
    params = [p.clone().requires_grad_() for p in params]
    optimizer = optimizer_class(params, **options)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    return params, optimizer


def exact(params, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False, **_):
    """The same in float64, from the formula."""
    result = []
    for i, p in enumerate(params):
        p, m = p.double(), torch.zeros(p.shape, dtype=torch.float64)
        v, top = m, m if amsgrad else None
        for t, step in enumerate(grads, 1):
            p, m, v, top = reference.adamw(
                p, step[i].double(), m, v, top, t, lr=lr, beta1=betas[0], beta2=betas[1],
                weight_decay=weight_decay, eps=eps, maximize=maximize,
            )  # fmt: skip
        result.append(p)
    return result


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, options):
    """A6, A7: against float64 and beside torch's, over sizes and options."""
    params, grads = sample_inputs(dtype)
    ours, optimizer = train(optim.AdamW, params, grads, **options)
    torchs, theirs = train(torch.optim.AdamW, params, grads, **{"fused": dtype is not torch.float64, **options})
    for p, q, true in zip(ours, torchs, exact(params, grads, **options), strict=True):
        assert_close(p, q, true, f"{tuple(p.shape)}")
    unit = torch.finfo(dtype).eps
    for p, q in zip(ours, torchs, strict=True):
        a, b = optimizer.state[p], theirs.state[q]
        assert list(a) == list(b) and a["step"] == b["step"] == 4 and a["step"].dtype == b["step"].dtype
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=8 * unit, atol=8 * unit)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_accurate_than_torch(dtype):
    params, grads = sample_inputs(dtype, [(100000,)], steps=10)
    (true,) = exact(params, grads, lr=0.01)
    (ours,), _ = train(optim.AdamW, params, grads, lr=0.01)
    for kwargs in ({}, {"foreach": True}, {"fused": True}):
        (torchs,), _ = train(torch.optim.AdamW, params, grads, lr=0.01, **kwargs)
        assert rms(ours.double() - true) <= 1.05 * rms(torchs.double() - true), kwargs


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", HALF)
def test_every_element_is_updated(dtype):
    """A8: sizes around the register width in 16 bits (torch's own kernel once skipped whole blocks)."""
    for size in (*range(1, 70), 127, 129, 131, 259):
        param = torch.ones(size, dtype=dtype, requires_grad=True)
        param.grad = torch.ones(size, dtype=dtype)
        optim.AdamW([param], lr=0.5).step()
        assert (param == param[0]).all() and param[0] < 0.75


@pytest.mark.usefixtures("cpu_kernels")
def test_layouts():
    """A8: parameters that are not contiguous, gradients with other strides, misaligned views of one buffer."""
    base = torch.randn(8, 6)
    variants = {
        "transposed parameter": (base.t().contiguous().t(), base),
        "transposed gradient": (base.clone(), base.t().contiguous().t()),
        "channels last": (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5)),
        "expanded gradient": (base.clone(), torch.randn(1, 1).expand(8, 6)),
        "misaligned": (torch.randn(200)[3:51].view(8, 6), torch.randn(200)[5:53].view(8, 6)),
        "gradient with gaps": (base.clone(), torch.randn(8, 12)[:, ::2]),
    }
    for name, (param, grad) in variants.items():
        results = []
        for kind in (optim.AdamW, torch.optim.AdamW):
            p = param.detach().clone(memory_format=torch.preserve_format) if name != "misaligned" else param.detach()
            q = p if name != "misaligned" else param.clone()
            q = q.requires_grad_()
            q.grad = grad.clone(memory_format=torch.preserve_format) if name != "expanded gradient" else grad.clone()
            optimizer = kind([q], lr=0.1)
            optimizer.step()
            optimizer.step()
            assert optimizer.state[q]["exp_avg"].stride() == q.stride()
            results.append(q.detach())
        torch.testing.assert_close(*results, msg=name)


@pytest.mark.usefixtures("some_kernels")
def test_parameters_with_gaps_are_torchs():
    """A8: the kernels want a parameter without gaps; torch serves the others, and only they."""
    holder = torch.randn(8, 12)
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        p, q = holder.clone()[:, ::2].requires_grad_(), torch.ones(4, requires_grad=True)
        p.grad, q.grad = torch.ones(8, 6), torch.ones(4)
        optimizer = kind([p, q], lr=0.1)
        with served("adamw_", when=kind is optim.AdamW):
            optimizer.step()
        results.append((p.detach(), q.detach()))
    torch.testing.assert_close(*results)


FAILING_STEP = """
import resource, torch, nnfast.optim as optim
def run(kind, fail):
    torch.manual_seed(0)
    params = [torch.randn(64, requires_grad=True), torch.randn(2048, 2048).requires_grad_()]
    optimizer = kind([{"params": [p]} for p in params], lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    params[1].grad = params[1].grad.t()
    steps = [float(optimizer.state[p]["step"]) for p in params]
    before = [t.clone() for p in params for t in (p, *optimizer.state[p].values())]
    if fail:
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20), -1))
        try:
            optimizer.step()
            raise AssertionError("nothing failed")
        except RuntimeError as error:
            assert "allocate" in str(error), error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        after = [t for p in params for t in (p, *optimizer.state[p].values())]
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    optimizer.step()
    return params
from nnfast.backend import native
ours, torchs = run(optim.AdamW, True), run(torch.optim.AdamW, False)
torch.testing.assert_close(ours, torchs)
assert native.paths()["adamw_"] == 4
"""


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory as Linux counts it")
@pytest.mark.served_in_children
def test_an_allocation_that_fails_changes_nothing():
    """A11: the second group's gradient is to be reordered, and there is no memory for it; then there is."""
    run_script(FAILING_STEP)


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    def lists(n):
        return [[torch.rand(3, 4) for _ in range(n)] for _ in range(4)]

    kwargs = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
    for amsgrad, n in itertools.product((True, False), (1, 3)):
        top = [torch.rand(3, 4) for _ in range(n)] if amsgrad else []
        args = (*lists(n), top, [], [torch.tensor(2.0) for _ in range(n)])
        torch.library.opcheck(
            torch.ops.nnfast.adamw_.default, args, kwargs, test_utils=("test_schema", "test_faketensor")
        )
        tensor_lr = {**kwargs, "lr": 0.0, "tensor_lr": torch.tensor(0.1, dtype=torch.float64)}
        torch.library.opcheck(
            torch.ops.nnfast.adamw_.default, args, tensor_lr, test_utils=("test_schema", "test_faketensor")
        )
        both = [copy.deepcopy(args) for _ in range(2)]
        torch.ops.nnfast.adamw_.default(*both[0], **kwargs)
        torch.ops.nnfast.adamw_.default(*both[1], **tensor_lr)
        torch.testing.assert_close(*both, rtol=0, atol=0)
        assert not torch.equal(both[0][0][0], args[0][0]) and both[1][6][0] == 3


@pytest.mark.torch_serves("nothing is computed")
def test_constructor_errors_are_torchs():
    """A1: type and text, whether the constructor raises or warns."""
    # Imported here, for it needs expecttest, which a machine with a GPU may lack.
    from torch.testing._internal.common_optimizers import optim_error_inputs_func_adamw

    for error in optim_error_inputs_func_adamw("cpu", torch.float32):
        given, said = error.optimizer_error_input, []
        for kind in (optim.AdamW, torch.optim.AdamW):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    kind(copy.copy(given.params), **given.kwargs)
                    raised = None
                except Exception as e:
                    raised = type(e), str(e)
            said.append((raised, [(w.category, str(w.message)) for w in caught]))
        assert said[0] == said[1] != (None, []), given.desc
    with pytest.raises(TypeError):
        optim.AdamW(torch.randn(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.AdamW([])
    p = torch.zeros(2, requires_grad=True)
    with pytest.warns(UserWarning, match="duplicate"):
        optim.AdamW([p, p])


def test_sparse_gradient_is_refused_before_anything_changes():
    """A7, A11: torch's error, with every parameter as it was, in the groups before it too."""
    good, bad = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = optim.AdamW([{"params": [good]}, {"params": [bad]}])
    good.grad, bad.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before, steps = good.detach().clone(), optimizer.state[good]["step"].item()
    bad.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(good, before) and optimizer.state[good]["step"].item() == steps


def broken_shapes(optimizer, p):
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][key] = torch.zeros(7)


def tensor_lr_with_foreach(optimizer, p):
    optimizer.param_groups[1].update(lr=torch.tensor(0.1), foreach=True)


def no_betas(optimizer, p):
    del optimizer.param_groups[1]["betas"]


def sparse_gradient(optimizer, p):
    p.grad = torch.ones(3).to_sparse()


@pytest.mark.parametrize("spoil", [broken_shapes, tensor_lr_with_foreach, no_betas, sparse_gradient])
def test_nothing_is_half_done(spoil):
    """A11: a fault in the second group is torch's error, and the first group is as it was."""

    def spoiled(kind):
        good, bad = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        good.grad, bad.grad = torch.ones(3), torch.ones(3)
        optimizer = kind([{"params": [good]}, {"params": [bad]}], lr=0.1)
        optimizer.step()
        spoil(optimizer, bad)
        return optimizer

    def values(optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return [*params, *([*optimizer.state[p].values()] for p in params)]

    ours, theirs = spoiled(optim.AdamW), spoiled(torch.optim.AdamW)
    before = copy.deepcopy(values(ours))
    assert_same_error(ours.step, theirs.step)
    torch.testing.assert_close(values(ours), before, rtol=0, atol=0)


def test_bad_checkpoints_change_nothing():
    """A3, A11: truncated or foreign, torch's error, and the optimizer as it was."""
    params, grads = sample_inputs(torch.float32, [(4,), (2, 3)], steps=2)
    good = train(optim.AdamW, params, grads)[1].state_dict()
    groups = good["param_groups"]
    bad = {
        "nothing": {},
        "no groups": {"state": good["state"]},
        "no state": {"param_groups": groups},
        "another number of groups": {"state": good["state"], "param_groups": groups * 2},
        "another number of parameters": {"state": good["state"], "param_groups": [{**groups[0], "params": [0]}]},
        "a group without parameters": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "a state that is a list": {"state": [1, 2], "param_groups": groups},
        "a model's": {"weight": torch.ones(3)},
    }
    for name, state in bad.items():
        both = [train(kind, params, grads, lr=0.1)[1] for kind in (optim.AdamW, torch.optim.AdamW)]
        befores = [copy.deepcopy(optimizer.state_dict()) for optimizer in both]
        assert_same_error(*(lambda o=o, state=state: o.load_state_dict(copy.deepcopy(state)) for o in both))
        for optimizer, before in zip(both, befores, strict=True):
            after = optimizer.state_dict()
            assert after["param_groups"] == before["param_groups"], name
            torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0, msg=name)
            optimizer.step()
    file = io.BytesIO()
    torch.save(good, file)
    with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
        torch.load(io.BytesIO(file.getvalue()[:-100]), weights_only=True)


@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_a_checkpoint_of_another_optimizer():
    """A3, A11: torch loads SGD's; the step then raises as torch's does, and changes no parameter."""
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    sgd.step()
    before = p.detach().clone()

    def stepped(kind):
        optimizer = kind([p])
        optimizer.load_state_dict(sgd.state_dict())
        optimizer.step()

    assert_same_error(lambda: stepped(optim.AdamW), lambda: stepped(torch.optim.AdamW))
    assert torch.equal(p, before)


def test_signature_and_groups():
    """A1, A2."""
    p = torch.zeros(3, requires_grad=True)
    ours, theirs = optim.AdamW([p]), torch.optim.AdamW([p])
    assert isinstance(ours, torch.optim.AdamW) and ours.defaults == theirs.defaults
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0]) and repr(ours) == repr(theirs)
    assert not hasattr(ours, "_step_supports_amp_scaling")
    assert optim.AdamW([p], fused=True)._step_supports_amp_scaling
    p.grad = torch.ones(3)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert list(ours.state[p]) == list(theirs.state[p])
    assert all(
        a.dtype == b.dtype and a.shape == b.shape
        for a, b in zip(*(o.state[p].values() for o in (ours, theirs)), strict=True)
    )


@pytest.mark.parametrize("kinds", [(optim.AdamW, torch.optim.AdamW), (torch.optim.AdamW, optim.AdamW)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_checkpoints_go_both_ways(kinds, options):
    """A3: three steps in one, saved, loaded with weights_only, three in the other: as six in torch's."""
    params, grads = sample_inputs(torch.float32, [(3, 4), (5,), (0,)], steps=6)
    first, optimizer = train(kinds[0], params, grads[:3], **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [p.detach().clone().requires_grad_() for p in first]
    resumed = kinds[1](second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in grads[3:]:
        for p, g in zip(second, step, strict=True):
            p.grad = g.clone()
        resumed.step()
    whole, _ = train(torch.optim.AdamW, params, grads, **options)
    torch.testing.assert_close(second, whole)


def test_old_checkpoints():
    """A3: no flags but the first ones, and step a number."""
    params, grads = sample_inputs(torch.float32, [(4,)], steps=2)
    (p,), optimizer = train(optim.AdamW, params, grads)
    state = optimizer.state_dict()
    state["state"][0]["step"] = 2
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del state["param_groups"][0][key]
    again = optim.AdamW([p])
    again.load_state_dict(copy.deepcopy(state))
    again.step()
    assert again.state[p]["step"] == 3 and again.state[p]["step"].dtype == torch.float32


@pytest.mark.usefixtures("cpu_kernels")
def test_steps_in_16_bits_are_counted_in_float():
    """A2, A3: bfloat16 cannot count past 256; neither the step nor a loaded checkpoint may be in it."""
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = optim.AdamW([p], lr=1e-3)
    for _ in range(257):
        optimizer.step()
    again = optim.AdamW([p])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.step()
    assert again.state[p]["step"] == 258 and again.state[p]["step"].dtype == torch.float32


def test_named_parameters_and_hooks_of_the_state_dict():
    """A3, A4: names travel, and each hook fires once, as torch's."""
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        model, fired = torch.nn.Linear(3, 2), []
        optimizer = kind([{"params": [(n, p)], "lr": 0.1} for n, p in model.named_parameters()])
        optimizer.register_state_dict_pre_hook(lambda *_, fired=fired: fired.append("pre"))
        optimizer.register_state_dict_post_hook(lambda *_, fired=fired: fired.append("post") and None)
        optimizer.register_load_state_dict_pre_hook(lambda *_, fired=fired: fired.append("load pre") and None)
        optimizer.register_load_state_dict_post_hook(lambda *_, fired=fired: fired.append("load post"))
        for _ in range(2):
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        results.append((optimizer.state_dict(), fired))
    assert results[0][0]["param_groups"] == results[1][0]["param_groups"]
    assert results[0][0]["param_groups"][0]["param_names"] == ["weight"] and results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0]["state"], results[1][0]["state"])


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.skipif(available_memory() < 40e9, reason="takes 18 GB")
def test_more_elements_than_31_bits_count():
    """A7: sizes and offsets are 64 bits wide."""
    p = torch.ones(2**31 + 5, dtype=torch.bfloat16).requires_grad_()
    p.grad = torch.ones_like(p)
    optim.AdamW([p], lr=0.5).step()
    assert p[0] < 0.75 and (p[-8:] == p[0]).all()


@pytest.mark.usefixtures("cpu_kernels")
def test_groups_are_read_at_every_step():
    """A4, A5: lr by number and by tensor, betas, a new group, None and zero gradients, unfreezing."""
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        a, b, c = (torch.randn(5).requires_grad_() for _ in range(3))
        optimizer = kind([a, b], lr=torch.tensor(0.1), weight_decay=0.1)
        for step in range(8):
            a.grad = torch.randn(5) if step % 3 else torch.zeros(5)
            b.grad = torch.randn(5) if step not in (0, 4) else None
            c.grad = torch.randn(5)
            if step == 2:
                optimizer.param_groups[0]["lr"].fill_(0.01)
            if step == 3:
                optimizer.param_groups[0].update(lr=0.02, betas=(0.8, 0.95), eps=1e-3)
            if step == 5:
                optimizer.add_param_group({"params": [c], "weight_decay": 0.0, "amsgrad": True})
            if step == 6:
                optimizer.state[a]["exp_avg"] = torch.zeros(5)
            if step == 7:
                optimizer.state[b] = {}
            optimizer.step()
        results.append([a.detach(), b.detach(), c.detach(), *(optimizer.state[p]["step"] for p in (a, b, c))])
    torch.testing.assert_close(*results)
    assert [s.item() for s in results[0][3:]] == [8, 1, 3]


def test_schedulers():
    """A4: LambdaLR, and OneCycle, which rewrites betas."""
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        p = torch.ones(4, requires_grad=True)
        optimizer = kind([p], lr=0.1)
        cycle = optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12)
        for step in range(10):
            p.grad = torch.full((4,), float(step))
            optimizer.step()
            cycle.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("cpu_kernels")
def test_in_place_and_counted():
    """A6: the same storage, one version more, gradients untouched."""
    p = torch.randn(5).requires_grad_()
    p.grad = torch.randn(5)
    optimizer, before, grad = optim.AdamW([p]), p.data_ptr(), p.grad.clone()
    optimizer.step()
    state = optimizer.state[p]
    tensors = [p, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    versions = [t._version for t in tensors]
    product = p * 2.0 * p
    optimizer.step()
    assert p.data_ptr() == before and torch.equal(p.grad, grad) and p.grad._version == 0
    assert [t._version for t in tensors] == [v + 1 for v in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_grad_scaler():
    """A7: with fused=True the scaler's scale and its verdict reach the kernel; without, it unscales by itself."""
    for kwargs in ({"fused": True}, {}):
        results = []
        for kind in (optim.AdamW, torch.optim.AdamW):
            p = torch.ones(40, requires_grad=True)
            optimizer, scaler = kind([p], lr=0.1, **kwargs), torch.amp.GradScaler("cpu", init_scale=128.0)
            for step in range(4):
                optimizer.zero_grad()
                factor = float("inf") if step == 2 else 1.0
                scaler.scale((p * torch.arange(40.0)).sum() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append((p.detach(), optimizer.state[p]["step"], p.grad, torch.tensor(scaler.get_scale())))
        torch.testing.assert_close(*results, equal_nan=True)
        assert results[0][1] == 3


@pytest.mark.usefixtures("cpu_kernels")
def test_mixed_dtypes_in_one_group():
    """A7."""
    params = [torch.randn(33, dtype=torch.float64).to(d) for d in DTYPES]
    grads = [[torch.randn(33, dtype=torch.float64).to(d) for d in DTYPES] for _ in range(3)]
    ours, _ = train(optim.AdamW, params, grads, lr=0.1)
    alone = [train(optim.AdamW, [p], [[g[i]] for g in grads], lr=0.1)[0][0] for i, p in enumerate(params)]
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "capturable": True}, {"fused": True}], ids=str)
def test_a_checkpoint_onto_another_device(options):
    """A3: as torch lays it out there, steps and all. The other device is one that computes nothing."""
    params, grads = sample_inputs(torch.float32, [(3, 4), (5,)], steps=1)
    trained, optimizer = train(optim.AdamW, params, grads, amsgrad=options.get("amsgrad", False))
    states = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        there = [torch.empty_like(p, device="meta").requires_grad_() for p in trained]
        resumed = kind(there, **({} if "fused" in options else options))
        resumed.param_groups[0].update(options)  # torch asks for a GPU when it is made
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(options)
        resumed.load_state_dict(saved)
        states.append([{k: (t.device, t.dtype, t.shape) for k, t in resumed.state[p].items()} for p in there])
    assert states[0] == states[1] and states[0][0]["exp_avg"][0].type == "meta"


@pytest.mark.usefixtures("some_kernels")
def test_mixed_devices():
    """A7: each where it is; what is on a device without kernels is torch's."""
    params, grads = sample_inputs(torch.float32, [(3, 4), (5,)], steps=3)
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        here = [p.clone().requires_grad_() for p in params]
        there = torch.zeros(7, device="meta", requires_grad=True)
        optimizer = kind([here[0], there, here[1]], lr=0.1, foreach=False)
        for step in grads:
            for p, g in zip(here, step, strict=True):
                p.grad = g.clone()
            there.grad = torch.zeros(7, device="meta")
            with served("adamw_", when=kind is optim.AdamW):
                optimizer.step()
        assert optimizer.state[there]["exp_avg"].device.type == "meta" and optimizer.state[there]["step"] == 3
        results.append(here)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("foreach", [True, False])
def test_complex_beside_real(foreach):
    """A7: a group with a complex parameter is torch's."""
    params, grads = sample_inputs(torch.float32, [(3,), (4,)], steps=3)
    params[0] = torch.randn(3, dtype=torch.complex64)
    grads = [[torch.randn(3, dtype=torch.complex64), g[1]] for g in grads]
    ours, theirs = (train(kind, params, grads, foreach=foreach)[0] for kind in (optim.AdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.torch_serves("a step that is differentiated is torch's")
def test_differentiable():
    """A9: the gradient of the updated parameter with respect to the gradient is torch's."""
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        start, grad = torch.ones(4, requires_grad=True), torch.arange(1.0, 5.0, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=0.1, eps=0.5, differentiable=True)
        p.grad = grad
        optimizer.step()
        results.append(torch.autograd.grad(p.square().sum(), (start, grad)))
    torch.testing.assert_close(*results)


def test_errors_at_step_are_torchs():
    """A1: a tensor lr with foreach, which torch refuses at the step."""
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    ours, theirs = (kind([p], lr=torch.tensor(0.1)) for kind in (optim.AdamW, torch.optim.AdamW))
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.param_groups[0]["foreach"] = True
    assert_same_error(ours.step, theirs.step)


def test_nan_and_infinity_reach_the_state_as_torchs():
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        p = torch.ones(40, requires_grad=True)
        optimizer = kind([p], amsgrad=True)
        for value in (1.0, float("nan"), 2.0, float("inf")):
            p.grad = torch.ones(40)
            p.grad[::3] = value
            optimizer.step()
        results.append([p.detach(), *optimizer.state[p].values()])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.usefixtures("some_kernels")
def test_what_does_not_overflow_in_torchs_order():
    """A6: the square of a gradient alone does, and a decay of 0 times an infinite lr is none."""
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        p, q = torch.ones(40, requires_grad=True), torch.ones(40, requires_grad=True)
        optimizer = kind([{"params": [p]}, {"params": [q], "lr": float("inf"), "weight_decay": 0}])
        p.grad, q.grad = torch.full((40,), 1e20), torch.ones(40)
        with served("adamw_", when=kind is optim.AdamW):
            optimizer.step()
        results.append([p.detach(), q.detach(), *optimizer.state[p].values()])
        assert optimizer.state[p]["exp_avg_sq"].isfinite().all()
    torch.testing.assert_close(*results)


@pytest.mark.torch_serves("gradients of a class that Python may have given functions of its own")
def test_gradients_of_a_subclass_are_torchs():
    """A7."""
    called = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    calls = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = kind([p])
        for _ in range(2):
            p.grad = torch.ones(4).as_subclass(Logged)
            called.clear()
            optimizer.step()
        calls.append([name for name in called if name.endswith("_") and not name.startswith("_")])
    assert calls[0] == calls[1] != []


# ---- what ours offer beyond torch's ----


def clipped_in_two(kind, params, grads, max_norm, **options):
    """torch's two calls, in float64."""
    params = [p.double().clone().requires_grad_() for p in params]
    optimizer, norms = kind(params, **options), []
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.double().clone()
        norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
        optimizer.step()
    return params, norms


@pytest.mark.usefixtures("some_kernels")
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_grad_norm(dtype, max_norm):
    """Norm and step together: as torch's two calls, with p.grad as it was."""
    params, grads = sample_inputs(dtype)
    true, norms = clipped_in_two(torch.optim.AdamW, params, grads, max_norm, lr=0.1)
    found = [p.clone().requires_grad_() for p in params]
    optimizer = optim.AdamW(found, lr=0.1, max_grad_norm=max_norm)
    assert optimizer.grad_norm is None
    for step, norm in zip(grads, norms, strict=True):
        for p, g in zip(found, step, strict=True):
            p.grad = g.clone()
        with served("adamw_", "total_norm"):
            optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(found, step, strict=True))
        assert optimizer.grad_norm.dtype == dtype and optimizer.grad_norm.dim() == 0
        torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=max(torch.finfo(dtype).eps, 1e-14), atol=0)
    torchs = [p.clone().requires_grad_() for p in params]
    other = torch.optim.AdamW(torchs, lr=0.1, fused=dtype is not torch.float64)
    for step in grads:
        for p, g in zip(torchs, step, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(torchs, max_norm)
        other.step()
    for p, q, t in zip(found, torchs, true, strict=True):
        assert_close(p, q, t.detach())
    assert list(optimizer.param_groups[0]) == list(other.param_groups[0])
    other.load_state_dict(optimizer.state_dict())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again.max_grad_norm == max_norm and torch.equal(again.grad_norm, optimizer.grad_norm)


@pytest.mark.usefixtures("some_kernels")
def test_max_grad_norm_where_torch_serves():
    """A parameter with gaps beside one without, and use_backend("torch"): the same."""
    from nnfast.backend import use_backend

    results = []
    for backend in (None, "torch"):
        torch.manual_seed(1)
        a, b = torch.randn(8, 6).requires_grad_(), torch.randn(8, 12)[:, ::2].requires_grad_()
        optimizer = optim.AdamW([a, b], lr=0.1, max_grad_norm=0.5, fused=True)
        with use_backend(backend) if backend else contextlib.nullcontext():
            for _ in range(3):
                a.grad, b.grad = torch.randn(8, 6), torch.randn(6, 8).t()
                kept = a.grad.clone(), b.grad.clone()
                optimizer.step()
                assert torch.equal(a.grad, kept[0]) and torch.equal(b.grad, kept[1])
        results.append((a.detach(), b.detach(), optimizer.grad_norm))
    torch.testing.assert_close(*results)


def test_max_grad_norm_under_a_scaler():
    """The norm is that of the unscaled gradient, whether the scaler unscales or the kernel."""
    results = []
    for fused in (True, False):
        p = torch.ones(40, requires_grad=True)
        optimizer, scaler = optim.AdamW([p], lr=0.1, fused=fused, max_grad_norm=1.0), torch.amp.GradScaler("cpu", 128.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale((p * torch.arange(40.0)).sum() * (float("inf") if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((p.detach(), optimizer.grad_norm))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][1], torch.arange(40.0).norm())


def master_of(optimizer, p):
    return (p.detach().float().view(torch.int32) + optimizer.state[p]["master_param"]).view(torch.float32)


@pytest.mark.usefixtures("some_kernels")
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("torch", marks=pytest.mark.torch_serves("the code over torch's own step"))]
)
def test_master_weights(backend):
    """A bfloat16 parameter with its master is the float32 one, to the bit, and what is seen of it is its rounding."""
    from nnfast.backend import use_backend

    sizes = [(1,), (7,), (16,), (33,), (130,), (40, 30)]
    for options in ({}, {"amsgrad": True, "lr": 1e-4, "maximize": True}):
        params, grads = sample_inputs(torch.bfloat16, sizes, steps=20)
        with use_backend(backend):
            ours, optimizer = train(optim.AdamW, params, grads, master_weights=True, **options)
            whole, _ = train(
                optim.AdamW, [p.float() for p in params], [[g.float() for g in s] for s in grads],
                **options, foreach=False,
            )  # fmt: skip
        for p, w in zip(ours, whole, strict=True):
            assert p.dtype == torch.bfloat16 and torch.equal(master_of(optimizer, p), w.detach())
            assert (p.double() - w.double()).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * w.abs().max()
            state = optimizer.state[p]
            assert {k: t.dtype for k, t in state.items()} == {
                k: torch.int16 if k == "master_param" else torch.float32 for k in state
            }


def test_master_weights_in_checkpoints():
    """They survive in their own dtypes; torch's AdamW loads them; and torch's own are taken up."""
    params, grads = sample_inputs(torch.bfloat16, [(33,), (5, 4)], steps=6)
    ours, optimizer = train(optim.AdamW, params, grads[:3], master_weights=True)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = [p.detach().clone().requires_grad_() for p in ours]
    resumed = optim.AdamW(resumed_params, master_weights=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copies = [resumed, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    torchs = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in ours])
    torchs.load_state_dict(optimizer.state_dict())
    for other in (*copies, optimizer, torchs):
        for step in grads[3:]:
            for p, g in zip(other.param_groups[0]["params"], step, strict=True):
                p.grad = g.clone()
            other.step()
    for other in copies:
        for p, q in zip(ours, other.param_groups[0]["params"], strict=True):
            assert torch.equal(master_of(optimizer, p), master_of(other, q))
    back = optim.AdamW([p.detach().clone().requires_grad_() for p in torchs.param_groups[0]["params"]],
                       master_weights=True)  # fmt: skip
    back.load_state_dict(torchs.state_dict())
    for p in back.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    back.step()
    assert all(back.state[p]["master_param"].dtype == torch.int16 for p in back.param_groups[0]["params"])


def test_a_master_follows_who_sets_the_parameter():
    p = torch.ones(20, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = optim.AdamW([p], lr=1e-3, master_weights=True)
    optimizer.step()
    with torch.no_grad():
        p.fill_(3)
    optimizer.step()
    assert ((master_of(optimizer, p) - 3).abs() < 0.02).all()


@pytest.mark.usefixtures("cpu_kernels")
def test_masters_of_values_at_the_edge():
    """NaN, infinity, the largest numbers, subnormal ones and ties: a step that changes nothing rounds them again."""
    bits = [0x7F800000, 0x7F7FFFFF, 0x7FFFFFFF, 0x7FC00000, 1, 0x8000, 0x18000, 0x3F808000, 0x3F818000, 0]
    bits += [b - (1 << 31) for b in bits]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for n in (len(values), 3):  # registers, and a tail
        p, low = values[:n].bfloat16(), torch.zeros(n, dtype=torch.int16)
        adamw._split(values[:n], p, low, None)  # the same in Python
        whole = adamw._join(p, low)
        assert torch.equal(whole.isnan(), values[:n].isnan())
        assert torch.equal(whole.nan_to_num(), values[:n].nan_to_num())
        before = p.clone(), low.clone()
        torch.ops.nnfast.adamw_(
            [p], [torch.zeros_like(p)], [torch.zeros(n)], [torch.ones(n)], [], [low], [torch.tensor(0.0)], lr=0.0,
            beta1=0.5, beta2=0.5, weight_decay=0.0, eps=1.0,
        )  # fmt: skip
        assert torch.equal(low, before[1]) and torch.equal(p.isnan(), before[0].isnan())
        assert torch.equal(p[~p.isnan()], before[0][~p.isnan()])


@pytest.mark.usefixtures("some_kernels")
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("torch", marks=pytest.mark.torch_serves("the code over torch's own step"))]
)
def test_stochastic_rounding(backend):
    """Small updates count on average, where rounding to nearest loses them; the same from run to run."""
    from nnfast.backend import use_backend

    results = []
    for seed, count in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(seed)
        p = torch.ones(100_003, dtype=torch.bfloat16).requires_grad_()
        optimizer = optim.AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=True)
        with threads(count), served("adamw_.stochastic", when=backend == "cpu"), use_backend(backend):
            for _ in range(10):
                p.grad = torch.ones_like(p)
                optimizer.step()
        results.append(p.detach())
        # Each step takes 1e-4, with a standard deviation below a unit (2^-8) an element and step.
        assert abs(p.double().mean().item() - (1 - 1e-3)) < 5 * 2**-8 * (10 / len(p)) ** 0.5
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert "master_param" not in optimizer.state[p] and optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    p = torch.ones(1000, dtype=torch.bfloat16).requires_grad_()
    p.grad = torch.ones_like(p)
    with use_backend(backend):
        optim.AdamW([p], lr=1e-4, weight_decay=0.0).step()
    assert (p == 1).all()
    # Equal parameters in a group, and in another, are not rounded alike.
    alike = [torch.ones(100_003, dtype=torch.bfloat16).requires_grad_() for _ in range(4)]
    for p in alike:
        p.grad = torch.ones_like(p)
    groups = [{"params": alike[:2]}, {"params": alike[2:]}]
    with use_backend(backend):
        optim.AdamW(groups, lr=1e-4, weight_decay=0.0, stochastic_rounding=True).step()
    assert not any(torch.equal(p, q) for p, q in itertools.combinations(alike, 2))


@pytest.mark.torch_serves("a gradient that torch refuses half-way")
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="newer torch has it")
def test_a_gradient_of_another_dtype_changes_nothing():
    p, q = torch.ones(4, dtype=torch.bfloat16).requires_grad_(), torch.ones(3, requires_grad=True)
    p.grad_dtype = torch.float32
    p.grad, q.grad = torch.ones(4), torch.ones(3)
    optimizer = optim.AdamW([p, q])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected dtype"):
            optimizer.step()
    assert (p == 1).all() and (q == 1).all() and not optimizer.state


def test_extras_are_checked():
    p = torch.ones(2, requires_grad=True)
    for wrong in ({"max_grad_norm": 0}, {"max_grad_norm": -1.0}, {"master_weights": True, "stochastic_rounding": True}):
        with pytest.raises(ValueError):
            optim.AdamW([p], **wrong)
    with pytest.raises(TypeError):
        optim.AdamW([p], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, 1.0)
    parameters = inspect.signature(optim.AdamW).parameters
    assert [*parameters][:-3] == [*inspect.signature(torch.optim.AdamW).parameters]
    assert [*parameters][-3:] == ["max_grad_norm", "master_weights", "stochastic_rounding"]
