"""A kernel is tried against torch's answer on a GPU where nobody has measured it: once, before the first call there;
where it is wrong, torch serves from then on. In these tests the gate tries the CPU's kernels as it would a GPU's."""

import threading
import warnings

import pytest
import torch
from common import FLOAT_AND_HALF, left_to_torch, served
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import backend, selftest

pytestmark = pytest.mark.skipif(bool(backend.available("cpu")), reason=backend.available("cpu"))


def forget(monkeypatch):
    monkeypatch.setattr(selftest, "_known", {})
    backend.native.known_answers(selftest.right, True)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What was asked, as (op, dtype, size)."""
    found = []

    for op, answer in selftest.ANSWERS.items():

        def recorded(where, op=op, answer=answer):
            found.append((op, str(where.dtype).removeprefix("torch."), where.size))
            answer(where)

        monkeypatch.setitem(selftest.ANSWERS, op, recorded)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    yield found
    backend.native.known_answers(selftest.right, False)


def layer_norm(size=60, dtype=torch.float32):
    x = torch.randn(3, size, dtype=dtype)
    return F.layer_norm(x, (size,)), x


def test_asked_once_for_each_launch(asked):
    with served("layer_norm"):
        for size in (60, 64, 33, 65):
            layer_norm(size)
        layer_norm(64, torch.bfloat16)
    layer_norm(64, torch.float64)  # which no GPU's kernel covers
    assert asked == [("layer_norm", "float32", 64), ("layer_norm", "float32", 128), ("layer_norm", "bfloat16", 64)]


def test_kept_from_process_to_process(asked, monkeypatch):
    layer_norm()
    forget(monkeypatch)
    layer_norm()
    assert len(asked) == 1
    monkeypatch.setattr(selftest, "_gpu", lambda device: ["another"])
    forget(monkeypatch)
    layer_norm()
    monkeypatch.setattr(selftest, "_key", lambda *files: ["another version"])
    forget(monkeypatch)
    layer_norm()
    assert len(asked) == 3
    (kept,) = selftest._folder().glob("*.json")
    kept.write_text("{")  # somebody else's, or half of one
    forget(monkeypatch)
    layer_norm()
    assert len(asked) == 4


def test_a_wrong_kernel_is_torchs(asked, monkeypatch):
    """One warning; the results are torch's, and the other ops and dtypes are still ours. It is not kept as right."""
    real = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *a, **k: real(*a, **k) * 1.1)  # seen from there
    with pytest.warns(UserWarning, match="cpu's kernel of layer_norm in float32 fails its known-answer test on cpu"):
        layer_norm()
    monkeypatch.setattr(torch.nn.functional, "layer_norm", real)
    with warnings.catch_warnings(), left_to_torch("layer_norm"):
        warnings.simplefilter("error")
        y, x = layer_norm()
    assert torch.equal(y, torch.nn.functional.layer_norm(x, (60,)))


def test_an_error_is_no_users(asked, monkeypatch):
    def broken(where):
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setitem(selftest.ANSWERS, "adamw_", broken)
    results = []
    for library in (optim, torch.optim):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = library.AdamW([p], lr=0.1)
        for _ in range(3):
            p.grad = torch.ones(5)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                optimizer.step()
            results.append((p.detach().clone(), len(said)))
    torch.testing.assert_close([r[0] for r in results[:3]], [r[0] for r in results[3:]], rtol=0, atol=0)
    assert sum(r[1] for r in results) == 1
    with served("layer_norm"):
        layer_norm()


def test_memory_that_runs_out_is_no_answer(asked, monkeypatch):
    """Torch serves without a word for the rest of the process, for a forward and its recomputation must decide alike;
    the next process asks again."""

    def full(where):
        raise torch.OutOfMemoryError("CUDA out of memory")

    answer = selftest.ANSWERS["layer_norm"]
    for each in (full, answer):
        monkeypatch.setitem(selftest.ANSWERS, "layer_norm", each)
        with warnings.catch_warnings(), left_to_torch("layer_norm"):
            warnings.simplefilter("error")
            layer_norm()
    forget(monkeypatch)
    with served("layer_norm"):
        layer_norm()


def test_not_within_a_capture(asked, monkeypatch):
    """Nothing may be launched beside the graph: torch serves, and it is asked afterwards."""
    monkeypatch.setattr(selftest, "_capturing", lambda device: True)
    with left_to_torch("layer_norm"):
        layer_norm()
    assert not asked
    monkeypatch.setattr(selftest, "_capturing", lambda device: False)
    with served("layer_norm"):
        layer_norm()
    assert len(asked) == 1


def test_what_surrounds_the_call_is_left_alone(asked):
    """Modes, hooks on what is saved, autocast, gradients off: none of it reaches the test, which leaves no trace."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        layer_norm()
    assert not asked
    saved = []
    x = torch.randn(3, 60, requires_grad=True)
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.layer_norm(x, (60,))
        first = len(saved)
        F.layer_norm(x, (60,))
    assert len(asked) == 1 and len(saved) == 2 * first
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer_norm(200)
    assert len(asked) == 2


def test_under_checkpoint(asked):
    """A forward and its recomputation decide alike, though the first is the first use."""
    x = torch.randn(3, 60, requires_grad=True)
    checkpoint(lambda x: F.layer_norm(x, (60,)), x, use_reentrant=False).sum().backward()
    assert len(asked) == 1 and x.grad is not None


def test_threads_wait_for_the_answer(asked, monkeypatch):
    answer, inside = selftest.ANSWERS["layer_norm"], threading.Event()

    def slow(where):
        inside.set()
        threading.Event().wait(0.2)
        answer(where)

    monkeypatch.setitem(selftest.ANSWERS, "layer_norm", slow)
    with served("layer_norm"):
        first = threading.Thread(target=layer_norm)
        first.start()
        inside.wait()
        before = backend.native.paths()["layer_norm"]
        layer_norm()
        first.join()
        assert backend.native.paths()["layer_norm"] >= before + 2
    assert len(asked) == 1


def test_whoever_forces_a_backend_is_not_asked(asked):
    with backend.use_backend("cpu"):
        layer_norm()
    assert not asked


def test_every_answer_in_every_dtype():
    """Each op's case, where the kernels are right."""
    for answer in selftest.ANSWERS.values():
        for dtype in FLOAT_AND_HALF:
            answer(selftest.Where("cpu", dtype))
