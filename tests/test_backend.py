"""Which kernels serve here, and what is said where there are none: the loader, the self-test of kernels built for an
older torch, the doctor. Told by a torch, an extension and a GPU that are not there; test_install.py asks the same of
real installations."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from common import thresholds

import nnfast
import nnfast.__main__
from nnfast import _torch, backend, selftest

pytestmark = pytest.mark.skipif(bool(backend.available("cpu")), reason=backend.available("cpu"))
MINOR = "_".join(torch.__version__.split(".")[:2])


@pytest.fixture
def quiet_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def loaded(warns=None):
    if warns is None:
        return backend._load()
    with pytest.warns(UserWarning, match=warns):
        return backend._load()


@pytest.mark.torch_serves("nothing is computed")
def test_no_extension(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_HERE", tmp_path)
    native, why = loaded()
    assert native is None and "installed without native kernels" in why


@pytest.mark.torch_serves("nothing is computed")
def test_an_older_torch(monkeypatch):
    """No kernels older than the extension's are there, and a torch never runs newer ones."""
    monkeypatch.setattr(torch, "__version__", "2.1.0+cu118")
    native, why = loaded("torch serves every call")
    assert native is None and "torch 2.1.0+cu118 is running" in why and "self-test" not in why


@pytest.mark.torch_serves("nothing is computed")
@pytest.mark.parametrize("failure", ["", "exit status 1: AssertionError"])
def test_a_newer_torch(monkeypatch, failure):
    """It runs the newest kernels where they pass their self-test, and only there."""
    newest = max(tuple(map(int, p.name.split(".")[0].split("_")[2:])) for p in backend._HERE.glob("_C_*.so"))
    if "{}_{}".format(*newest) != MINOR:
        pytest.skip("the newest kernels here are for another torch, and a process loads one of them alone")
    asked = []
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(selftest, "failure", lambda minor: asked.append(minor) or failure)
    native, why = loaded("fail their self-test .*AssertionError" if failure else None)
    assert asked == [MINOR]
    if failure:
        assert native is None and "torch serves every call" in why
    else:
        assert native is backend.native and "passed their self-test with it and serve" in why


@pytest.mark.torch_serves("nothing is computed")
def test_the_self_test_of_this_process_loads_what_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setenv("NNFAST_SELFTEST", MINOR)
    assert loaded() == (backend.native, "")


@pytest.mark.torch_serves("nothing is computed")
def test_an_extension_that_does_not_load(monkeypatch):
    def refuse(name):
        raise ImportError("undefined symbol: of_another_torch")

    monkeypatch.setattr(importlib, "import_module", refuse)
    native, why = loaded("could not be loaded .undefined symbol: of_another_torch")
    assert native is None and "torch serves every call" in why


@pytest.mark.torch_serves("nothing is computed")
def test_cuda_kernels_that_do_not_load(monkeypatch, tmp_path):
    """The library for the running torch's CUDA is loaded; where it cannot be, that is said and the rest serves."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend, "_HERE", tmp_path)
    backend._load_cuda(MINOR)  # there is none, which is no fault
    library = tmp_path / f"lib/libnnfast_torch_{MINOR}_cuda_13.so"
    library.parent.mkdir()
    library.write_text("no library")
    with pytest.warns(UserWarning, match="CUDA kernels could not be loaded"):
        backend._load_cuda(MINOR)


@pytest.mark.torch_serves("nothing is computed")
def test_the_self_test_runs_once(quiet_cache):
    """In a process of its own; what came out is kept until something that it depends on changes."""
    assert selftest.failure(MINOR) == ""
    (kept,) = (quiet_cache / "nnfast").glob("*.json")
    said = json.loads(kept.read_text())
    assert said["failure"] == "" and torch.__version__ in said["key"]
    kept.write_text(json.dumps({**said, "failure": "kept"}))
    assert selftest.failure(MINOR) == "kept"
    kept.write_text(json.dumps({"key": ["another torch"], "failure": "kept"}))
    assert selftest.failure("0_0").startswith("exit status 1: ")  # there are no such kernels
    assert selftest.failure(MINOR) == ""


@pytest.mark.torch_serves("nothing is computed")
def test_a_self_test_that_does_not_run(quiet_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", None)  # as where Python is embedded
    assert selftest.failure(MINOR).startswith("it could not be run: ")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert selftest.failure(MINOR).startswith("it could not be run: ")

    def hangs(*args, **kwargs):
        raise subprocess.TimeoutExpired(args[0], kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "timed out after 300 seconds" in selftest.failure(MINOR)
    assert not list(quiet_cache.glob("nnfast/*.json")), "it is asked again next time"


@pytest.mark.torch_serves("nothing is computed")
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    selftest._write(selftest._folder() / "gpu.json", {"key": []})
    assert selftest._read(selftest._folder() / "gpu.json") == {}


def test_the_self_test_itself():
    """As the child process runs it: every op, served by ours."""
    before = backend.native.paths()
    selftest.main()
    after = backend.native.paths()
    assert all(after[op] > before[op] for op in backend.native.ops())


def test_a_self_test_sees_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *a, **k: torch.layer_norm(x, *a, **k) * 1.1)
    with pytest.raises(AssertionError, match="not close"):
        selftest.main()


@pytest.mark.torch_serves("nothing is computed")
def test_servers(monkeypatch):
    """Who serves each op on a GPU, by what the extension says it has and whether Triton is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "no_triton", lambda: "Triton is not installed")
    backend_native, kernels = backend.native, []

    class Native:
        def __getattr__(self, name):
            return getattr(backend_native, name)

        def cuda_kernels(self):
            return kernels

    monkeypatch.setattr(backend, "native", Native())
    assert backend.available("cuda") == "nnfast was built without CUDA kernels"
    assert backend.available("triton") == "Triton is not installed"
    assert backend.server("layer_norm", "cuda")[0] == "torch"
    kernels.append("layer_norm")
    assert backend.available("cuda") == ""
    assert backend.server("layer_norm", "cuda") == ("cuda", "float32, bfloat16, float16")
    assert backend.server("linear_gelu", "cuda") == ("torch", "not among the CUDA kernels, and Triton is not installed")
    monkeypatch.setattr(backend, "no_triton", lambda: "")
    assert backend.server("linear_gelu", "cuda")[0] == "triton"
    assert backend.server("cross_entropy", "cuda") == ("torch", "nnfast has no GPU kernel for it")
    assert {device for _, device, *_ in nnfast.__main__.rows()} == {"cpu", "cuda"}
    with nnfast.use_backend("torch"):
        assert backend.server("gelu", "cpu") == ("torch", "it was asked for")


@pytest.mark.torch_serves("nothing is computed")
def test_without_extension_or_vector_instructions(monkeypatch):
    assert backend.available("abacus").startswith("there is no such backend")
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "why_not", "no compiler")
    assert backend.available("cpu") == "no compiler" and backend.server("gelu", "cpu") == ("torch", "no compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.available("cuda") == "no compiler"
    backend.empty_cache()  # there is nothing to give back
    assert nnfast.__main__.products() == "torch's"


@pytest.mark.torch_serves("nothing is computed")
@pytest.mark.parametrize(
    "numbers, one_dnn, said",
    [
        ({"gemm_16_bits": 1}, {torch.float32}, "bfloat16 and float16: ours"),
        ({"gemm_16_bits": 1}, {torch.bfloat16, torch.float16}, "torch's"),
        ({"gemm_16_bits": 0, "one_dnn_float32": 0}, set(), "torch's: MKL"),
        ({"gemm_16_bits": 0, "one_dnn_float32": 1}, set(), "float32 from 2,000,000"),
    ],
)
def test_products(monkeypatch, numbers, one_dnn, said):
    monkeypatch.setattr(nnfast.__main__, "one_dnn_has", lambda dtype: dtype in one_dnn)
    with thresholds(**{f"product__{name}": value for name, value in numbers.items()}):
        assert nnfast.__main__.products().startswith(said)
        if not numbers["gemm_16_bits"]:
            monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
            assert nnfast.__main__.products() == "torch's"


@pytest.mark.torch_serves("nothing is computed")
def test_the_doctor_and_the_bench(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnfast"])
    assert nnfast.__main__.main() == 0 and "served by" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["nnfast", "bench", "--help"])
    with pytest.raises(SystemExit) as done:
        nnfast.__main__.main()
    assert done.value.code == 0 and "--op" in capsys.readouterr().out


@pytest.mark.torch_serves("nothing is computed")
def test_what_a_gpu_is_called(monkeypatch):
    """What is kept of its self-test depends on the GPU and its driver."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    name, driver = selftest._gpu(0)
    assert name == "a GPU" and driver
    assert selftest._gpu(-1) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert selftest._capturing(0) and not selftest._capturing(-1)


@pytest.mark.torch_serves("nothing is computed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_test_that_gives_no_answer(monkeypatch):
    def ends(where):
        raise SystemExit

    monkeypatch.setitem(selftest.ANSWERS, "gelu", ends)
    assert selftest._fails("gelu", -1, "float32", 1) == "no answer"


@pytest.mark.torch_serves("torch's two calls")
def test_a_torch_without_linear_cross_entropy():
    """What stands in for it on torch 2.11: its function's results, its class's arguments and state."""
    from nnfast.functional import _two_calls
    from nnfast.nn.cross_entropy import _TorchsLinearCrossEntropyLoss as StandIn

    torch.manual_seed(0)
    x, w, y = torch.randn(6, 8), torch.randn(9, 8), torch.randint(9, (6,))
    rest = {"weight": None, "reduction": "mean", "label_smoothing": 0.1}
    for bias, ignore_index in ((None, None), (torch.randn(9), 3)):
        ours = _two_calls(x, w, y, linear_bias=bias, ignore_index=ignore_index, options=None, **rest)
        logits = torch.nn.functional.linear(x, w, bias)
        expected = torch.nn.functional.cross_entropy(
            logits, y, ignore_index=-100 if ignore_index is None else ignore_index, label_smoothing=0.1
        )
        torch.testing.assert_close(ours, expected)
    with pytest.raises(TypeError, match="knows no options"):
        _two_calls(x, w, y, linear_bias=None, ignore_index=None, options={}, **rest)
    made = StandIn(8, 3, out_features=(2,), bias=True, reduction="sum", label_smoothing=0.1)
    assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == {"linear.weight": (6, 8), "linear.bias": (6,)}
    if theirs := getattr(torch.nn, "LinearCrossEntropyLoss", None):
        torchs = theirs(8, 3, out_features=(2,), bias=True, reduction="sum", label_smoothing=0.1)
        assert set(torchs.state_dict()) == set(made.state_dict())


@pytest.mark.torch_serves("nothing is computed")
def test_what_stands_in_for_private_names_of_torch():
    assert _torch._found("torch.optim.Optimizer", "no_such_name", 7) == 7
    assert _torch._found("torch.no.such.module", "no_such_name", 7) == 7
    assert _torch._yes() is True and _torch._nothing(3) is None

    class Optimizer:
        defaults = {"differentiable": False}

        @_torch._without_gradients
        def step(self):
            return torch.is_grad_enabled()

    assert Optimizer().step() is False
    Optimizer.defaults = {"differentiable": True}
    with pytest.raises(RuntimeError, match="does not know how this torch differentiates"):
        Optimizer().step()
