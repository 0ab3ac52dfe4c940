"""The house: every op has its stem in every layer, so that one `git ls-files '*layer_norm*'` shows its whole room."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What an op must have, by its stem, and the layers that are still to come for some.
ROOMS = ["csrc/{}.cpp", "csrc/cpu/{}.cpp", "csrc/cpu/{}.h", "csrc/cuda/{}.cpp", "csrc/cuda/{}.cu"]
ROOMS += ["kernels/{}.py", "tests/test_{}.py"]


def stems():
    shared = {"python", "op"}
    return sorted(p.stem for p in (ROOT / "csrc").glob("*.cpp") if p.stem not in shared)


def test_the_ops():
    assert stems() == ["adamw", "layer_norm", "linear_gelu"]


@pytest.mark.parametrize("stem", stems())
@pytest.mark.parametrize("room", ROOMS)
def test_every_layer_has_every_op(stem, room):
    assert (ROOT / room.format(stem)).is_file()


@pytest.mark.parametrize("stem", stems())
def test_nothing_without_a_contract(stem):
    """No kernel of an op that has no schema."""
    for path in (ROOT / "kernels").glob("*.*"):
        assert path.stem in {*stems(), "__init__", "shared"}, path
    for path in (ROOT / "csrc/cuda").glob("*.c*"):
        assert path.name == "device.cuh" or path.stem.removesuffix("_sm90a") in stems(), path


def test_no_torch_in_kernel_files():
    """Torch's headers cost seconds a file, and its inline functions must not be compiled for AVX-512."""
    kernels = [*(ROOT / "csrc/math").glob("*.h"), *(ROOT / "csrc/cpu").glob("avx*.cpp")]
    kernels += [*(ROOT / "csrc/cuda").glob("*.cu*"), ROOT / "csrc/cuda/kernels.h"]
    kernels += [ROOT / "csrc/cpu" / f"{name}.h" for name in (*stems(), "simd", "kernels", "isa")]
    for path in kernels:
        includes = re.findall(r'#include [<"](.+?)[>"]', path.read_text())
        assert not [i for i in includes if i.startswith(("ATen", "torch", "c10"))], path
