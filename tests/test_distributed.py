"""Two ranks over gloo: DDP, FSDP2 and tensor parallelism train to torch's numbers. A10, L11 and "Across".

Each function of SCENARIOS runs in both ranks, of one pair of processes that serves all the tests here.
"""

import datetime
import itertools
import os
import pickle
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import left_to_torch, served
from test_linear_gelu import TorchsLinearGELU
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import nnfast
import nnfast.nn as nn
import nnfast.optim as optim
from nnfast import backend

RANKS = 2


def build(ours):
    """One model in both libraries, with sizes that two ranks cannot share evenly, and one of a single row."""
    lib, linear_gelu = (nn, nn.LinearGELU) if ours else (torch.nn, TorchsLinearGELU)
    torch.manual_seed(0)
    return lib.Sequential(
        lib.LayerNorm(7), lib.Linear(7, 33), lib.GELU(), linear_gelu(33, 5), lib.LayerNorm(5), lib.Linear(5, 1)
    )


def adamw(ours, model):
    return (optim.AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=0.05, weight_decay=0.1)


def train(ours, model, optimizer, steps, first=0):
    """Each rank on data of its own. Ours may not fall back: the backend is forced."""
    with backend.use_backend("cpu" if ours else "torch"):
        for step in range(first, first + steps):
            torch.manual_seed(100 * step + dist.get_rank())
            model(torch.randn(4, 7)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def full(model):
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def same(a, b):
    # Five steps of float32, in which a difference of one rounding is carried on.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def shard(model):
    for child in model:
        fully_shard(child)
    return fully_shard(model)


def ddp(_):
    results = []
    for ours in (True, False):
        model = DistributedDataParallel(build(ours))
        train(ours, model, adamw(ours, model), 5)
        results.append(full(model))
    same(*results)


def fsdp2(_):
    """A10: the kernels step the local shards, an empty one too, and the DTensor's version counts up."""
    results = []
    for ours in (True, False):
        model = shard(build(ours))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizer = adamw(ours, model)
        train(ours, model, optimizer, 5)
        p = next(model.parameters())
        assert isinstance(optimizer.state[p]["exp_avg"], DTensor) and not isinstance(
            optimizer.state[p]["step"], DTensor
        )
        version = p._version
        train(ours, model, optimizer, 1, first=5)
        assert p._version > version
        results.append(full(model))
    same(*results)
    assert not all(torch.equal(a, b) for a, b in zip(results[0], full(build(True)), strict=True))


def accelerated(_):
    """X3: swapped before or after it is sharded, and restored, it trains as torch does; FSDP keeps its classes."""
    results = []
    for when in ("never", "before", "after"):
        model = build(False)
        if when == "before":
            nnfast.accelerate(model)
        model = shard(model)
        sharded = [type(m) for m in model.modules()]
        if when == "after":
            nnfast.accelerate(model)
        optimizer = adamw(False, model)
        with (served if when == "before" else left_to_torch)("linear"):
            for step in range(4):
                if step == 2:
                    nnfast.restore(model)
                torch.manual_seed(100 * step + dist.get_rank())
                model(torch.randn(4, 7)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert [type(m) for m in model.modules()] == sharded
        results.append(full(model))
    same(results[0], results[1])
    same(results[0], results[2])


def clipped(_):
    """The norm is over all ranks: as an option of AdamW's, as a call of ours, and as torch's call."""
    results, norms = [], []
    for how in ("torch", "ours", "max_grad_norm"):
        model = shard(build(how != "torch"))
        if how == "max_grad_norm":
            optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, max_grad_norm=0.01)
        else:
            optimizer = adamw(how == "ours", model)
        clip = (torch.nn if how == "torch" else nn).utils.clip_grad_norm_
        norms.append([])
        for step in range(3):
            torch.manual_seed(100 * step + dist.get_rank())
            model(torch.randn(4, 7)).square().mean().backward()
            norm = None if how == "max_grad_norm" else clip(model.parameters(), 0.01)
            optimizer.step()
            norm = optimizer.grad_norm if norm is None else norm
            norms[-1].append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            optimizer.zero_grad()
        results.append(full(model))
    assert norms[0][0] > 0.01
    for other in (1, 2):
        same(norms[other], norms[0])
        same(results[other], results[0])


def other_optimizers(_):
    """A10, for SGD and RMSprop."""
    for name, options in (("SGD", {"momentum": 0.9}), ("RMSprop", {"centered": True, "momentum": 0.5})):
        results = []
        for ours in (True, False):
            model = shard(build(ours))
            optimizer = getattr(optim if ours else torch.optim, name)(model.parameters(), lr=0.01, **options)
            train(ours, model, optimizer, 3)
            results.append(full(model))
        same(*results)


def checkpoint(folder):
    """A3, A10: three steps in one library, saved by both ranks, three in the other: as six in torch's."""
    whole = shard(build(False))
    train(False, whole, adamw(False, whole), 6)
    for first, second in ((True, False), (False, True)):
        model = shard(build(first))
        optimizer = adamw(first, model)
        train(first, model, optimizer, 3)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{first}")
        model = shard(build(second))
        optimizer = adamw(second, model)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{first}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        train(second, model, optimizer, 3, first=3)
        same(full(model), full(whole))


def tensor_parallel(_):
    """L11: the modules run torch's ops on DTensors; the optimizer is right whatever its gradients are."""
    mesh = init_device_mesh("cpu", (RANKS,))
    results = []
    for ours, parallel in ((True, True), (False, True), (False, False)):
        lib = nn if ours else torch.nn
        torch.manual_seed(0)
        model = lib.Sequential(
            lib.LayerNorm(8), lib.Linear(8, 12), lib.GELU(), lib.Linear(12, 8), lib.Linear(8, 6), lib.Linear(6, 4)
        )
        if parallel:
            plan = {
                "0": SequenceParallel(),
                "1": ColwiseParallel(input_layouts=Shard(1)),
                "3": RowwiseParallel(),
                "4": ColwiseParallel(),
                "5": RowwiseParallel(),
            }
            model = parallelize_module(model, mesh, plan)
        optimizer = adamw(ours, model)
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(2, 6, 8)
            if parallel:
                x = distribute_tensor(x, mesh, [Shard(1)])
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(full(model))
    same(results[0], results[1])
    same(results[0], results[2])


def placements(_):
    """A10: shards of parameter, gradient and state that are cut alike are stepped here, all others by torch."""
    mesh = init_device_mesh("cpu", (RANKS,))
    value, grad = torch.arange(12.0).view(6, 2), torch.arange(12.0).view(6, 2) - 5
    cuts = [Replicate(), Shard(0), Shard(1)]
    for param_cut, grad_cut, native in [
        *((cut, cut, True) for cut in cuts),
        (Replicate(), Shard(0), False),
        (Shard(0), Replicate(), False),
        (Replicate(), Partial(), False),
    ]:
        results = []
        for kind in (optim.AdamW, torch.optim.AdamW):
            p = torch.nn.Parameter(distribute_tensor(value.clone(), mesh, [param_cut]))
            if grad_cut.is_partial():
                p.grad = DTensor.from_local(grad / RANKS, mesh, [grad_cut])
            else:
                p.grad = distribute_tensor(grad, mesh, [grad_cut])
            q = torch.ones(3, requires_grad=True)  # a plain one beside it
            q.grad = torch.ones(3)
            optimizer = kind([p, q], lr=0.1, foreach=False)
            for _ in range(2):
                if kind is optim.AdamW and native:
                    with backend.use_backend("cpu"):
                        optimizer.step()
                else:
                    optimizer.step()
            results.append([p.detach().full_tensor(), q.detach()])
        same(*results)


SCENARIOS = [ddp, fsdp2, accelerated, clipped, other_optimizers, checkpoint, tensor_parallel, placements]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    patience = datetime.timedelta(seconds=60)  # with a rank that has failed
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=patience)
    failures = {}
    for scenario in SCENARIOS:
        try:
            scenario(folder)
        except Exception:
            failures[scenario.__name__] = traceback.format_exc()
            break  # the other rank may be waiting somewhere else by now
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(failures, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's may ask for the GIL while Python ends, and torch then aborts the process


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Per scenario, what went wrong, rank after rank."""
    if why := backend.available("cpu"):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=RANKS, join=False)
    context.join(timeout=300)
    found = {}
    for rank in range(RANKS):
        if not (folder / str(rank)).exists():
            found.setdefault("", "a rank did not end")
            continue
        for name, trace in pickle.loads((folder / str(rank)).read_bytes()).items():
            found[name] = found.get(name, "") + f"rank {rank}:\n{trace}"
    for process in context.processes:
        process.kill()
    return found


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
@pytest.mark.served_in_children
def test_two_ranks(scenario, failures):
    assert scenario.__name__ not in failures, failures[scenario.__name__]
    earlier = [f for f in SCENARIOS[: SCENARIOS.index(scenario)] if f.__name__ in failures]
    assert not earlier and "" not in failures, "the ranks never came here"


@pytest.fixture
def mesh():
    """A mesh of one device in this process, whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_dtensors_of_one_rank(name, mesh):
    """A10: gradients and state cut as their parameter, in other ways, or not at all; and what is yet to be summed."""
    options = {"lr": 0.1} if name == "AdamW" else {"lr": 0.1, "momentum": 0.9}

    def state_whole(optimizer, p):
        key = next(k for k, v in optimizer.state[p].items() if isinstance(v, DTensor))
        optimizer.state[p][key] = optimizer.state[p][key].to_local().clone()

    def state_cut(optimizer, p):
        key = next(k for k, v in optimizer.state[p].items() if isinstance(v, DTensor))
        optimizer.state[p][key] = optimizer.state[p][key].redistribute(placements=[Shard(1)])

    def nothing(optimizer, p):
        pass

    cuts = [(Shard(0), Shard(0)), (Replicate(), Replicate()), (Shard(0), Shard(1)), (Replicate(), Partial())]
    for (cut, grad_cut), spoil in itertools.product(cuts, (nothing, state_whole, state_cut)):
        results = []
        for library in (optim, torch.optim):
            torch.manual_seed(0)
            p = torch.nn.Parameter(DTensor.from_local(torch.randn(4, 6), mesh, [cut]))
            optimizer = getattr(library, name)([p], foreach=False, **options)
            found = []
            for step in range(3):
                grad = torch.randn(4, 6)
                if isinstance(grad_cut, Partial):
                    p.grad = DTensor.from_local(grad, mesh, [grad_cut])
                else:
                    p.grad = DTensor.from_local(grad, mesh, [grad_cut])
                try:
                    optimizer.step()
                except RuntimeError as e:
                    found.append((type(e), str(e)))
                    break
                if step == 1:
                    spoil(optimizer, p)
                found.append(p.detach().to_local().clone())  # the whole: the fake group's gather is not one
            results.append(found)
        for ours, torchs in zip(*results, strict=True):
            if isinstance(torchs, tuple):
                assert ours == torchs
            else:
                torch.testing.assert_close(ours, torchs)
    p = torch.nn.Parameter(DTensor.from_local(torch.randn(4, 6), mesh, [Shard(0)]))
    optimizer = getattr(optim, name)([p], **options)
    for _ in range(2):
        p.grad = DTensor.from_local(torch.randn(4, 6), mesh, [Shard(0)])
        version = p._version
        with served(optimizer._op):
            optimizer.step()
        assert p._version > version
