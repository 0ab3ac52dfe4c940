"""What every test runs under."""

import pytest
import torch
import torch.utils.deterministic


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
