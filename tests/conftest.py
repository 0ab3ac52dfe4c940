"""What every test runs under, and that a test which stands for a row of the contract was served by ours."""

import contextlib

import pytest
import torch
import torch.utils.deterministic
from common import contract
from hypothesis import HealthCheck, settings

# Imported here because it loads a profile of its own, of ten cases a test: ours, loaded after it, is the one in force.
with contextlib.suppress(ImportError):
    import torch.testing._internal.common_utils  # noqa: F401

# What test_fuzz.py does in the suite, and in `make fuzz`. The fixture below need not run for each case of a test.
settings.register_profile(
    "suite",
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("fuzz", settings.get_profile("suite"), max_examples=20000, derandomize=False)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--shut-gate",
        action="store_true",
        help="run the contract's tests where torch serves every call (ATEN_CPU_CAPABILITY=default): each must fail",
    )


def stands_for_a_row(item):
    """Whether the contract's map names this test, and it calls something that ours serves."""
    named = {(item.path.name, item.originalname), (item.path.name, "")} & CONTRACT
    return bool(named) and not item.get_closest_marker("torch_serves")


CONTRACT = contract()


def pytest_collection_modifyitems(config, items):
    for mark in (mark for item in items for mark in item.iter_markers("torch_serves")):
        assert mark.args and not mark.kwargs, "torch_serves says why"
    if not config.getoption("--shut-gate"):
        return
    shut = [item for item in items if stands_for_a_row(item)]
    config.hook.pytest_deselected(items=[item for item in items if not stands_for_a_row(item)])
    items[:] = shut
    for item in items:
        item.add_marker(pytest.mark.xfail(strict=True))


def calls_served():
    """How many calls our ops have served in this process."""
    from nnfast.backend import native

    return sum(count for name, count in native.paths().items() if hasattr(torch.ops.nnfast, name)) if native else 0


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Fails a row's test in which ours did not serve, for it would compare torch with torch. Tests that are marked
    ``served_in_children`` look in their child processes."""
    from nnfast import backend

    shut = pyfuncitem.config.getoption("--shut-gate")
    if shut:
        assert backend.available("cpu"), "the gate is open: set ATEN_CPU_CAPABILITY=default"
    before = calls_served()
    result = yield
    ours = calls_served() > before
    if pyfuncitem.get_closest_marker("torch_serves"):
        assert not ours, "ours served: the test needs no mark"
    elif pyfuncitem.get_closest_marker("gpu"):
        pass  # kernels of a GPU count nothing: its tests hold to a backend, which then raises where it does not serve
    elif stands_for_a_row(pyfuncitem) and not pyfuncitem.get_closest_marker("served_in_children"):
        assert ours or (backend.available("cpu") and not shut), "nothing was served by ours"
    return result


def settings_of_torch():
    """The settings of the process that choose how torch, and so ours, computes."""
    from nnfast.backend import native

    backends = torch.backends
    return {
        "oneDNN": torch._C._get_mkldnn_enabled(),
        "oneDNN deterministic": torch._C._get_mkldnn_deterministic(),
        "float32 products": torch.get_float32_matmul_precision(),
        "float32 products of oneDNN": backends.mkldnn.matmul.fp32_precision,
        "attention": tuple(
            getattr(torch._C, f"_get_{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")
        ),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "tiny numbers are zero": (torch.tensor(1e-39) * 1.5).item() == 0,
        "thresholds": native.thresholds() if native else {},
    }


@pytest.fixture(autouse=True)
def _deterministic():
    """The same numbers in every run, and NaN in all memory that is allocated and not written."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # some libraries lower it when they are imported
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    before = settings_of_torch()
    yield
    torch.use_deterministic_algorithms(False)
    after = settings_of_torch()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test leaves to the next: {changed}"


@pytest.fixture
def cpu_kernels(request):
    """Skip where this CPU has none of our kernels: what is tested then is torch."""
    from nnfast import backend

    if request.config.getoption("--shut-gate"):
        yield
        return
    if why := backend.available("cpu"):
        pytest.skip(why)
    with backend.use_backend("cpu"):
        yield


@pytest.fixture
def some_kernels(request):
    """``cpu_kernels``, where some of the calls are torch's in any case."""
    from nnfast import backend

    if (why := backend.available("cpu")) and not request.config.getoption("--shut-gate"):
        pytest.skip(why)
