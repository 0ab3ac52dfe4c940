"""What a process does around the ops: two threads, forks, and how much memory it needs. "Across", and A9."""

import random
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from common import run_script, served, thresholds

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import backend


@pytest.mark.usefixtures("cpu_kernels")
def test_two_threads():
    """Two models trained at once come out as trained one after the other, to the bit."""

    def train(seed, results):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 200), nn.GELU(), nn.LinearGELU(200, 96))
        for p in model.parameters():
            p.data.uniform_(-0.1, 0.1, generator=generator)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(30):
            model(torch.randn(300, 96, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results[seed] = [p.detach() for p in model.parameters()]

    alone, together = {}, {}
    for seed in (1, 2):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed], strict=True))
    assert not torch.equal(alone[1][0], alone[2][0])


LET_GO = """
import threading, torch
import nnfast.optim as optim
from nnfast.backend import native

large, small = torch.zeros(10_000_000, requires_grad=True), [torch.zeros(1000, requires_grad=True) for _ in range(200)]
optimizer = optim.AdamW([{"params": [large]}, {"params": small}])

def make_gradients():
    for p in [large, *small]:
        p.grad = torch.ones_like(p)

def let_go(before):
    while native.paths()["without_gil"] == before:  # the step has not begun
        pass
    for p in small:
        p.grad = None
    other = [torch.randn(1000) for _ in range(200)]

make_gradients()
optimizer.step()
for _ in range(20):
    make_gradients()
    thread = threading.Thread(target=let_go, args=(native.paths()["without_gil"],))
    thread.start()
    optimizer.step()
    thread.join()
print(all(torch.equal(p, small[0]) for p in small), native.paths()["adamw_"])
"""


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.served_in_children
def test_another_thread_lets_go_of_gradients():
    """While the first group is stepped, the gradients of the second lose their parameters: the step holds them."""
    assert run_script(LET_GO).split() == ["True", "42"]


FORK = """
import multiprocessing, nnfast, torch
import nnfast.nn as nn, nnfast.optim as optim

torch.set_num_threads(2)
model = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 512), nn.GELU())
optimizer = optim.AdamW(model.parameters())

def step():
    model(torch.ones(2000, 512)).square().mean().backward()
    optimizer.step()

class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        with torch.no_grad():
            return model(torch.ones(1000, 512) * i)[0]

def child():
    # As in torch's own data workers: a pool of OpenMP's threads does not outlive a fork.
    torch.set_num_threads(1)
    step()

if __name__ == "__main__":
    step()
    loader = torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert len(list(loader)) == 2
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    step()
    assert nnfast.backend.native.paths()["adamw_"] >= 2
    print("done")
"""


@pytest.mark.served_in_children
def test_fork_after_use():
    """Data workers and a forked child run the ops after the parent's threads have."""
    assert run_script(FORK).strip() == "done"


def peak(call):
    """Bytes of tensors alive at the most during a call, beyond those before it, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def backward_of(make, shape):
    def prepare(lib):
        torch.manual_seed(0)
        model, x = make(lib), torch.randn(shape, requires_grad=True)
        return lambda: model(x).backward(torch.ones(1).expand(*shape[:-1], model(x[:1]).shape[-1]))

    return prepare


def step_of(lib):
    module, options = (optim, {}) if lib is nn else (torch.optim, {"fused": True})
    params = [torch.randn(1024, 1024, requires_grad=True) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = module.AdamW(params, **options)
    optimizer.step()
    return optimizer.step


# Activations of whole pages of 2 MiB, as large outputs lie in, and more rows than features, as where memory matters.
CALLS = {
    "layer_norm": backward_of(lambda lib: lib.LayerNorm(1024), (1024, 1024)),
    "linear_gelu": backward_of(lambda lib: lib.Sequential(lib.Linear(256, 1024), lib.GELU()), (2048, 256)),
    "mlp": backward_of(
        lambda lib: lib.Sequential(lib.LayerNorm(256), lib.Linear(256, 1024), lib.GELU(), lib.Linear(1024, 256)),
        (2048, 256),
    ),
    "adamw": step_of,
}


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name):
    """A9: no more than torch's, but for the threads' sums over rows (three levels for a weight and a bias each), and
    for what is counted here of oneDNN alone: where a float32 product is oneDNN's, its scratch memory comes from torch's
    allocator (half a megabyte of it at the peak of "mlp", for the last weight's gradient), while MKL takes its own
    unseen. What the process takes of both is below."""
    torch.use_deterministic_algorithms(False)  # which would fill outputs, and so take them from torch
    ours, torchs = (peak(CALLS[name](lib)) for lib in (nn, torch.nn))
    sums = 0 if name == "adamw" else 2 * torch.get_num_threads() * 3 * 1024 * 4
    scratch = 2 * 256 * 1024 if name == "mlp" else 0
    assert ours <= torchs + sums + scratch, f"{ours / 2**20:.2f} MiB, torch {torchs / 2**20:.2f} MiB"
    assert torchs > 0 or name == "adamw"


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("op", ["layer_norm", "linear", "linear_gelu"])
def test_no_wasted_work(op):
    """L9: no memory is taken for a gradient that nobody wants, nor is kept what only that one would read."""
    torch.use_deterministic_algorithms(False)
    x, w = torch.randn(64, 4096), torch.randn(512, 4096)
    x, w = (w, w[0].clone()) if op == "layer_norm" else (x, w)
    calls = {
        "layer_norm": lambda x, w: F.layer_norm(x, (4096,), w),
        "linear": F.linear,
        "linear_gelu": F.linear_gelu,
    }
    saved = []
    for frozen in (0, 1):
        args = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, w))]
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            output = calls[op](*args)
        wanted, grad = args[1 - frozen], torch.ones_like(output)
        taken = peak(lambda output=output, wanted=wanted, grad=grad: torch.autograd.grad(output, wanted, grad))
        assert taken < wanted.nbytes + args[frozen].nbytes / 2, (frozen, taken)
        if op != "layer_norm":
            assert wanted.data_ptr() not in saved and args[frozen].data_ptr() in saved


RESIDENT = """
import resource, sys, torch
import nnfast.nn, nnfast.optim
lib, optim = (nnfast.nn, nnfast.optim) if sys.argv[1] == "ours" else (torch.nn, torch.optim)
model = lib.Sequential(*(m for _ in range(4) for m in (
    lib.LayerNorm(512), lib.Linear(512, 2048), lib.GELU(), lib.Linear(2048, 512))))
optimizer = optim.AdamW(model.parameters(), fused=True)
for _ in range(3):
    model(torch.randn(4096, 512)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert sys.argv[1] != "ours" or nnfast.backend.native.paths()["layer_norm_backward"]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.served_in_children
def test_peak_of_the_process():
    """A9: what the process takes from the system, but for the blocks that are kept for the next output: 128 MiB."""
    ours, torchs = (int(run_script(RESIDENT, who)) / 1024 for who in ("ours", "torch"))
    assert ours <= torchs + 128, f"{ours:.0f} MiB, torch {torchs:.0f} MiB"


@pytest.mark.usefixtures("cpu_kernels")
def test_kept_memory():
    """A9: with what is kept, no more than was live at once; and no two tensors ever share memory."""
    torch.use_deterministic_algorithms(False)
    generator, page = random.Random(0), 4096
    alive, live, peak = [], 0, 0
    nnfast.empty_cache()
    with thresholds(memory__large_bytes=page), served("memory.mapped", "memory.given_again", "memory.gathered"):
        start = backend.native.memory()[0]
        for i in range(600):
            if alive and generator.random() < 0.5:
                number, t = alive.pop(generator.randrange(len(alive)))
                assert t[0] == t[-1] == number and t.eq(number).all(), "written by another"
                live -= -(-t.nbytes // page) * page
                del t
            else:
                size = generator.choice([page, 3 * page - 8, 40 * page, 2**21, 2**21 + 12 * page, 3 * 2**21, 2**23 + 4])
                t = F.gelu(torch.zeros(1).expand(size // 4)).fill_(i)
                alive.append((i, t))
                live += -(-t.nbytes // page) * page
                del t
            peak = max(peak, live)
            in_use, kept = backend.native.memory()
            assert in_use - start == live and live + kept <= peak
        assert kept > 0
        nnfast.empty_cache()
        assert backend.native.memory() == (start + live, 0)
        assert all(t.eq(number).all() for number, t in alive)


@pytest.mark.usefixtures("cpu_kernels")
def test_what_was_not_needed_for_long_is_given_back():
    x = torch.zeros(1).expand(2**22)
    F.gelu(x)
    assert backend.native.memory()[1] >= 2**24
    with thresholds(memory__keep_ms=1):
        for _ in range(3):
            time.sleep(0.002)
            F.gelu(x[: 2**19])
    assert backend.native.memory()[1] <= 2**21


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
@pytest.mark.served_in_children
def test_no_memory_left():
    """Kept memory is given back before a call fails, and the error is torch's."""
    assert run_script(NO_MEMORY).split() == ["kept", "given", "torchs"]


NO_MEMORY = """
import resource, torch, nnfast, nnfast.nn.functional as F
native, x, wider = nnfast.backend.native, torch.zeros(2**26), torch.zeros(2**26 + 2**22)

def keep():
    for _ in range(2):
        F.gelu(x)
    assert native.memory()[1] >= 2**28

keep()
print("kept")
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# Less than what is asked for next; threads' own heaps take some of it, 64 MB each.
resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**26, taken + 3 * 2**26))
assert F.gelu(wider)[::4096].eq(0).all()
print("given")
nnfast.empty_cache()
keep()
assert torch.empty(2**26 + 2**22).numel() and native.memory()[1] == 0
errors = []
for call in (lambda: F.layer_norm(torch.zeros(1, 1).expand(2**29, 1), (1,)), lambda: torch.empty(2**29)):
    try:
        call()
    except RuntimeError as e:
        errors.append(str(e).splitlines()[0])
assert errors[0] == errors[1] and "allocate memory" in errors[0], errors
assert native.paths()["gelu"] >= 5
print("torchs")
"""


REFUSED = """
import os, threading, time
import torch
import torch.nn.functional as TF
import nnfast.nn.functional as F

# Were the memory taken, writing to it would end this process, or the machine.
def watch():
    while True:
        resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > 3 << 30:
            print("the memory was taken", flush=True)
            os._exit(1)
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
rows = torch.ones(1, 1024).expand(1 << 33, 1024)  # an output of 32 TB
for call in (lambda F: F.layer_norm(rows, (1024,)), lambda F: F.linear(rows, torch.ones(1024, 1024))):
    said = []
    for library in (TF, F):
        try:
            call(library)
        except RuntimeError as error:
            said.append(str(error))
    assert len(said) == 2 and all("can't allocate memory" in text for text in said), said
print("refused")
"""


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.served_in_children
def test_memory_that_the_system_does_not_have():
    """Faults: torch's error, at once."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system refuses no memory")
    assert run_script(REFUSED).strip() == "refused"
