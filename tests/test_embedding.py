"""Embedding: torch's kernels, and a gradient in memory of ours. Rows of the contract: G6, X2, X3."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as TF
from common import DTYPES, every_allocation_fails, served, thresholds
from torch.utils.checkpoint import checkpoint

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F

EVERY = {"memory__large_bytes": 0}


def run(function, indices, weight, grad_out, **kwargs):
    output = function(indices, weight, **kwargs)
    return [output, *torch.autograd.grad(output, weight, grad_out)]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_to_the_bit(dtype):
    """Values and gradients over shapes, types of indices, padding and layouts, rows that are read twice or never."""
    weight = torch.randn(11, 5, dtype=torch.float64).to(dtype)
    weights = [weight, weight.t().contiguous().t(), torch.randn(11, 9).to(dtype)[:, 2:7]]
    indices = [torch.randint(11, s) for s in ((), (7,), (2, 3, 4), (0,))] + [torch.randint(11, (6, 4))[::2, ::3]]
    for w, i, kind, padding in itertools.product(weights, indices, (torch.int64, torch.int32), (None, 3, -1)):
        leaf, i = w.detach().requires_grad_(), i.to(kind)
        grad_out = torch.randn(*i.shape, 5).to(dtype)
        with thresholds(**EVERY), served("embedding"):
            ours = run(F.embedding, i, leaf, grad_out, padding_idx=padding)
        torchs = run(TF.embedding, i, leaf, grad_out, padding_idx=padding)
        for a, b in zip(ours, torchs, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


@pytest.mark.usefixtures("cpu_kernels")
def test_the_gradient_lies_in_memory_of_ours():
    """That of a large table; with or without the module."""
    model = nn.Embedding(5000, 128)
    live = nnfast.backend.native.memory()[0]
    with served("embedding"):
        model(torch.randint(5000, (30,))).sum().backward()
    assert nnfast.backend.native.memory()[0] - live == model.weight.nbytes
    model.zero_grad()
    assert nnfast.backend.native.memory()[0] == live


def test_what_is_torchs():
    """Small tables, no gradient, and every option that changes the weight or its gradient."""
    i = torch.randint(600, (5,))
    large = torch.randn(600, 1000, requires_grad=True)
    before = nnfast.backend.native.paths()["embedding"] if nnfast.backend.native else 0
    F.embedding(i, torch.randn(600, 4, requires_grad=True))
    F.embedding(i, large.detach())
    with torch.no_grad():
        F.embedding(i, large)
    F.embedding(i, large, scale_grad_by_freq=True)
    F.embedding(i, large, sparse=True)
    F.embedding(i, large, max_norm=1.0)
    assert (nnfast.backend.native.paths()["embedding"] if nnfast.backend.native else 0) == before


def test_errors_are_torchs():
    weight = torch.randn(600, 1000, requires_grad=True)
    for args in (
        (torch.tensor([600]), weight),
        (torch.tensor([-1]), weight),
        (torch.tensor([1.0]), weight),
        (torch.tensor([1]), weight, 600),
        (torch.tensor([1]), weight, -601),
        (torch.tensor([1]), weight[0]),
        ("x", weight),
        (torch.tensor([1]), None),
    ):
        with pytest.raises(Exception) as ours:
            F.embedding(*args)
        with pytest.raises(Exception) as theirs:
            TF.embedding(*args)
        assert type(ours.value) is type(theirs.value) and str(ours.value) == str(theirs.value)


@pytest.mark.usefixtures("cpu_kernels")
def test_modes():
    """Gradients of gradients, checkpoints, kept graphs, functorch, autocast, scripts and tied weights."""
    i, w = torch.randint(5, (2, 3)), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    with thresholds(**EVERY):
        assert torch.autograd.gradcheck(lambda w: F.embedding(i, w), w)
        assert torch.autograd.gradgradcheck(lambda w: F.embedding(i, w), w)
        model, plain = nn.Embedding(5, 4, 1), torch.nn.Embedding(5, 4, 1)
        plain.load_state_dict(model.state_dict())
        for m in (model, plain):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (m(i) + checkpoint(m, i, use_reentrant=False)).square().sum()
                loss = loss + TF.linear(torch.ones(4), m.weight).float().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        torch.testing.assert_close(model.weight.grad, plain.weight.grad)
        assert torch.equal(torch.jit.script(model)(i), plain(i)) and repr(model) == repr(plain)
        per_sample = torch.func.vmap(torch.func.grad(lambda w, i: F.embedding(i, w).sum()), (None, 0))
        expected = torch.func.vmap(torch.func.grad(lambda w, i: TF.embedding(i, w).sum()), (None, 0))
        assert torch.equal(per_sample(w.detach(), i), expected(w.detach(), i))


def test_accelerate():
    plain = torch.nn.Sequential(torch.nn.Embedding(7, 3, padding_idx=2), torch.nn.Linear(3, 7))
    plain[1].weight = plain[0].weight
    model = nnfast.accelerate(copy.deepcopy(plain))
    assert type(model[0]) is nn.Embedding and model[0].padding_idx == 2 and repr(model) == repr(plain)
    assert model[0].weight is model[1].weight and "Embedding" in str(nnfast.report(model))
    assert type(nnfast.restore(model)[0]) is torch.nn.Embedding


@pytest.mark.usefixtures("cpu_kernels")
def test_memory_that_runs_out():
    i, w = torch.randint(600, (5,)), torch.randn(600, 1000, requires_grad=True)
    assert every_allocation_fails(lambda: torch.autograd.grad(F.embedding(i, w).sum(), w)) > 1
