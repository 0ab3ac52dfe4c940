"""What every test runs under."""

import pytest
import torch
import torch.utils.deterministic
from hypothesis import HealthCheck, settings

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


@pytest.fixture(autouse=True)
def _deterministic():
    """The same numbers in every run, and NaN in all memory that is allocated and not written."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cpu_kernels():
    """Skip where this CPU has none of our kernels: what is tested then is torch."""
    from nnfast import backend

    if why := backend.available("cpu"):
        pytest.skip(why)
    with backend.use_backend("cpu"):
        yield


@pytest.fixture
def some_kernels():
    """The same, where some of the calls are torch's in any case."""
    from nnfast import backend

    if why := backend.available("cpu"):
        pytest.skip(why)
