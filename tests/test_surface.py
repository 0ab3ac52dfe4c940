"""The public surface: every name of torch's resolves, and what is not ours is torch's own object."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as TF
from common import run_script, served

import nnfast
import nnfast.nn.functional as F
from nnfast import backend, nn, optim

OURS = {
    "nn": {"LayerNorm", "Linear", "LinearGELU", "GELU", "Embedding", "CrossEntropyLoss", "LinearCrossEntropyLoss"}
    | {"MultiheadAttention", "TransformerEncoderLayer", "functional", "utils"},
    "nn.functional": {"layer_norm", "gelu", "linear", "linear_gelu", "cross_entropy", "linear_cross_entropy"}
    | {"embedding", "scaled_dot_product_attention"},
    "optim": {"Adam", "AdamW", "RMSprop", "SGD"},
}


@pytest.mark.parametrize("module", OURS)
def test_every_public_name(module):
    ours, theirs = importlib.import_module(f"nnfast.{module}"), importlib.import_module(f"torch.{module}")
    for name in dir(theirs):
        if not name.startswith("__") and name not in OURS[module]:
            assert getattr(ours, name) is getattr(theirs, name), name
    for name in OURS[module]:
        assert getattr(ours, name) is not getattr(theirs, name, None)
    with pytest.raises(AttributeError):
        ours.no_such_name  # noqa: B018
    assert set(dir(theirs)) <= set(dir(ours))


def test_ours_are_subclasses():
    for name in OURS["nn"] - {"functional", "utils", "LinearGELU"}:
        assert issubclass(getattr(nn, name), getattr(torch.nn, name))
    assert not issubclass(nn.LinearGELU, torch.nn.Linear), "what converts Linears would drop the GELU"
    assert issubclass(optim.AdamW, torch.optim.AdamW)


def test_submodules_are_import_targets():
    for package in (torch.nn, torch.optim):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            ours = importlib.import_module(found.name.replace("torch", "nnfast", 1))
            ours_too = "nn.functional", "nn.utils", "optim.adam", "optim.adamw", "optim.rmsprop", "optim.sgd"
            if found.name.removeprefix("torch.") not in ours_too:
                assert ours is sys.modules[found.name]
                assert sys.modules[found.name].__spec__.name == found.name, "torch's module was written to"
    from nnfast.nn.utils import clip_grad_norm_, clip_grad_value_
    from nnfast.nn.utils.parametrizations import weight_norm
    from nnfast.optim.adamw import AdamW, adamw
    from nnfast.optim.lr_scheduler import CosineAnnealingLR

    assert clip_grad_norm_ is nn.utils.clip_grad_norm_ and clip_grad_value_ is torch.nn.utils.clip_grad_value_
    assert weight_norm is torch.nn.utils.parametrizations.weight_norm
    assert CosineAnnealingLR is torch.optim.lr_scheduler.CosineAnnealingLR
    assert AdamW is optim.AdamW and adamw is importlib.import_module("torch.optim.adamw").adamw
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nnfast.nn.no_such_module")


@pytest.mark.torch_serves("nothing is computed")
def test_import_is_quiet():
    """Importing initialises no GPU and compiles nothing, and leaves torch's classes alone."""
    code = (
        "import sys, torch; before = torch.nn.LayerNorm, torch.nn.functional.layer_norm, torch.optim.AdamW;"
        "import nnfast;"
        "assert nnfast.nn.functional.gelu is nnfast.functional.gelu, 'torch.nn star-imports a functional too';"
        "assert not torch.cuda.is_initialized();"
        "assert not {'torch._inductor', 'triton'} & {*sys.modules};"
        "assert before == (torch.nn.LayerNorm, torch.nn.functional.layer_norm, torch.optim.AdamW)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


@pytest.mark.served_in_children
def test_without_triton():
    """Where Triton is not installed, nnfast is imported and ours serves."""
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import torch, nnfast, nnfast.nn.functional as F;"
        "x = torch.randn(3, 5);"
        "torch.testing.assert_close(F.layer_norm(x, (5,)), torch.layer_norm(x, (5,)));"
        "assert nnfast.backend.available('triton');"
        "assert nnfast.backend.available('cpu') or nnfast.backend.native.paths()['layer_norm'] == 1"
    )
    run_script(code)


def test_doctor():
    done = subprocess.run([sys.executable, "-m", "nnfast"], capture_output=True, text=True)
    assert done.returncode == 0 and torch.__version__ in done.stdout
    for op in backend.native.ops() if backend.native else ():
        assert op in done.stdout
    assert re.search("^products of matrices: ", done.stdout, re.MULTILINE)


def test_use_backend_raises_for_what_is_not_there():
    for name in ("cuda", "triton", "abacus"):
        with pytest.raises(RuntimeError, match=name), nnfast.use_backend(name):
            pass
    assert backend.forced() is None


@pytest.mark.usefixtures("cpu_kernels")
def test_use_backend_never_falls_back_silently():
    x = torch.randn(3, 4, dtype=torch.complex64)
    for call in (lambda: F.gelu(x), lambda: F.linear_gelu(x, x), lambda: F.layer_norm(x, (4,))):
        with pytest.raises(RuntimeError, match="'cpu' was asked for"):
            call()
    p = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="'cpu' was asked for"):
        optim.AdamW([p]).step()
    assert (p == 1).all()


@pytest.mark.usefixtures("cpu_kernels")
def test_what_torch_does_sooner_is_ours_where_it_is_asked_for():
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 64, 16)
    logits, target = torch.randn(30, 16), torch.randint(16, (30,))
    calls = {
        "scaled_dot_product_attention": lambda module: module.scaled_dot_product_attention(query, key, key),
        "cross_entropy": lambda module: module.cross_entropy(logits, target),
    }
    for name, call in calls.items():
        with nnfast.use_backend("cpu"), served(name):
            ours = call(F)
        torch.testing.assert_close(ours, call(TF), rtol=1e-5, atol=1e-5)


def test_use_backend_torch_is_torch():
    """To the bit; it nests, is left by an exception, and holds this thread alone."""
    x, w = torch.randn(50, 300), torch.randn(300)
    with nnfast.use_backend("torch"):
        assert torch.equal(F.layer_norm(x, (300,), w), TF.layer_norm(x, (300,), w))
        assert torch.equal(F.gelu(x, approximate="tanh"), TF.gelu(x, approximate="tanh"))
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(backend.forced()))
        thread.start()
        thread.join()
        assert elsewhere == [None] and backend.forced() == "torch"
    with pytest.raises(KeyError), nnfast.use_backend("torch"):
        raise KeyError
    assert backend.forced() is None


@pytest.mark.skipif(backend.native is None, reason="there is no extension")
def test_functions_of_the_extension_called_wrongly():
    """By hand, for the package calls them rightly: an error, and no crash."""
    native = backend.native
    fast = (
        "layer_norm gelu linear linear_gelu cross_entropy linear_cross_entropy total_norm scale_ adamw_ sgd_ rmsprop_"
    )
    fast += " scaled_dot_product_attention embedding clip_coef set_threshold known_answers"
    for name in fast.split():
        with pytest.raises(TypeError):
            getattr(native, name)()
    for call in (native.fail_allocation, native.hold):
        with pytest.raises(TypeError):
            call("once") if call is native.fail_allocation else call(3)
    with pytest.raises(KeyError, match="no such number"):
        native.set_threshold("no such number", 1)
    with pytest.raises(OverflowError):
        native.set_threshold("stream_bytes", 10**30)
    assert "no such number" not in native.thresholds()
    # What each leaves to torch.
    x, group = torch.randn(3, 4), {"params": [], "lr": 0.1}
    assert native.layer_norm(None, (4,), None, None, 1e-5) is None
    assert (
        native.layer_norm(x, (4,), None, None, 10**400) is None
        and native.layer_norm(x, [4, "4"], None, None, 1) is None
    )
    assert native.gelu(x, None) is None and native.linear(x, x, 3) is None
    assert native.linear_gelu(x, x, None, "erf") is None and native.linear_gelu(x, x, None, 1) is None
    assert native.cross_entropy(x, torch.zeros(3, dtype=torch.int64), None, -100, "median", 0.0) is None
    assert native.cross_entropy(x, torch.zeros(3, dtype=torch.int64), None, 2**70, "mean", 0.0) is None
    q = torch.randn(1, 1, 3, 4)
    for scale, causal in (("1", False), (None, 1)):
        assert native.scaled_dot_product_attention(q, q, q, None, causal, scale, False) is None
    assert native.total_norm([], 2.0) is None and native.total_norm((x,), 2.0) is None
    assert native.total_norm([x, 3], 2.0) is None and not native.scale_([x.int()], 2.0)
    empty = torch.ones(0)
    assert native.total_norm([x, empty], float("inf")) is None and native.total_norm([x], float("inf")) is not None
    with pytest.raises(TypeError):
        native.set_threshold("stream_bytes", 1.0)
    with pytest.raises(TypeError):
        native.set_threshold(7, 1)
    assert native.clip_coef([x], 1.0, None, False) is None and native.clip_coef([x], "1", None, False) is None
    assert native.clip_coef([x], 1.0, 3, False) is None and native.clip_coef(None, 1.0, None, False) is None
    i = torch.zeros(3, dtype=torch.int64)
    for wrong in ((3, x, None, False), (i, 3, None, False), (i, x, "0", False), (i, x, None, 0), (i, x, -99, False)):
        assert native.embedding(*wrong) is None
    right = [x, x, i, None, None, -100, "mean", 0.0]
    for k, wrong in enumerate((3, 3, 3, 3, 3, "0", 0, "0")):
        assert native.linear_cross_entropy(*right[:k], wrong, *right[k + 1 :]) is None
    right = [x, i, None, -100, "mean", 0.0]
    for k, wrong in enumerate((3, 3, 3, "0", 0, "0")):
        assert native.cross_entropy(*right[:k], wrong, *right[k + 1 :]) is None
    right = [q, q, q, None, False, None, False]
    for k, wrong in enumerate((3, 3, 3, 3, 0, "0", 0)):
        assert native.scaled_dot_product_attention(*right[:k], wrong, *right[k + 1 :]) is None
    for wrong in ("total_norm", "scale_"):
        with pytest.raises(TypeError):
            getattr(native, wrong)([x], "2")
    for groups, state in ((None, {}), ([group], None), ([3], {}), ([{}], {}), ([{**group, "params": None}], {})):
        for step in (native.adamw_, native.sgd_, native.rmsprop_):
            assert step(groups, state, None, None, None, False, None, None) is False
    for step in (native.adamw_, native.sgd_, native.rmsprop_):
        for k in range(3):  # the scale, what was found infinite, the clipping
            assert step([group], {}, *[3 if j == k else None for j in range(3)], False, None, None) is False
        with pytest.raises(TypeError, match="rounding_seed"):
            step([group], {}, None, None, None, False, "7", None)
    if not torch.version.cuda:
        native.triton_kernels(["layer_norm"])
        native.triton_kernels([])
        assert native.cuda_kernels() == []


class Subclass(torch.Tensor):
    pass


@pytest.mark.usefixtures("cpu_kernels")
def test_what_is_no_plain_tensor_is_torchs():
    """In each place of each function, where it would be read as one."""
    x, w, b, t, q = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.arange(3), torch.randn(1, 1, 3, 4)
    calls = {
        "layer_norm": [x, (4,), x[0], x[1], 1e-5],
        "gelu": [x, "none"],
        "linear": [x, w, b],
        "linear_gelu": [x, w, b, "none"],
        "cross_entropy": [x, t, x[0].abs(), -100, "mean", 0.0],
        "linear_cross_entropy": [x, w, t, b, b.abs(), -100, "mean", 0.0],
        "scaled_dot_product_attention": [q, q, q, torch.randn(3, 3), False, None, False],
    }
    for name, args in calls.items():
        call = getattr(backend.native, name)
        assert call(*args) is not None, name
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                for other in (3, arg.as_subclass(Subclass)):
                    assert call(*args[:i], other, *args[i + 1 :]) is None, (name, i)


ON_A_THREAD = """
import threading, torch, nnfast.nn.functional as F
x, w = torch.randn(50, 300), torch.randn(300)
thread = threading.Thread(target=lambda: print(torch.equal(F.layer_norm(x, (300,), w), layer_norm(x, (300,), w))))
layer_norm = torch.nn.functional.layer_norm
thread.start()
thread.join()
"""


def test_environment_variable_holds_every_thread():
    assert run_script(ON_A_THREAD, env={"NNFAST_BACKEND": "torch"}).strip() == "True"


@pytest.mark.usefixtures("cpu_kernels")
def test_environment_variable_is_read_at_the_import(monkeypatch):
    """A thread that starts later is held as the others are."""
    monkeypatch.setenv("NNFAST_BACKEND", "torch")
    with served("layer_norm"):
        thread = threading.Thread(target=lambda: F.layer_norm(torch.randn(3, 64), [64]))
        thread.start()
        thread.join()


# ATEN_CPU_CAPABILITY, and the kernels that it gives. AVX-512 without its conversion to bfloat16 is older CPUs'.
CAPABILITIES = {"default": None, "avx2": "avx2", "avx512": "avx512"}


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_other_instruction_sets(capability):
    """The tests of the ops once more, as on a CPU with less than this one, and on one where torch serves every call."""
    if capability == "avx512" and not backend.native.cpu_kernels().startswith("avx512"):
        pytest.skip("this CPU has no AVX-512")
    if capability == "avx2" and backend.native.cpu_kernels() == "avx2":
        pytest.skip("the whole suite runs so on this CPU")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "NNFAST_NO_AVX512_BF16": "1"}
    ops = ["layer_norm", "linear", "linear_gelu", "cross_entropy", "adamw", "attention"]
    # What differs from the kernels that this CPU takes is bfloat16 alone.
    only = ["-k", "values or layouts or master or stochastic"] if capability == "avx512" else []
    files = [f"{__file__.rsplit('/', 1)[0]}/test_{op}.py" for op in ops]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *only, *files],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    name = run_script("from nnfast import backend; print(backend.native.cpu_kernels())", env=env).strip()
    assert name == str(CAPABILITIES[capability])
