"""Embedding: torch's arithmetic to the bit, its gradient in our memory. E1 is the contract's row."""

import copy

import pytest
import torch
import torch.nn.functional as TF
from common import DTYPES, assert_same_error, every_allocation_fails, left_to_torch, served, thresholds
from torch.utils.checkpoint import checkpoint

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F

# With these numbers ours serves a small table, whose gradient lies in a block of our memory.
LOW = {"embedding__table_bytes": 0, "memory__large_bytes": 256}

OPTIONS = [{}, {"padding_idx": 0}, {"padding_idx": 3}, {"padding_idx": -1}, {"scale_grad_by_freq": True}]


def gradient(embedding, indices, weight, **options):
    output = embedding(indices, weight, **options)
    grad = torch.linspace(-1, 1, output.numel()).view_as(output).to(weight.dtype)
    return [output, *torch.autograd.grad(output, weight, grad)]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    """E1: torch's to the bit, for every layout of the table and of the indices."""
    table = torch.randn(11, 6).to(dtype)
    for weight in (table, table.t().contiguous().t(), torch.stack([table, table], -1)[..., 0], table[:1].expand(11, 6)):
        weight = weight.detach().requires_grad_()
        for shape in ((5,), (2, 3), (), (0,), (40,)):
            for kind in (torch.int64, torch.int32):
                indices = torch.randint(11, shape, dtype=kind)
                for each in (indices, torch.stack([indices, indices], -1)[..., 0]):
                    for options in OPTIONS:
                        with thresholds(**LOW), served("embedding", "embedding.into_memory"):
                            ours = gradient(F.embedding, each, weight, **options)
                        for a, b in zip(ours, gradient(TF.embedding, each, weight, **options), strict=True):
                            assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


@pytest.mark.usefixtures("cpu_kernels")
def test_the_gradient_lies_in_memory_that_was_touched_before():
    """E1: in a block of ours, which the next step gets again."""
    weight, indices = torch.randn(1 << 14, 64, requires_grad=True), torch.arange(9)
    before = nnfast.backend.native.memory()[0]
    for _ in range(3):
        weight.grad = None
        assert nnfast.backend.native.memory()[0] == before
        with served("embedding"):
            F.embedding(indices, weight).sum().backward()
        assert nnfast.backend.native.memory()[0] == before + weight.nbytes
        assert weight.grad[:9].eq(1).all() and weight.grad[9:].eq(0).all()


@pytest.mark.usefixtures("some_kernels")
def test_what_is_torchs():
    """E1: small tables, no gradient, max_norm, sparse gradients; and their results."""
    weight, indices = torch.randn(11, 6, requires_grad=True), torch.tensor([3, 0, 3])
    calls = [
        ({"embedding__table_bytes": 1 << 20}, weight, {}),
        (LOW, weight.detach(), {}),
        (LOW, weight, {"sparse": True}),
        (LOW, weight.detach().clone(), {"max_norm": 1.0}),
    ]
    for numbers, table, options in calls:
        with thresholds(**numbers), left_to_torch("embedding"):
            ours = F.embedding(indices, table, **options)
        assert torch.equal(ours, TF.embedding(indices, table, **options))
        if options.get("sparse"):
            assert torch.autograd.grad(ours.sum(), table)[0].is_sparse
    with thresholds(**LOW), torch.no_grad(), left_to_torch("embedding"):
        F.embedding(indices, weight)
    with left_to_torch("embedding"):
        torch.func.grad(lambda w: F.embedding(indices, w).sum())(weight)
    with thresholds(**LOW), served("embedding"):  # the last call here is ours
        F.embedding(indices, weight)


@pytest.mark.usefixtures("some_kernels")
def test_errors_are_torchs():
    weight = torch.randn(5, 3, requires_grad=True)
    calls = [
        (torch.tensor([5]), weight, {}),
        (torch.tensor([-1]), weight, {}),
        (torch.tensor([0.5]), weight, {}),
        (torch.tensor([1]), weight, {"padding_idx": 5}),
        (torch.tensor([1]), weight, {"padding_idx": -6}),
        (torch.tensor([1]), torch.randn(5, requires_grad=True), {}),
        ([1], weight, {}),
        (torch.tensor([1]), weight, {"padding_idx": "a"}),
    ]
    with thresholds(**LOW):
        for indices, table, options in calls:
            assert_same_error(F.embedding, TF.embedding, indices, table, **options)
        F.embedding(torch.tensor([1]), weight)  # and what has no error is ours


@pytest.mark.usefixtures("cpu_kernels")
def test_gradients_of_gradients():
    weight, indices = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[1, 2], [1, 6]])
    with thresholds(**LOW):
        assert torch.autograd.gradcheck(lambda w: F.embedding(indices, w), weight)
        assert torch.autograd.gradgradcheck(lambda w: F.embedding(indices, w), weight)
        (once,) = torch.autograd.grad(F.embedding(indices, weight).square().sum(), weight, create_graph=True)
        (twice,) = torch.autograd.grad(once.square().sum(), weight)
    (once,) = torch.autograd.grad(TF.embedding(indices, weight).square().sum(), weight, create_graph=True)
    assert torch.equal(twice, torch.autograd.grad(once.square().sum(), weight)[0])


@pytest.mark.usefixtures("cpu_kernels")
def test_module():
    """E1: arguments, RNG order, keys, repr, from_pretrained; accelerate, restore, copies, hooks, checkpoints, ties."""
    for options in ({}, {"padding_idx": 2}, {"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        made = []
        for kind in (nn.Embedding, torch.nn.Embedding):
            torch.manual_seed(3)
            made.append(kind(7, 4, **options))
        ours, theirs = made
        assert isinstance(ours, torch.nn.Embedding) and repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict()) and torch.equal(ours.weight, theirs.weight)
        x = torch.tensor([[1, 2], [2, 6]])
        with thresholds(**LOW):
            assert torch.equal(ours(x), theirs(x))
    assert type(nn.Embedding.from_pretrained(torch.ones(2, 3))) is nn.Embedding

    def model():
        torch.manual_seed(5)
        embedding, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
        head.weight = embedding.weight
        return torch.nn.Sequential(embedding, head)

    theirs, ours = model(), nnfast.accelerate(model())
    assert type(ours[0]) is nn.Embedding and type(copy.deepcopy(ours)[0]) is nn.Embedding
    seen = []
    ours[0].register_full_backward_hook(lambda *_: seen.append("hook"))
    x = torch.tensor([1, 2, 2])
    with thresholds(**LOW), served("embedding", "embedding.into_memory"):
        for run in (lambda m: m(x), lambda m: checkpoint(m, x, use_reentrant=False)):
            for m in (ours, theirs):
                run(m).square().sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, theirs[0].weight.grad)
    assert seen and type(nnfast.restore(ours)[0]) is torch.nn.Embedding
    with thresholds(**LOW):
        scripted = torch.jit.script(nn.Embedding(7, 4))
        assert torch.equal(scripted(x), TF.embedding(x, scripted.weight))


@pytest.mark.usefixtures("cpu_kernels")
def test_an_allocation_that_fails_changes_nothing():
    weight, indices = torch.randn(300, 24, requires_grad=True), torch.tensor([3, 5, 3])

    def call():
        return gradient(F.embedding, indices, weight)

    with thresholds(**LOW):
        assert every_allocation_fails(call) >= 2


@pytest.mark.usefixtures("cpu_kernels")
def test_opcheck():
    weight = torch.randn(7, 3, requires_grad=True)
    for args in ((weight, torch.tensor([1, 2])), (weight.detach(), torch.tensor([[1]]), 2, True)):
        torch.library.opcheck(torch.ops.nnfast.embedding.default, args)
