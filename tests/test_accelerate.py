"""accelerate, restore, report. G3 .. G7 are the rows of the contract (tests/README.md)."""

import copy
import pickle
import re
import threading

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF
from torch.utils.checkpoint import checkpoint

import nnfast
import nnfast.functional
import nnfast.nn as nn

# Code as in a user's file that has never heard of us.
F = TF
FACTOR = 1.0


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
    assert nn.LayerNorm in once and nn.Sequential in once and nn.GELU in once and nn.TransformerEncoderLayer in once
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
    nnfast.accelerate(torch.nn.ModuleList([build(), Block()]))
    assert [dict(vars(c)) for c in classes] == before and type(torch.nn.LayerNorm(3)) is torch.nn.LayerNorm
    assert kinds(build())[0] is torch.nn.Sequential and type(Block().mlp) is MLP


def test_deepcopy_and_pickle():
    model = nnfast.accelerate(torch.nn.Sequential(build(), torch.nn.Linear(16, 8), Block()))
    x = torch.randn(2, 5, 8)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(again) == kinds(model)
        torch.testing.assert_close(again(x), model(x))
        assert not {nn.LayerNorm, type(model[2].mlp)} & set(kinds(nnfast.restore(again)))


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

    model = build()
    before = norms(model)
    assert norms(nnfast.accelerate(model)) == before


def test_report():
    model = build()
    text = str(nnfast.report(model))
    assert "nnfast.accelerate" in text and "Centred" in text
    report = nnfast.report(nnfast.accelerate(model))
    assert ("", "Sequential, 1 Linear+GELU fused") in report.served and ("5", "Own: F.layer_norm") in report.served
    assert [name for name, _ in report.left] == ["4"]
    assert ("2", "LayerNorm") in report.served and re.search(r"served: 2 +LayerNorm\n", str(report))


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


class Residual(MLP):
    def forward(self, x):
        return x + self.c_proj(self.gelu(self.c_fc(x)))


class Function(MLP):
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Method(MLP):
    def forward(self, x):
        return self.c_proj(self.activated(x))

    def activated(self, x):
        return self.gelu(self.c_fc(x))


class Twice(MLP):
    def forward(self, x):
        return self.gelu(self.c_fc(x)) - self.gelu(self.c_fc(x * 2))


class Super(MLP):
    def forward(self, x):
        return super().forward(x) * 2


class Gated(MLP):
    def forward(self, x):
        c_fc = self.c_fc
        assert isinstance(c_fc, tnn.Linear) and c_fc.weight is self.c_fc.weight
        return self.c_proj(self.gelu(c_fc(x)) * c_fc.weight.sum(1))


class Read(MLP):
    def forward(self, x):
        h = self.c_fc(x)
        return self.gelu(h) + h


class Between(MLP):
    def forward(self, x):
        return self.c_proj(self.gelu(F.dropout(self.c_fc(x), 0.5, self.training)))


class InTraining(MLP):
    def forward(self, x):
        h = self.c_fc(x)
        return self.gelu(h.relu() if self.training else h)


class Branch(MLP):
    def forward(self, x):
        return self.gelu(self.c_fc(x)) if x.sum() > -1e9 else x


class Count(MLP):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.gelu(self.c_fc(x))


class Mixed(MLP):
    def forward(self, x):
        return self.gelu(self.c_fc(x)) + self.c_fc(x)


class FunctionElsewhere(MLP):
    def forward(self, x):
        return self.c_proj(activation(self.c_fc(x)))


class Iterated(tnn.Sequential):
    def __init__(self):
        super().__init__(tnn.Linear(8, 8), tnn.GELU())


def activation(x):
    return F.gelu(x)


@pytest.fixture
def fused(monkeypatch):
    """The Linears of the last call that were computed with their GELU, by their output sizes."""
    calls, real = [], nnfast.functional._linear_gelu_pre

    def count(*args):
        result = real(*args)
        if result is not None:
            calls.append(args[1].shape[0])
        return result

    monkeypatch.setattr(nnfast.functional, "_linear_gelu_pre", count)
    return calls


def assert_same(model, plain, *args):
    """Output and all gradients, those of the inputs too."""
    results = []
    for m in (model, plain):
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
        torch.manual_seed(1)
        y = m(*inputs)
        leaves = [t for t in (*inputs, *m.parameters()) if t.requires_grad]
        for t in leaves:
            t.grad = None
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y.detach(), [t.grad for t in leaves]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


FUSED = [MLP, Residual, Function, Method, Twice, Super, Gated]
LEFT = {
    Read: "c_fc is read by 2",
    Between: "does not read a Linear",
    InTraining: "differs between training and evaluation",
    Branch: "cannot be traced",
    Count: "writes attributes",
    Mixed: "",
    FunctionElsewhere: "another way",
    Iterated: "off self by its name",
}


@pytest.mark.parametrize("kind", [*FUSED, *LEFT])
def test_a_linear_that_only_a_gelu_reads(kind, cpu_kernels, fused):
    """G3, G4: in training, in evaluation, without gradients, in inference mode."""
    model = kind()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    for training in (True, False):
        fused.clear()
        assert_same(model.train(training), plain.train(training), torch.randn(3, 8))
        assert bool(fused) == (kind in FUSED)
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model(x=x), plain(x=x)) if kind is not Iterated else None
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))
    assert [name for name, what in nnfast.report(model).served if "as one op" in what] == [""] * (kind in FUSED)
    if LEFT.get(kind):
        assert any(LEFT[kind] in why for _, why in nnfast.report(model).left)


def test_what_a_trace_did_not_see(cpu_kernels, fused):
    """A forward that goes another way later computes what it says, though a pair was seen in it."""

    class Later(MLP):
        seen, stop = None, False

        def forward(self, x):
            h = self.c_fc(x)
            if self.flag == "scaled":
                h = h * 3
            if self.flag == "no_grad":
                with torch.no_grad():
                    a = self.gelu(h)
                return a + h
            if self.flag == "hooked" and h.requires_grad:
                h.register_hook(lambda g: g * 2)
            if self.flag == "read":
                return self.gelu(h) + h.exp()
            if self.flag == "tanh":
                return F.gelu(h, approximate="tanh")
            if self.flag == "error":
                raise ValueError(self.flag)
            if self.flag == "twice":
                return self.gelu(h).mul_(2) + self.gelu(h)
            return self.gelu(h)

    model = Later()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    for flag in (False, "scaled", "no_grad", "hooked", "read", "twice", "tanh", False):
        model.flag = plain.flag = flag
        assert_same(model, plain, torch.randn(3, 8))
    assert fused
    model.flag = plain.flag = "error"
    with pytest.raises(ValueError, match="error"):
        model(torch.randn(3, 8))


def test_in_place_change_that_a_trace_did_not_see(cpu_kernels):
    class Later(MLP):
        def forward(self, x):
            h = self.c_fc(x)
            if self.flag:
                h.mul_(2)
            return self.gelu(h)

    model = nnfast.accelerate(Later())
    model.flag = True
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), TF.gelu(2 * TF.linear(x, model.c_fc.weight, model.c_fc.bias)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()


def test_a_direct_call_is_the_linears_own(cpu_kernels, fused):
    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8)
    assert type(model.c_fc) is nn.Linear and type(model.c_proj) is nn.Linear
    y = model.c_fc(x)
    torch.testing.assert_close(y, TF.linear(x, model.c_fc.weight, model.c_fc.bias), rtol=0, atol=0)
    assert not fused and not y.__dict__
    model(x)
    assert fused


def test_hooks_turn_the_fusion_off(cpu_kernels, fused):
    """G3: any hook on either child."""
    model, x, fired = nnfast.accelerate(MLP()), torch.randn(3, 8, requires_grad=True), []
    registers = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
    for child in (model.c_fc, model.gelu):
        for register in registers:
            handle = getattr(child, f"register_{register}")(lambda *_: fired.append(1))
            model(x).sum().backward()
            assert fired.pop() and not fired and not fused, (child, register)
            handle.remove()
            model(x)
            assert fused.pop()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: fired.append(1) and None)
    model(x)
    handle.remove()
    assert len(fired) == 5 and not fused


def test_children_are_looked_at_afresh(cpu_kernels, fused):
    """G4, G5: whatever is put in a child's place runs."""
    model, x = nnfast.accelerate(MLP()), torch.randn(3, 8)

    class Adapted(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    adapted, relu, gelu, linear = Adapted(8, 32), torch.nn.ReLU(), model.gelu, model.c_fc
    model.c_fc = adapted
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(adapted(x))))
    assert not fused and "by themselves for now" in str(nnfast.report(model))
    model.c_fc, model.gelu = linear, relu
    torch.testing.assert_close(model(x), model.c_proj(linear(x).relu()))
    model.gelu = torch.nn.GELU("tanh")
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x), approximate="tanh")))
    assert not fused
    torch.nn.utils.parametrizations.weight_norm(model.c_fc)
    model.gelu = gelu
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x))))
    assert not fused
    torch.nn.utils.parametrize.remove_parametrizations(model.c_fc, "weight")
    torch.testing.assert_close(model(x), model.c_proj(TF.gelu(linear(x))))
    assert fused
    del model.c_fc
    with pytest.raises(AttributeError, match="'MLP' object has no attribute 'c_fc'"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_and_autocast(dtype, autocast):
    """G2: the dtype of every output, and values as near as torch's."""
    model = torch.nn.Sequential(Block(), Function(), MLP(gelu=NewGELU())).to(dtype)
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(2, 3, 8, dtype=dtype)
    with torch.autocast("cpu", enabled=autocast):
        y, expected = model(x), plain(x)
    assert y.dtype == expected.dtype
    exact = dtype == torch.float64 or dtype == torch.float32 and not autocast
    torch.testing.assert_close(y, expected, **({} if exact else {"rtol": 0.05, "atol": 0.05}))


def test_checkpoint_threads_and_compiled_child(cpu_kernels, fused):
    """G6: recomputed, in two threads at once, beside a compiled child."""
    model = Block()
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(2, 3, 8)
    for reentrant in (True, False):
        assert_same(lambda_module(model, reentrant), lambda_module(plain, reentrant), x)
    assert len(fused) == 4
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
    fused.clear()
    model.mlp.c_fc.compile(backend="eager")
    torch.testing.assert_close(model(x), plain(x))
    assert not fused


def lambda_module(model, reentrant):
    class Checkpointed(tnn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    return Checkpointed()


def test_frozen_parameters(cpu_kernels, fused):
    """G6: any of the weights frozen, and None where torch has None."""
    for frozen in ("c_fc.weight", "c_fc.bias", "c_proj.weight"):
        model = MLP()
        model.get_parameter(frozen).requires_grad_(False)
        plain = copy.deepcopy(model)
        nnfast.accelerate(model)
        assert_same(model, plain, torch.randn(3, 8))
        assert fused and model.get_parameter(frozen).grad is None


def test_own_layer_norm(monkeypatch):
    """A forward that calls F.layer_norm finds ours, and all else that it reads as it is at the call."""
    model = LayerNorm(8)
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    assert_same(model, plain, torch.randn(3, 8))
    calls, real = [], nnfast.functional._layer_norm
    monkeypatch.setattr(nnfast.functional, "_layer_norm", lambda *args: calls.append(args) or real(*args))
    model(torch.randn(3, 8))
    assert len(calls) == 1

    class Scaled(LayerNorm):
        def forward(self, input, scale=2, *, shift=1):
            return F.layer_norm(input, self.weight.shape, self.weight, None, self.eps) * scale * FACTOR + shift

    model = nnfast.accelerate(Scaled(8))
    x = torch.randn(3, 8)
    for eps, factor in ((1e-5, 1.0), (1.0, 3.0)):
        model.eps = eps
        monkeypatch.setitem(globals(), "FACTOR", factor)
        torch.testing.assert_close(model(x, shift=4), TF.layer_norm(x, (8,), eps=eps) * 2 * factor + 4)
    assert len(calls) == 3
    monkeypatch.setattr(Scaled, "forward", lambda self, input: input)
    assert model(x) is x


class NewGELU(tnn.Module):
    """minGPT's."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class ErfGELU(tnn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / 2.0**0.5))


class FastGELU(tnn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


class CalledGELU(tnn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class QuickGELU(tnn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class NearlyGELU(tnn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.79788 * (x + 0.044715 * torch.pow(x, 3.0))))


class ClippedGELU(tnn.Module):
    def forward(self, x):
        return torch.clip(F.gelu(x), -10, 10)


class TrainingGELU(tnn.Module):
    def forward(self, x):
        return F.gelu(x) if self.training else F.gelu(x, approximate="tanh")


class CountingGELU(tnn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return 0.5 * x * (1.0 + torch.erf(x / 2.0**0.5))


GELUS = {NewGELU: "tanh", ErfGELU: "none", FastGELU: "tanh", CalledGELU: "tanh"}
GELUS |= dict.fromkeys([QuickGELU, NearlyGELU, ClippedGELU, TrainingGELU, CountingGELU])


@pytest.mark.parametrize("kind", GELUS)
def test_a_gelu_is_known_by_its_formula(kind, cpu_kernels, fused):
    model = MLP(gelu=kind())
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    x = torch.randn(3, 8) * 8
    assert_same(model, plain, x)
    assert_same(model.eval(), plain.eval(), x)
    assert len(fused) == (2 if GELUS[kind] else 0)
    served = dict(nnfast.report(model).served).get("gelu", "")
    assert (f"approximate={GELUS[kind]!r}" in served) == bool(GELUS[kind])
    if kind is CountingGELU:
        assert model.gelu.calls == plain.gelu.calls == 2
    if kind is QuickGELU:
        assert "gelu" in dict(nnfast.report(model).left)


@pytest.mark.parametrize("kind", [NewGELU, ErfGELU, FastGELU])
@pytest.mark.parametrize("x", [torch.linspace(-9, 9, 99, dtype=torch.float64), torch.arange(-3, 3)])
def test_a_formula_elsewhere_is_its_own(kind, x):
    """In float64, which would see a constant of ten digits, and where torch's GELU would raise."""
    model = nnfast.accelerate(torch.nn.Sequential(kind()))
    torch.testing.assert_close(model(x), kind()(x), rtol=0, atol=0)
    with pytest.raises(TypeError):
        model[0](x, x)


def test_a_class_made_is_no_event():
    """Nor is a call: no subclass is registered, nothing is finalized."""
    made, gone = [], []

    class Registered(MLP):
        def __init_subclass__(cls, **kwargs):
            made.append(cls)

        def __del__(self):
            gone.append(1)

    class Meta(type):
        pass

    class WithMeta(MLP, metaclass=Meta):
        pass

    model = nnfast.accelerate(Registered())
    model(torch.randn(3, 8))
    assert not made and not gone and isinstance(model, Registered)
    assert type(model).__qualname__ == Registered.__qualname__ and "one op" in str(nnfast.report(model))
    model = nnfast.accelerate(WithMeta())
    assert type(model) is WithMeta and "metaclass" in str(nnfast.report(model))
    model = MLP()
    model.forward = lambda x: x
    assert type(nnfast.accelerate(model)) is MLP and "on the instance" in str(nnfast.report(model))


def test_a_forward_writes_to_its_module():
    class Keeps(MLP):
        def forward(self, x):
            h = self.gelu(self.c_fc(x))
            if x.requires_grad is True:
                self.last = h
            return h

    model, x = nnfast.accelerate(Keeps()), torch.randn(2, 8, requires_grad=True)
    assert "as one op" in str(nnfast.report(model))
    y = model(x)
    assert model.last is y


def test_wrapped_models_and_tracers():
    """G7: inside a wrapper; scripted and traced afterwards."""
    model = torch.nn.DataParallel(Block())
    x = torch.randn(2, 3, 8)
    expected = model(x)
    nnfast.accelerate(model)
    torch.testing.assert_close(model(x), expected)
    assert "module.mlp" in dict(nnfast.report(model).served)
    mlp = model.module.mlp
    traced = torch.fx.symbolic_trace(mlp)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"][0] == "c_fc"
    torch.testing.assert_close(traced(x), mlp(x))
    torch.testing.assert_close(torch.jit.trace(mlp, x, check_trace=False)(x), mlp(x))
    torch.testing.assert_close(torch.jit.script(mlp)(x), mlp(x))
    torch.testing.assert_close(torch.jit.script(model.module.ln_1)(x), model.module.ln_1(x))


def test_encoder():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, torch.nn.GELU(), batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(16), enable_nested_tensor=False)
    plain = copy.deepcopy(model)
    nnfast.accelerate(model)
    assert_same(model, plain, torch.randn(2, 5, 16))
    assert len(nnfast.report(model).served) == 2 * 6 + 1
