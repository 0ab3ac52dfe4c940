"""accelerate, where a GELU reads a Linear: what comes between them is torch's (X2); and GELUs of other libraries."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from common import left_to_torch, served
from user_models import MLP, Function, assert_same, kinds, run

import nnfast


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


@pytest.mark.parametrize("kind", [MLP, Method, Branch, Count, Read, Twice, Keyed, Between, InPlace, Function, Written])
def test_a_gelu_that_reads_a_linear(kind, cpu_kernels):
    """However the one comes to the other; the bias's sums are handed over where the GELU alone reads it."""
    model = kind()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(3, 8)
    with (left_to_torch if kind in (Read, Between, InPlace, Function) else served)("linear_backward.sums_found"):
        run(model, x)
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
    exact = torch.autograd.grad(F.gelu(h).square().sum(), (h, model.c_fc.bias), retain_graph=True)
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
    results = []
    with left_to_torch("linear_backward.sums_found"):
        for m in (model, plain):
            m.zero_grad()
            h = m.c_fc(x)
            (m.gelu(h).square().sum() + h.square().sum()).backward()
            results.append(m.c_fc.bias.grad)
    torch.testing.assert_close(*results)


def test_nothing_is_kept_that_nobody_reads(cpu_kernels):
    """Frozen weights keep no input, as torch's do not."""
    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8, requires_grad=True)
    model.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        model.c_fc(x)
    assert saved == [model.c_fc.weight.data_ptr()]


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
