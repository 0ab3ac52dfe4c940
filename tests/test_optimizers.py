"""Adam, SGD and RMSprop: what AdamW's rows say (A1 .. A11), for each; O1, O3; and of AdamW what all have alike.

The truth is torch's own loop in float64."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from common import DTYPES, HALF, assert_close, rms, served
from test_adamw import sample_inputs, train
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import nnfast.optim as optim
from nnfast.optim import swap

pytestmark = pytest.mark.usefixtures("some_kernels")

NAMES = {"AdamW": "adamw_", "Adam": "adamw_", "SGD": "sgd_", "RMSprop": "rmsprop_"}
INFO = {info.optim_cls.__name__: info for info in optim_db}
# AdamW's are test_adamw.py's.
OPTIONS = {
    "Adam": [
        {},
        {"weight_decay": 0.3, "lr": 0.1, "amsgrad": True},
        {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
    ],
    "SGD": [
        {},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "fused": True},
    ],
    "RMSprop": [
        {},
        {"weight_decay": 0.1, "momentum": 0.9},
        {"centered": True, "alpha": 0.9, "eps": 1e-3},
        {"centered": True, "momentum": 0.5, "maximize": True},
    ],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
each_case = pytest.mark.parametrize("name, options", CASES, ids=str)
each = pytest.mark.parametrize("name", NAMES)


def pair(name):
    return getattr(optim, name), getattr(torch.optim, name)


def loop(name, options, dtype=torch.float32):
    """torch's options to compare with: its loop, for its fused kernels are wrong here and there. Adam in 16 bits takes
    the fused one, whose arithmetic is in float as ours is: the loop's eps would vanish there."""
    if name in ("Adam", "AdamW"):
        return {**options, "fused": dtype in HALF, "foreach": False}
    return {**options, "foreach": False, **({"fused": False} if "fused" in options else {})}


def exact(name, params, grads, **options):
    """torch's loop, in float64."""
    options = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    options.update(foreach=False)
    options.pop("capturable", None)
    if "fused" in INFO[name].supported_impls:
        options["fused"] = False
    return train(getattr(torch.optim, name), [p.double() for p in params], [[g.double() for g in s] for s in grads],
                 **options)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_values(name, options, dtype):
    """A2, A6, A7: beside torch's loop, over sizes; the state, its dtypes and strides as torch's."""
    params, grads = sample_inputs(dtype)
    ours_class, torchs_class = pair(name)
    if name == "RMSprop" and dtype in HALF:
        options = {**options, "eps": 1e-3}  # which torch's arithmetic in 16 bits can tell from 0
    with served(NAMES[name]):
        ours, optimizer = train(ours_class, params, grads, **options)
    torchs, theirs = train(torchs_class, params, grads, **loop(name, options, dtype))
    true, exacts = exact(name, params, grads, **options)
    for p, q, t in zip(ours, torchs, true, strict=True):
        assert_close(p, q, t, f"{tuple(p.shape)}")
        a, b, c = optimizer.state[p], theirs.state[q], exacts.state[t]
        assert list(a) == list(b)
        for key in a:
            assert (a[key].dtype, a[key].stride(), a[key].device) == (b[key].dtype, b[key].stride(), b[key].device)
            assert_close(a[key], b[key], c[key].double(), f"{key} of {tuple(p.shape)}")
    assert [*optimizer.param_groups[0]] == [*theirs.param_groups[0]]


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_less_accurate_than_torch(name, options, dtype):
    params, grads = sample_inputs(dtype, [(100000,)], steps=10)
    (true,), _ = exact(name, params, grads, **options)
    (ours,), _ = train(getattr(optim, name), params, grads, **options)
    (torchs,), _ = train(getattr(torch.optim, name), params, grads, **loop(name, options, dtype))
    assert rms(ours.double() - true) <= 1.05 * rms(torchs.double() - true)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name in NAMES for dtype in DTYPES if dtype not in HALF or name == "AdamW"],
    ids=str,
)
def test_torchs_database(name, dtype):
    """O1, A6: every configuration of PyTorch's own optimizer database, with every implementation. differentiable=True
    takes no leaves: test_complex_and_differentiable."""
    info = INFO[name]
    params, grads = sample_inputs(dtype, [(10, 5), (), (3,), (0, 2)], steps=5)
    for flags in ({}, *({flag: True} for flag in info.supported_impls if flag != "differentiable")):
        for config in info.optim_inputs_func("cpu", dtype):
            options = {**config.kwargs, **flags}
            ours, optimizer = train(getattr(optim, name), params, grads, **copy.deepcopy(options))
            torchs, theirs = train(getattr(torch.optim, name), params, grads, **copy.deepcopy(options))
            assert optimizer.state_dict()["param_groups"] == theirs.state_dict()["param_groups"], config.desc
            flagless = {k: v for k, v in options.items() if k not in ("fused", "foreach")}
            for p, q, true in zip(ours, torchs, exact(name, params, grads, **flagless)[0], strict=True):
                assert_close(p, q, true, config.desc)
                a, b = (
                    {k: v if v is None else v.dtype for k, v in o.state[t].items()}
                    for o, t in ((optimizer, p), (theirs, q))
                )
                assert a == b, config.desc


@each
@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_torchs_database_of_errors(name):
    """A1, A11."""
    for error in INFO[name].optim_error_inputs_func("cpu", torch.float32):
        given, said = error.optimizer_error_input, []
        for kind in pair(name):
            p = torch.ones(2, requires_grad=True)
            p.grad = torch.ones(2)

            def run(kind=kind, p=p, given=given, error=error):
                optimizer = kind([p] if given.params is None else copy.copy(given.params), **given.kwargs)
                if error.error_on is OptimizerErrorEnum.STEP_ERROR:
                    optimizer.step()

            with pytest.warns() if error.error_type is UserWarning else pytest.raises(error.error_type) as caught:
                run()
            said.append(str(caught[0].message) if error.error_type is UserWarning else str(caught.value))
            assert (p == 1).all()
        assert said[0] == said[1], given.desc


@each
def test_torchs_database_of_schedulers(name):
    """A4: torch's list, and a tensor lr; thirty steps, so that every scheduler comes to change something."""
    makers = [make for group in INFO[name].scheduler_inputs for make in group] + [None]
    for make in makers:
        results = []
        for kind in pair(name):
            p = torch.ones(4, requires_grad=True)
            lr = torch.tensor(0.1) if make is None else 0.1
            optimizer = kind([{"params": [p], "weight_decay": 0.1}], lr=lr)
            scheduler = make(optimizer) if make else None
            metric = {"metrics": 1.0} if make and "metrics" in inspect.signature(scheduler.step).parameters else {}
            rates = []
            for _ in range(30):
                p.grad = p.detach() + 1
                optimizer.step()
                if scheduler is None:
                    optimizer.param_groups[0]["lr"].mul_(0.9)
                else:
                    scheduler.step(**metric)
                rates.append(float(optimizer.param_groups[0]["lr"]))
            results.append((p.detach(), torch.tensor(rates)))
        torch.testing.assert_close(*results)
        assert min(rates) < 0.099


LAYOUTS = {
    "parameter with gaps": lambda: (torch.randn(8, 12)[:, ::2], torch.randn(8, 6)),
    "transposed parameter": lambda: (torch.randn(6, 8).t(), torch.randn(8, 6)),
    "transposed gradient": lambda: (torch.randn(8, 6), torch.randn(6, 8).t()),
    "expanded gradient": lambda: (torch.randn(8, 6), torch.randn(1, 6).expand(8, 6)),
    "misaligned": lambda: (torch.randn(51)[3:].view(8, 6), torch.randn(53)[5:].view(8, 6)),
}


@pytest.mark.parametrize("fused", [False, True])
@each
def test_layouts(name, fused):
    """A8, O3: ours steps what it covers, and torch's loop the rest, where its fused kernel is wrong."""
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}}.get(name, {"lr": 0.1})
    if name != "RMSprop":
        options["fused"] = fused
    results = []
    with served(NAMES[name]):
        for kind, given in zip(pair(name), (options, loop(name, options)), strict=True):
            torch.manual_seed(5)
            leaves = []
            for make in LAYOUTS.values():
                p, g = make()
                p = torch.empty_strided(p.shape, p.stride()).copy_(p).requires_grad_()
                with torch.no_grad():
                    p.grad = g
                leaves.append(p)
            optimizer = kind(leaves, **given)
            for _ in range(3):
                optimizer.step()
            results.append([p.detach() for p in leaves])
    for layout, ours, torchs in zip(LAYOUTS, *results, strict=True):
        torch.testing.assert_close(ours, torchs, msg=layout)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sgd_in_16_bits(dtype):
    """O3: torch's own fused kernel is wrong here from 16 elements on."""
    params, grads = sample_inputs(dtype, [(15,), (16,), (17,), (100,)], steps=4)
    options = {"lr": 0.1, "momentum": 0.9}
    ours, _ = train(optim.SGD, params, grads, **options, fused=True)
    torchs, _ = train(torch.optim.SGD, params, grads, **options, fused=False, foreach=False)
    for p, q, true in zip(ours, torchs, exact("SGD", params, grads, **options)[0], strict=True):
        assert_close(p, q, true)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_beside_what_is_torchs(fused):
    """A7: the scale and the verdict reach the parameters that go through torch's loop too."""
    for name in ("Adam", "AdamW", "SGD"):
        results = []
        for kind in pair(name):
            a, b = torch.ones(8, 6, requires_grad=True), torch.ones(8, 12)[:, ::2].requires_grad_()
            ours = kind is getattr(optim, name)
            optimizer = kind([a, b], lr=0.1, fused=fused and ours)
            scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
            for step in range(4):
                optimizer.zero_grad()
                factor = float("inf") if step == 2 else 1.0
                scaler.scale(((a + b) * torch.arange(6.0)).sum() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append((a.detach(), b.detach(), a.grad, torch.tensor(scaler.get_scale())))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "name",
    [
        n if n == "SGD" else pytest.param(n, marks=pytest.mark.torch_serves("bad input is torch's to refuse"))
        for n in NAMES
    ],
)
def test_sparse_gradients(name):
    """A7: torch's result for SGD, and torch's error for the others, before anything changes."""
    results = []
    for kind in pair(name):
        good, bad = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        optimizer = kind([{"params": [good]}, {"params": [bad]}], lr=0.1)
        good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
        try:
            optimizer.step()
            results.append((good.detach(), bad.detach()))
        except RuntimeError as error:
            results.append(str(error))
            assert kind is getattr(torch.optim, name) or (good == 1).all()
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)


@each
def test_complex_and_differentiable(name):
    """A7, A9: torch's own code."""
    params, grads = sample_inputs(torch.float32, [(3,), (4,)], steps=3)
    params[0] = torch.randn(3, dtype=torch.complex64)
    grads = [[torch.randn(3, dtype=torch.complex64), g[1]] for g in grads]
    torch.testing.assert_close(*(train(kind, params, grads, lr=0.1)[0] for kind in pair(name)))
    results = []
    for kind in pair(name):
        start, grad = torch.ones(4, requires_grad=True), torch.arange(1.0, 5.0, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=0.1, differentiable=True)
        p.grad = grad
        optimizer.step()
        results.append(torch.autograd.grad(p.square().sum(), (start, grad)))
    torch.testing.assert_close(*results)


@each_case
@pytest.mark.parametrize("first", [0, 1])
def test_checkpoints_go_both_ways(name, options, first):
    """A3: three steps in one, saved, loaded with weights_only, three in the other: as six in torch's."""
    kinds = pair(name)
    params, grads = sample_inputs(torch.float32, [(3, 4), (5,), (0,)], steps=6)
    begun, optimizer = train(kinds[first], params, grads[:3], **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [p.detach().clone().requires_grad_() for p in begun]
    resumed = kinds[1 - first](second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in grads[3:]:
        for p, g in zip(second, step, strict=True):
            p.grad = g.clone()
        resumed.step()
    torch.testing.assert_close(second, train(kinds[1], params, grads, **options)[0])


@each
def test_hooks_closure_pickle(name):
    """A3, A4, A5."""
    p = torch.ones(3, requires_grad=True)
    ours, theirs = pair(name)
    optimizer, fired = ours([p], lr=0.1), []
    assert isinstance(optimizer, theirs) and optimizer.defaults == theirs([p], lr=0.1).defaults
    assert repr(optimizer) == repr(theirs([p], lr=0.1))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre") and None),
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre") and None),
        optimizer.register_step_post_hook(lambda *_: fired.append("post")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3 and (p < 1).all()
    assert fired == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert any(e.key == f"Optimizer.step#{name}.step" for e in profile.key_averages())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(again) is ours
        (q,) = again.param_groups[0]["params"]
        q.grad = torch.ones(3)
        before = q.detach().clone()
        again.step()
        assert not torch.equal(q, before)


@each
def test_frozen_and_new_parameters(name):
    """A5: None gradients skip, a group comes later, state goes missing."""
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    results = []
    for kind in pair(name):
        torch.manual_seed(1)
        a, b, c = (torch.randn(5).requires_grad_() for _ in range(3))
        optimizer = kind([a, b], lr=0.1, weight_decay=0.1, **options)
        for step in range(8):
            a.grad, c.grad = torch.randn(5), torch.randn(5)
            b.grad = torch.randn(5) if step not in (0, 4) else None
            if step == 3:
                optimizer.add_param_group({"params": [c], "weight_decay": 0.0})
            if step == 5:
                optimizer.param_groups[0]["lr"] = 0.02
            if step == 6:
                optimizer.state[b] = {}
            optimizer.step()
        results.append([a.detach(), b.detach(), c.detach()])
    torch.testing.assert_close(*results)


@each
@pytest.mark.parametrize("scheduler_at", [None, 0, 3])
def test_swap(name, scheduler_at):
    """A torch optimizer that exists becomes ours, with state, hooks and scheduler."""
    results = []
    for swapped in (True, False):
        torch.manual_seed(1)
        p, fired = torch.randn(20).requires_grad_(), []
        optimizer = getattr(torch.optim, name)([p], lr=0.1, weight_decay=0.1)
        optimizer.register_step_post_hook(lambda *_, fired=fired: fired.append(1))
        scheduler = None
        for step in range(6):
            if step == scheduler_at:
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            if step == 3 and swapped:
                assert swap(optimizer) is optimizer and type(optimizer) is getattr(optim, name)
                assert swap(optimizer) is optimizer
            p.grad = torch.randn(20)
            with served(NAMES[name], when=step >= 3 and swapped):
                optimizer.step()
            if scheduler:
                scheduler.step()
        again = pickle.loads(pickle.dumps(optimizer))
        assert type(again) is type(optimizer)
        results.append((p.detach(), len(fired), optimizer.param_groups[0]["lr"]))
    torch.testing.assert_close(*results)


def test_swap_leaves_others():
    class Mine(torch.optim.SGD):
        pass

    p = torch.ones(2, requires_grad=True)
    for optimizer in (Mine([p]), torch.optim.Adagrad([p])):
        kind = type(optimizer)
        assert swap(optimizer) is optimizer and type(optimizer) is kind


def shared_memory(kind):
    """Parameters that share memory, in one way or another."""
    whole = torch.zeros(50000)
    if kind == "one storage":
        return [torch.nn.Parameter(whole), torch.nn.Parameter(whole)]
    if kind == "overlapping":
        return [torch.nn.Parameter(whole[begin : begin + 30000]) for begin in (0, 20000, 10000)]
    return [torch.nn.Parameter(whole)] * 2  # twice in a group, of which torch warns


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("kind", ["one storage", "overlapping", "twice"])
@pytest.mark.parametrize(
    "name, options", [("SGD", {"lr": 1.0}), ("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {}), ("RMSprop", {})]
)
def test_parameters_that_share_memory(name, options, kind):
    """O3: one after another, as torch's loop; not side by side in threads."""
    results = []
    for optimizer_class in pair(name):
        params = shared_memory(kind)
        optimizer = optimizer_class(params, **loop(name, options))
        generator = torch.Generator().manual_seed(0)
        with served("step.in_order", when=optimizer_class is getattr(optim, name)):
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
        results.append([p.detach() for p in params])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_a_count_of_steps_that_parameters_share():
    """O3: each of them counts it up, and is stepped by what it then says."""
    results = []
    for optimizer_class in pair("Adam"):
        params, step = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)], torch.tensor(10.0)
        optimizer = optimizer_class(params, lr=0.1)
        state = {i: {"step": step, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)} for i in range(3)}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        with served("step.in_order", when=optimizer_class is optim.Adam):
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones(3)
                optimizer.step()
        results.append([*(p.detach() for p in params), optimizer.state[params[0]]["step"]])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.torch_serves("what was made in inference mode is torch's to refuse")
def test_parameters_of_inference_mode():
    """A1: torch's error."""
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
    for optimizer_class in pair("SGD"):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            optimizer_class([p], lr=0.1).step()


def test_a_count_that_is_no_tensor():
    """A1: torch's error."""
    for optimizer_class in pair("Adam"):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = optimizer_class([p])
        optimizer.step()
        optimizer.state[p]["step"] = 1.0
        with pytest.raises(RuntimeError, match="state_steps"):
            optimizer.step()


def test_a_spike_that_torchs_order_survives():
    """A6, of RMSprop: the square of a gradient alone would overflow, and the element never move again."""
    results = []
    for kind in (optim.RMSprop, torch.optim.RMSprop):
        p = torch.ones(40, requires_grad=True)
        optimizer = kind([p])
        p.grad = torch.full((40,), 1e20)
        with served("rmsprop_", when=kind is optim.RMSprop):
            optimizer.step()
        results.append([p.detach(), optimizer.state[p]["square_avg"]])
    torch.testing.assert_close(*results)
    assert results[0][1].isfinite().all()


@pytest.mark.torch_serves("gradients of another dtype")
def test_sgd_buffers_are_of_the_gradients_dtype():
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch gives a gradient its parameter's dtype")
    results = []
    for kind in (optim.SGD, torch.optim.SGD):
        p = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
        p.grad_dtype = torch.float32
        optimizer = kind([p], lr=0.1, momentum=0.9)
        for i in range(5):
            p.grad = torch.full((64,), 1e-3 * (i + 1))
            optimizer.step()
        results.append([p.detach(), optimizer.state[p]["momentum_buffer"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)
