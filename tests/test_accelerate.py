"""accelerate, restore, report. G6, G7 are the rows of the contract (tests/README.md)."""

import copy
import pickle

import torch

import nnfast
import nnfast.nn as nn


class Own(torch.nn.LayerNorm):
    """A class of the user's own."""


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16),
        torch.nn.GELU(),
        torch.nn.LayerNorm(16),
        torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True),
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
    forward = torch.nn.LayerNorm.forward
    nnfast.accelerate(build())
    assert torch.nn.LayerNorm.forward is forward and type(torch.nn.LayerNorm(3)) is torch.nn.LayerNorm
    assert kinds(build())[0] is torch.nn.Sequential


def test_deepcopy_and_pickle():
    model = nnfast.accelerate(build())
    x = torch.randn(2, 5, 8)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(again) == kinds(model)
        torch.testing.assert_close(again(x), model(x))
        assert nn.LayerNorm not in kinds(nnfast.restore(again))


def test_restore_leaves_what_was_made_as_ours():
    model = torch.nn.ModuleList([nn.LayerNorm(3), torch.nn.LayerNorm(3)])
    nnfast.restore(nnfast.accelerate(model))
    assert [type(m) for m in model] == [nn.LayerNorm, torch.nn.LayerNorm]


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
    assert "nnfast.accelerate" in text and "Own" in text
    report = nnfast.report(nnfast.accelerate(model))
    assert ("", "Sequential, 1 Linear+GELU fused") in report.served
    assert [name for name, _ in report.left] == ["4"]
    assert ("2", "LayerNorm") in report.served and "2  LayerNorm" in str(report)
