"""accelerate, restore, report. G3 .. G7 are the rows of the contract (tests/README.md)."""

import copy
import functools
import gc
import pickle
import re
import threading
import weakref

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF
from common import served
from torch.utils.checkpoint import checkpoint

import nnfast
import nnfast.nn as nn
from nnfast.backend import native

# Code as in a user's file that has never heard of us.
F = TF


class Own(torch.nn.LayerNorm):
    """A class of the user's own."""


class Centred(torch.nn.LayerNorm):
    def forward(self, input):
        return super().forward(input - 1)


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16),
        torch.nn.GELU(),
        torch.nn.LayerNorm(16),
        torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True),
        Centred(16),
        Own(16),
    )


def kinds(model):
    return [type(m) for m in model.modules()]


def test_in_place_reversible_idempotent():
    model = build()
    before, parameters = kinds(model), list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    keys, text = list(model.state_dict()), repr(model)
    x = torch.randn(3, 5, 8)
    expected = model(x)
    assert nnfast.accelerate(model) is model
    once = kinds(model)
    assert kinds(nnfast.accelerate(model)) == once != before
    assert {nn.LayerNorm, nn.Linear, nn.GELU, nn.TransformerEncoderLayer} <= {*once}
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and repr(model) == text
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)
    assert kinds(nnfast.restore(model)) == before


def test_no_class_is_touched():
    classes = (torch.nn.LayerNorm, torch.nn.Linear, MLP, LayerNorm, Own)
    before = [dict(vars(c)) for c in classes]
    model = nnfast.accelerate(torch.nn.ModuleList([build(), Block()]))
    for m in model:
        m(torch.randn(3, 5, 8)).sum().backward()
    assert [dict(vars(c)) for c in classes] == before and type(torch.nn.LayerNorm(3)) is torch.nn.LayerNorm
    assert type(Block().mlp) is MLP


def test_deepcopy_and_pickle():
    model = nnfast.accelerate(torch.nn.Sequential(build(), torch.nn.Linear(16, 8), Block()))
    x = torch.randn(2, 5, 8)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(again) == kinds(model)
        torch.testing.assert_close(again(x), model(x))
        assert not {nn.LayerNorm, nn.Linear} & {*kinds(nnfast.restore(again))}


def test_restore_leaves_what_was_made_as_ours():
    model = torch.nn.ModuleList([nn.LayerNorm(3), torch.nn.LayerNorm(3)])
    nnfast.restore(nnfast.accelerate(model))
    assert [type(m) for m in model] == [nn.LayerNorm, torch.nn.LayerNorm]


def test_restore_leaves_a_class_made_of_ours():
    model = nnfast.accelerate(torch.nn.Sequential(torch.nn.LayerNorm(3)))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Identity())
    parametrized = type(model[0])
    assert type(nnfast.restore(model)[0]) is parametrized
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(nnfast.restore(model)[0]) is torch.nn.LayerNorm


def test_hooks_of_a_swapped_module_fire():
    model, fired = nnfast.accelerate(torch.nn.Sequential(torch.nn.LayerNorm(4))), []
    model[0].register_forward_hook(lambda *_: fired.append(1))
    model(torch.randn(2, 4))
    assert fired == [1]


def test_weight_decay_grouping_finds_the_same_parameters():
    def norms(model):
        return [id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()]

    model, x, trained = build(), torch.randn(3, 5, 8), []
    before, plain = norms(model), copy.deepcopy(model)
    assert norms(nnfast.accelerate(model)) == before
    for m in (model, plain):
        kept = {*norms(m)}
        groups = [[p for p in m.parameters() if (id(p) in kept) == undecayed] for undecayed in (True, False)]
        optimizer = torch.optim.SGD([{"params": g, "weight_decay": d} for g, d in zip(groups, (0.0, 0.5), strict=True)])
        m(x).square().sum().backward()
        optimizer.step()
        trained.append([p.detach() for p in m.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_report(cpu_kernels):
    model = build()
    text = str(nnfast.report(model))
    assert "nnfast.accelerate" in text and "Centred" in text
    nnfast.accelerate(model)
    model(torch.randn(3, 5, 8))
    report = nnfast.report(model)
    assert ("0", "Linear") in report.served
    assert ("2", "LayerNorm") in report.served and re.search(r"served: 2 +LayerNorm\n", str(report))
    assert [name for name, _ in report.left] == ["4", "5"]


@pytest.mark.torch_serves("nothing of the model is run")
def test_report_names_the_calls_it_would_serve(tmp_path, monkeypatch):
    """With file and line, however they are spelled; nothing is run, and nothing is changed."""
    source = """import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import gelu

class M(nn.Module):
    def forward(self, x):
        x = torch.nn.functional.gelu(x)
        x = F.layer_norm(x, (4,))
        x = nn.functional.gelu(self.other(x))
        return x

    def other(self, x):
        return [gelu(y) for y in x]
"""
    (tmp_path / "users.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import users

    model = nnfast.accelerate(users.M())
    assert type(model) is users.M
    left = [why for _, why in nnfast.report(model).left]
    where = [(why.split()[1], int(why.split(":")[1])) for why in left if f"{tmp_path}/users.py" in why]
    assert where == [("F.gelu", 8), ("F.layer_norm", 9), ("F.gelu", 10), ("F.gelu", 14)]


# ---- modules nobody wrote for us ----


class LayerNorm(tnn.Module):
    """nanoGPT's."""

    def __init__(self, size, bias=False):
        super().__init__()
        self.weight = tnn.Parameter(torch.ones(size))
        self.bias = tnn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class MLP(tnn.Module):
    """nanoGPT's."""

    def __init__(self, size=8, gelu=None, dropout=0.0):
        super().__init__()
        self.c_fc = tnn.Linear(size, 4 * size)
        self.gelu = gelu or tnn.GELU()
        self.c_proj = tnn.Linear(4 * size, size)
        self.dropout = tnn.Dropout(dropout)
        self.flag = False

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class Block(tnn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(size), LayerNorm(size, bias=True)
        self.attn = tnn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = MLP(size)

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Function(MLP):
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Method(MLP):
    def forward(self, x):
        return self.c_proj(self.activated(x))

    def activated(self, x):
        return self.gelu(self.c_fc(x))


class Branch(MLP):
    def forward(self, x):
        return self.gelu(self.c_fc(x)) if x.sum() > -1e9 else x


class Count(MLP):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.gelu(self.c_fc(x))


class Read(MLP):
    def forward(self, x):
        h = self.c_fc(x)
        return self.gelu(h) + h


class Twice(MLP):
    def forward(self, x):
        return self.gelu(self.c_fc(x)) - self.gelu(self.c_fc(x * 2))


class Between(MLP):
    def forward(self, x):
        return self.c_proj(self.gelu(F.dropout(self.c_fc(x), 0.5, self.training)))


class InPlace(MLP):
    def forward(self, x):
        return self.gelu(self.c_fc(x).mul_(2))


class Written(MLP):
    def forward(self, x):
        h = self.c_fc(x)
        h.data[0, 3] = 5  # which no version counts
        return self.gelu(h)


class Keyed(MLP):
    def forward(self, x):
        return self.c_proj(self.gelu(input=self.c_fc(input=x)))


def counts():
    return native.paths()["linear_backward.sums_found"]


def run(model, x, gradient=True):
    """Output, input's gradient and all parameters' gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    with torch.set_grad_enabled(gradient):
        y = model(x)
    if gradient:
        y.square().sum().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()]


def assert_same(model, plain, x, gradient=True):
    torch.testing.assert_close(run(model, x, gradient), run(plain, x, gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [MLP, Method, Branch, Count, Read, Twice, Keyed, Between, InPlace, Function, Written])
def test_a_gelu_that_reads_a_linear(kind, cpu_kernels):
    """However the one comes to the other; the bias's sums are handed over where the GELU alone reads it."""
    model = kind()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(3, 8)
    before = counts()
    run(model, x)
    assert (counts() > before) == (kind not in (Read, Between, InPlace, Function))
    for training in (True, False):
        assert_same(model.train(training), plain.train(training), x)
        assert_same(model, plain, x, gradient=False)
    with torch.inference_mode():
        y = model(x)
        torch.testing.assert_close(y, plain(x))
        assert y.is_inference()
    if kind is Count:
        assert model.calls == plain.calls + 1


def test_the_graph_is_torchs_two_nodes(cpu_kernels):
    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8, requires_grad=True)
    for _ in range(2):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            h = model.c_fc(x)
            assert len(saved) == 2 and {t.data_ptr() for t in saved} == {x.data_ptr(), model.c_fc.weight.data_ptr()}
            a = model.gelu(h)
        assert len(saved) == 3 and saved[2].data_ptr() == h.data_ptr()
        (node,) = {n for n, _ in a.grad_fn.next_functions}
        assert node == h.grad_fn and len(node.next_functions) == 3
        assert not h.__dict__ and not a.__dict__


def test_every_tensor_between_is_torchs(cpu_kernels):
    """X2: whatever is done to the tensor between a Linear and the GELU that reads it."""
    x = torch.randn(6, 8)
    seen = []

    def keep(h):
        h.retain_grad()
        seen.append(h)
        return h

    def hook(h):
        h.register_hook(lambda g: g * 2)
        return h

    def change_gradient(how):
        def through(h):
            h.register_hook(how)
            return h

        return through

    def changed_without_grad(h):
        with torch.no_grad():
            h.mul_(2)
        return h

    def other_data(h):
        h.data = h.data * 3
        return h

    def through_data(h):
        h.data.mul_(2)
        return h

    def through_numpy(h):
        h.detach().numpy()[:] *= 2
        return h

    throughs = {
        "nothing": lambda h: h,
        "retain_grad": keep,
        "hook": hook,
        "hook in place": change_gradient(lambda g: g.mul_(3) and None),
        "hook on data": change_gradient(lambda g: g.data.mul_(3) and None),
        "in place": lambda h: h.mul_(2),
        "no_grad in place": changed_without_grad,
        "set data": other_data,
        "data in place": through_data,
        "numpy": through_numpy,
        "detach": lambda h: h.detach().requires_grad_(),
        "detach in place": lambda h: h.detach_().requires_grad_(),
        "view": lambda h: h.view(3, 2, -1),
        "slice": lambda h: h[1:],
        "two readers": lambda h: h + h.exp(),
        "row in place": lambda h: h[0].mul_(2) is None or h,
    }
    model = MLP()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    for name, through in throughs.items():
        results = []
        for m in (model, plain):
            for _ in range(3 if m is model else 1):
                run(m, x)  # earlier calls change nothing
            m.zero_grad()
            leaf = x.clone().requires_grad_()
            h = through(m.c_fc(leaf))
            a = m.gelu(h)
            try:
                a.square().sum().backward()
            except RuntimeError as e:
                a = str(e)[:60]
            results.append((a if isinstance(a, str) else a.detach(), leaf.grad, m.c_fc.weight.grad, m.c_fc.bias.grad))
        for ours, torchs in zip(*results, strict=True):
            if isinstance(torchs, torch.Tensor):
                torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert ours == torchs, name
    torch.testing.assert_close(seen[0].grad, seen[1].grad)


def test_the_gradient_of_what_is_between(cpu_kernels):
    """`autograd.grad(loss, h)`, a change after the GELU has read, a second backward, the second derivative."""
    model, x = nnfast.accelerate(MLP()).double(), torch.randn(6, 8, dtype=torch.double, requires_grad=True)
    run(model, x.detach())
    h = model.c_fc(x)
    loss = model.gelu(h).square().sum()
    exact = torch.autograd.grad(TF.gelu(h).square().sum(), (h, model.c_fc.bias), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, h, retain_graph=True)[0], exact[0])
    for _ in range(2):
        (bias,) = torch.autograd.grad(loss, model.c_fc.bias, retain_graph=True)
        torch.testing.assert_close(bias, exact[1])
    assert torch.autograd.gradgradcheck(lambda x: model.gelu(model.c_fc(x)), (x,))
    h = model.c_fc(x)
    y = model.gelu(h)
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_sums_of_a_gradient_that_is_not_the_gelus_alone(cpu_kernels):
    """The bias's gradient counts every reader, and is found ready where there is but one."""
    model, x = nnfast.accelerate(MLP()), torch.randn(6, 8)
    plain = nnfast.restore(copy.deepcopy(model))
    with served("linear_backward.sums_found"):
        run(model, x)
    before = counts()
    results = []
    for m in (model, plain):
        m.zero_grad()
        h = m.c_fc(x)
        (m.gelu(h).square().sum() + h.square().sum()).backward()
        results.append(m.c_fc.bias.grad)
    torch.testing.assert_close(*results)
    assert counts() == before


def test_nothing_is_kept_that_nobody_reads(cpu_kernels):
    """Frozen weights keep no input, as torch's do not."""
    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8, requires_grad=True)
    model.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        model.c_fc(x)
    assert saved == [model.c_fc.weight.data_ptr()]


def test_hooks_fire_as_torchs(cpu_kernels):
    """G3: any hook on either child, after a call without hooks; and one on all modules at once."""
    model, x, fired = nnfast.accelerate(MLP()), torch.randn(3, 8), []
    plain = nnfast.restore(copy.deepcopy(model))
    registers = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
    for child in ("c_fc", "gelu"):
        for register in registers:
            run(model, x)
            handles = [
                getattr(getattr(m, child), f"register_{register}")(lambda *_: fired.append(1)) for m in (model, plain)
            ]
            assert_same(model, plain, x)
            assert len(fired) == 2, (child, register)
            fired.clear()
            for handle in handles:
                handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: fired.append(1) and None)
    model(x)
    handle.remove()
    assert len(fired) == 5


def test_children_are_looked_at_afresh(cpu_kernels):
    """G4, G5: whatever is put in a child's place runs."""
    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8, requires_grad=True)

    class Adapted(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    adapted, relu, gelu, linear = Adapted(8, 32), torch.nn.ReLU(), model.gelu, model.c_fc
    model(x)
    model.c_fc = adapted
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(adapted(x))))
    model.c_fc, model.gelu = linear, relu
    torch.testing.assert_close(model(x), model.c_proj(linear(x).relu()))
    model.gelu = torch.nn.GELU("tanh")
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x), approximate="tanh")))
    model.gelu = nn.GELU("tanh")
    for _ in range(3):
        torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x), approximate="tanh")))
    model.gelu = gelu
    torch.nn.utils.parametrizations.weight_norm(model.c_fc)
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x))))
    torch.nn.utils.parametrize.remove_parametrizations(model.c_fc, "weight")
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x))))
    del model.c_fc
    with pytest.raises(AttributeError, match="'MLP' object has no attribute 'c_fc'"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_and_autocast(dtype, autocast):
    """G2: the dtype of every output and gradient, and values as near as torch's."""
    model = torch.nn.Sequential(Block(), Function(), MLP(gelu=torch.nn.GELU("tanh"))).to(dtype)
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(2, 3, 8, dtype=dtype)
    exact = dtype == torch.float64 or dtype == torch.float32 and not autocast
    for _ in range(3):
        with torch.autocast("cpu", enabled=autocast):
            ours, torchs = run(model, x), run(plain, x)
        assert ours[0].dtype == torchs[0].dtype
        if exact:
            torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(ours[0], torchs[0], rtol=0.05, atol=0.05)
        assert [g.dtype for g in ours[2]] == [g.dtype for g in torchs[2]]


def test_checkpoint_and_threads(cpu_kernels):
    """G6: recomputed; in two threads at once."""
    model = Block()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(2, 3, 8)
    for reentrant in (True, False, True, False):
        assert_same(checkpointed(model, reentrant), checkpointed(plain, reentrant), x)
    failed = []

    def work(seed):
        try:
            y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
            for _ in range(20):
                torch.testing.assert_close(model(y), plain(y))
        except AssertionError as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    model.mlp.c_fc.compile(backend="eager")
    torch.testing.assert_close(model(x), plain(x))


def checkpointed(model, reentrant):
    class Checkpointed(tnn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    return Checkpointed()


def test_frozen_parameters(cpu_kernels):
    """G6: any of the weights frozen, and None where torch has None."""
    for frozen in ("c_fc.weight", "c_fc.bias", "c_proj.weight"):
        model = MLP()
        model.get_parameter(frozen).requires_grad_(False)
        plain = copy.deepcopy(model)
        nnfast.accelerate(model)
        for _ in range(2):
            assert_same(model, plain, torch.randn(3, 8))
        assert model.get_parameter(frozen).grad is None


def test_the_users_code_runs_as_written(tmp_path, monkeypatch, capsys):
    """X1: relative imports, globals read and written, prints once a call and none besides; the RNG stays."""
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("SHIFT = 2.0\n")
    (package / "model.py").write_text("""
import torch
import torch.nn.functional as F
SCALE, n = 3, 0

class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.noise = torch.nn.Linear(4, 8), torch.nn.GELU(), torch.rand(1)

    def forward(self, x):
        from .inner import SHIFT
        print("forward", torch.rand(1).shape)

        def count():
            global n
            n += 1

        count()
        return F.gelu(self.act(self.fc(x))) * globals().get("SCALE", 1) + SHIFT
""")
    monkeypatch.syspath_prepend(tmp_path)
    import theirs.model as user

    model, x = user.M(), torch.randn(2, 4)
    plain = copy.deepcopy(model)
    state = torch.get_rng_state()
    nnfast.accelerate(model)
    nnfast.report(model)
    assert torch.equal(torch.get_rng_state(), state) and user.n == 0 and capsys.readouterr().out == ""
    for k in range(3):
        ours, torchs = model(x), plain(x)
        torch.testing.assert_close(ours, torchs)
        assert user.n == 2 * k + 2 and capsys.readouterr().out.count("forward") == 2
    user.SCALE = 5
    torch.testing.assert_close(model(x), plain(x))


def test_accelerate_patches_nothing_of_the_process():
    """X1: neither `Module.__call__` nor a class is ever patched, so another thread sees them as they are."""
    call, seen, stop = torch.nn.Module.__call__, [], threading.Event()

    def watch():
        while not stop.is_set():
            seen.append(torch.nn.Module.__call__ is call)

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(20):
        model = nnfast.accelerate(Block())
        model(torch.randn(3, 5, 8))
        nnfast.report(model)
    stop.set()
    thread.join()
    assert all(seen)


def test_no_class_is_kept_alive():
    """X3: a class of the user's goes when its last module has gone."""

    def use():
        class Mine(MLP):
            def forward(self, x):
                return self.c_proj(F.gelu(self.c_fc(x)))

        model = nnfast.accelerate(Mine())
        model(torch.randn(2, 8)).sum().backward()
        nnfast.report(model)
        return weakref.ref(Mine)

    kind = use()
    gc.collect()
    assert kind() is None


def test_a_subclass_of_the_users_pickles_as_itself():
    """X3: its base is a class whose modules are accelerated as well."""
    model = nnfast.accelerate(Scaled())
    again = pickle.loads(pickle.dumps(type(model)()))
    assert type(again) is Scaled and type(nnfast.accelerate(again)) is Scaled
    x = torch.randn(2, 8)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))


class Scaled(MLP):
    def forward(self, x):
        return super().forward(x) * 100


def test_prune_parametrize_and_shard_then_restore():
    """X3: what somebody has done since stays, under restore as well."""
    from torch.nn.utils import prune

    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8)
    prune.l1_unstructured(model.c_fc, "weight", 0.5)
    torch.nn.utils.parametrize.register_parametrization(model.c_proj, "weight", torch.nn.Identity())

    class Sharded(type(model.gelu)):
        """As fully_shard does: a class made of the one that is there."""

    model.gelu.__class__ = Sharded
    expected, parametrized = model(x), type(model.c_proj)
    nnfast.restore(model)
    assert type(model.c_fc) is torch.nn.Linear and type(model.c_proj) is parametrized and type(model.gelu) is Sharded
    torch.testing.assert_close(model(x), expected)
    assert model.c_fc.weight.eq(0).sum() == model.c_fc.weight.numel() // 2


def test_converters_of_linears_find_them():
    """X3: as bitsandbytes, torchao and PEFT look for them; a fused module is none, so that no GELU is dropped."""
    model = nnfast.accelerate(torch.nn.Sequential(MLP(), nn.LinearGELU(8, 8)))
    found = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert found == ["0.c_fc", "0.c_proj"]
    plain, x = nnfast.restore(copy.deepcopy(model)), torch.randn(3, 8)
    for m in (model, plain):
        for name in found:
            old = m.get_submodule(name)
            new = torch.nn.Linear(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            m.set_submodule(name, new)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.filterwarnings("ignore")
def test_quantized():
    plain, x = MLP().eval(), torch.randn(3, 8)
    model = nnfast.accelerate(copy.deepcopy(plain))
    model(x)
    ours, theirs = (
        torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}) for m in (nnfast.restore(model), plain)
    )
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    torch.testing.assert_close(nnfast.accelerate(ours)(x), theirs(x))


# ---- GELUs of other libraries ----


@pytest.mark.parametrize("name", ["GELUActivation", "GELUTanh", "NewGELUActivation", "FastGELUActivation"])
def test_gelus_of_transformers(name, cpu_kernels):
    activations = pytest.importorskip("transformers.activations")
    model = MLP(gelu=getattr(activations, name)())
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    assert repr(model) == repr(plain)
    x = torch.randn(3, 8) * 8
    for _ in range(2):
        assert_same(model, plain, x)
    with served("linear_backward.sums_found"):
        assert_same(model.eval(), plain.eval(), x)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), plain(x))
    for values in (torch.linspace(-9, 9, 99, dtype=torch.float64), torch.arange(-3, 3)):
        try:
            expected = plain.gelu(values)
        except (RuntimeError, NotImplementedError) as e:
            with pytest.raises(type(e)):
                model.gelu(values)
        else:
            torch.testing.assert_close(model.gelu(values), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.script(model.gelu)(x), plain.gelu(x), rtol=1e-5, atol=1e-5)
    assert kinds(nnfast.restore(model)) == kinds(plain)


def test_a_gelu_keeps_what_its_class_defines(monkeypatch, cpu_kernels):
    kind = pytest.importorskip("transformers.activations").GELUActivation
    monkeypatch.setattr(kind, "scale", 2, raising=False)
    monkeypatch.setattr(kind, "scaled", lambda self, x: self(x) * self.scale, raising=False)
    monkeypatch.setattr(kind, "named", property(lambda self: f"{self.scale} {self}"), raising=False)
    monkeypatch.setattr(kind, "twice", staticmethod(lambda x: 2 * x), raising=False)
    monkeypatch.setattr(kind, "made", classmethod(lambda cls: cls()), raising=False)
    model = nnfast.accelerate(torch.nn.Sequential(kind()))
    assert type(model[0]) is not kind
    x = torch.randn(9)
    torch.testing.assert_close(model[0].scaled(x), 2 * kind()(x))
    assert (model[0].scale, model[0].named, model[0].twice(3)) == (2, f"2 {kind()}", 6)
    assert type(model[0].made()) is kind
    for missing in ("mro", "nothing"):
        with pytest.raises(AttributeError, match=missing):
            getattr(model[0], missing)


@pytest.mark.torch_serves("what computes something else is left alone")
def test_a_gelu_is_what_it_computes_not_its_name(monkeypatch):
    """A library's class that has come to compute something else, or nothing that we can look at, is left alone."""
    activations = pytest.importorskip("transformers.activations")
    for forward in (lambda self, x: x * torch.sigmoid(1.702 * x), lambda self, x: x.view(2, 2, 2)):
        monkeypatch.setattr(activations.GELUActivation, "forward", forward)
        model = nnfast.accelerate(torch.nn.Sequential(activations.GELUActivation(), activations.QuickGELUActivation()))
        assert kinds(model)[1:] == [activations.GELUActivation, activations.QuickGELUActivation]
        assert {name for name, _ in nnfast.report(model).left} == {"0", "1"}


def test_a_forward_on_the_instance_is_left():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].forward = lambda x: x
    assert type(nnfast.accelerate(model)[0]) is torch.nn.Linear and "on the instance" in str(nnfast.report(model))
    gelu = pytest.importorskip("transformers.activations").GELUActivation()
    gelu.forward = lambda x: x
    model = torch.nn.Sequential(gelu)
    assert nnfast.accelerate(model)[0] is gelu and "on the instance" in str(nnfast.report(model))


def test_wrapped_models_and_tracers():
    """G7: inside a wrapper; traced and scripted while accelerated and after."""
    model = torch.nn.DataParallel(Block())
    x = torch.randn(2, 3, 8)
    expected = model(x)
    nnfast.accelerate(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert "module.mlp.c_fc" in dict(nnfast.report(model).served)
    mlp = model.module.mlp
    torch.testing.assert_close(torch.fx.symbolic_trace(mlp)(x), mlp(x))
    torch.testing.assert_close(torch.jit.trace(mlp, x, check_trace=False)(x), mlp(x))
    torch.testing.assert_close(torch.jit.script(mlp)(x), mlp(x))
    torch.testing.assert_close(torch.jit.script(model.module.ln_1)(x), model.module.ln_1(x))
    for each in (mlp, nnfast.restore(mlp)):
        traced = torch.fx.symbolic_trace(each)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["c_fc", "gelu", "c_proj", "dropout"]
    encoder = nnfast.accelerate(torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 16), torch.nn.Linear(8, 8)))
    for each in (encoder, copy.deepcopy(encoder), nnfast.restore(encoder)):
        assert [n.target for n in torch.fx.symbolic_trace(each).graph.nodes] == ["input", "0", "1", "output"]
    assert not any("__module__" in vars(module) for module in encoder.modules())


def test_encoder(cpu_kernels):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(16), enable_nested_tensor=False)
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(2, 5, 16)
    for _ in range(2):
        assert_same(model, plain, x)
    with served("linear_backward.sums_found"):
        assert_same(model, plain, x)
    assert len(nnfast.report(model).served) == 2 * 6 + 1


def test_a_class_that_somebody_patched():
    """The forward that a user gave torch's class is the one that runs."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    forward = torch.nn.Linear.forward
    torch.nn.Linear.forward = functools.wraps(forward)(lambda self, input: 2 * forward(self, input))
    try:
        nnfast.accelerate(model)
        assert [type(m) for m in model] == [torch.nn.Linear, nn.GELU]
        assert nnfast.report(model).left == [("0", "its forward was replaced in its class")]
    finally:
        torch.nn.Linear.forward = forward
    assert type(nnfast.accelerate(model)[0]) is nn.Linear
