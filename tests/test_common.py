"""What the tests share sees a difference: each of these would otherwise pass whatever ours do."""

import pytest
import torch
import torch.nn.functional as TF
from common import assert_close, assert_same_error, left_to_torch, served

import nnfast.nn.functional as F


def refuses(error, text):
    def call():
        raise error(text)

    return call


def test_errors():
    assert_same_error(refuses(ValueError, "a"), refuses(ValueError, "a"))
    others = refuses(ValueError, "b"), refuses(TypeError, "a"), lambda: 1
    for pair in [(refuses(ValueError, "a"), other) for other in others] + [(others[2], others[2])]:
        with pytest.raises(AssertionError):
            assert_same_error(*pair)


def test_closeness():
    exact = torch.randn(100, dtype=torch.float64)
    torchs = exact.float()
    assert_close(torchs.clone(), torchs, exact)
    for ours in (torchs * (1 + 1e-6), torchs.double(), torch.where(exact > 1, torch.nan, torchs)):
        with pytest.raises(AssertionError):
            assert_close(ours, torchs, exact)


@pytest.mark.usefixtures("cpu_kernels")
def test_who_served():
    x = torch.randn(3, 5)
    with served("layer_norm"), left_to_torch("gelu"):
        F.layer_norm(x, (5,))
    with pytest.raises(AssertionError), served("layer_norm"):
        TF.layer_norm(x, (5,))
    with pytest.raises(AssertionError), left_to_torch("layer_norm"):
        F.layer_norm(x, (5,))
