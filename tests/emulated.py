"""The CUDA kernels on this CPU, through the ops: run by ``make emulate``.

    python tests/emulate/run.py asan|tsan|plain [what pytest takes]

``tests/emulate`` builds csrc/cuda, kernels and host code, for a CPU: every CUDA thread is a fiber, run in random order.
The library registers itself at the CPU's key, so that plain tensors reach it through the gate and autograd.
NNFAST_EMULATE=slice tries fewer sizes.
"""

import ctypes
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from common import FLOAT_AND_HALF as DTYPES
from common import HALF, assert_close, double, layouts, served
from gpu_checks import (
    ADAMW_OPTIONS,
    check_adamw,
    check_adamw_on_the_device,
    check_clipping,
    check_empty,
    check_linear_gelu_layouts,
    check_nan_stays_in_its_row,
    check_only_what_is_wanted,
)
from test_adamw import train
from test_layer_norm import compare as compare_layer_norm
from test_layer_norm import compare_to_float32
from test_linear_gelu import AHEAD, compare_mlp, mlp_leaves
from test_linear_gelu import compare as compare_linear_gelu
from test_optimizers import CASES as OPTIMIZERS
from test_optimizers import exact as exact_step
from test_optimizers import loop

import nnfast.nn.functional as F
import nnfast.optim as optim
from nnfast import reference

LIBRARY, SLICE = os.environ["NNFAST_EMULATED"], os.environ.get("NNFAST_EMULATE") == "slice"

torch.ops.load_library(LIBRARY)
device = ctypes.CDLL(LIBRARY)

# Multiprocessors: so few that a persistent kernel takes several rounds. Bytes of shared memory for a block.
PROCESSORS, SHARED = 1, 227 << 10


# A device: its number, by which answers are kept; what its kernels were compiled for; how many clusters of blocks it
# says it runs at a time; and whether it does.
HOPPER, AMPERE, NO_ROOM, REFUSES = (0, 90, 2, True), (1, 80, 2, True), (2, 90, 0, True), (3, 90, 2, False)


@pytest.fixture(autouse=True)
def _device():
    device.emulate_device(PROCESSORS, SHARED)
    device.emulate_clusters(*HOPPER)
    device.emulate_order(0)
    yield
    device.emulate_scalars_on_device(False)
    device.emulate_capturing(False)
    device.emulate_memory_left(-1)


def tensor(*shape, dtype=torch.float32, grad=True, mean=0.0):
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype).requires_grad_(grad)


# Rows that fill what HeldForward and HeldBackward of layer_norm.cu hold; longer rows are a cluster's in the backward.
# Tried around each: the size itself, an element over and under, and a vector of 16 bytes over and under.
HELD = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def row_sizes(dtype):
    vector = 16 // dtype.itemsize
    around = lambda s: (s - 1, s) if SLICE else (s - vector, s - 1, s, s + 1, s + vector)  # noqa: E731
    return [1, 5, vector, *itertools.chain.from_iterable(map(around, HELD)), 12008, 16385, 20008]


def row_counts(size):
    """One row; and one more than two rounds of a persistent kernel, as far as the work goes."""
    return (1, max(3, min(163, 4000 // size)))


@pytest.mark.parametrize("weight", ["same", "float", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype, weight):
    """Every way to hold a row, by vectors and by elements, forward and backward. With a weight in float, the output
    is, too."""
    if weight == "float" and dtype is torch.float32:
        return
    for size in row_sizes(dtype):
        affine = [None if weight == "none" else tensor(size, dtype=dtype) for _ in "wb"]
        for rows in row_counts(size):
            x, g = tensor(rows, size, dtype=dtype), tensor(rows, size, dtype=dtype, grad=False)
            # With both a weight and a bias, and without the bias.
            given = affine if rows > 1 else (affine[0], None)
            compare = compare_to_float32 if weight == "float" else compare_layer_norm
            compare((x, (size,), *given, 1e-5), g, f"{rows} x {size}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_rows_too_long_for_shared_memory(dtype):
    device.emulate_device(PROCESSORS, 30000)
    for size in (16392, 20001):
        x, g = tensor(2, size, dtype=dtype), tensor(2, size, dtype=dtype, grad=False)
        compare_layer_norm((x, (size,), tensor(size, dtype=dtype), None, 1e-5), g, f"{size}")


@pytest.mark.parametrize("on", [HOPPER, AMPERE, NO_ROOM, REFUSES], ids=["hopper", "ampere", "no room", "refuses"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_backward_of_long_rows(dtype, on):
    """By clusters of 2, 4 and 8 blocks that take several rows each, the last block with little or nothing; and by no
    cluster: where the row is too long, the code or the device knows none, or the launch is refused."""
    device.emulate_clusters(*on)
    for size in (16385, 65552) if SLICE else (8193, 8200, 16384, 16385, 16392, 32768, 32776, 65536, 65552):
        rows = 5 if size < 20000 else 1
        for affine in (True, False):
            x, g = tensor(rows, size, dtype=dtype), tensor(rows, size, dtype=dtype, grad=False)
            weight, bias = (tensor(size, dtype=dtype) if affine else None for _ in "wb")
            compare_layer_norm((x, (size,), weight, bias, 1e-5), g, f"{rows} x {size}")
            if dtype in HALF and affine:
                compare_to_float32((x, (size,), weight, bias, 1e-5), g, f"{rows} x {size} to float32")


@pytest.mark.parametrize("size", [13, 64, 1000, 2048, 16392])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_layouts(dtype, size):
    """Strides and offsets of input, gradient, weight and bias: 16-byte accesses only where all lie on 16 bytes."""
    if SLICE and size > 2048:
        return
    shape = (2, 3 if size < 5000 else 1, size)
    x, g = tensor(*shape, dtype=dtype, grad=False), tensor(*shape, dtype=dtype, grad=False)
    weight, bias = tensor(size, dtype=dtype), tensor(size, dtype=dtype)
    for name, input in layouts(x).items():
        compare_layer_norm((input.detach().requires_grad_(), (size,), weight, bias, 1e-5), g, name)
    for name, grad in layouts(g).items():
        compare_layer_norm((x.detach().requires_grad_(), (size,), weight, bias, 1e-5), grad, f"gradient {name}")
    for name, w in layouts(torch.stack([weight, bias]).detach()).items():
        affine = (t.detach().requires_grad_() for t in w)
        compare_layer_norm((x.detach().requires_grad_(), (size,), *affine, 1e-5), g, f"weight {name}")
    if dtype in HALF:
        for name, input in layouts(x).items():
            compare_to_float32((input.detach().requires_grad_(), (size,), weight, bias, 1e-5), g, f"{name} to float32")
        for name, grad in layouts(g.float()).items():
            x = x.detach().requires_grad_()
            compare_to_float32((x, (size,), weight, bias, 1e-5), grad, f"gradient {name} to float32")


@pytest.mark.parametrize("size", [1, 60, 700, 9000, 17000])
def test_layer_norm_far_from_zero(size):
    x = tensor(4, size, mean=2000.0)
    compare_layer_norm((x, (size,), None, None, 1e-5), tensor(4, size, grad=False), f"mean 2000, {size}")


@pytest.mark.parametrize("size", [33, 1000, 8200, 17000])
def test_layer_norm_nan_stays_in_its_row(size):
    check_nan_stays_in_its_row(size)


@pytest.mark.parametrize("size", [10, 300, 8200])
def test_layer_norm_only_what_is_wanted(size):
    check_only_what_is_wanted(size)


@pytest.mark.parametrize("rows, size", [(300, 96), (5, 9000)])
def test_layer_norm_repeats_to_the_bit(rows, size):
    """Whatever order the threads run in."""
    x, g, w = tensor(rows, size), tensor(rows, size, grad=False), tensor(size)
    results = []
    for seed in range(4):
        device.emulate_order(seed)
        y = F.layer_norm(x, (size,), w, w)
        results.append((y, *torch.autograd.grad(y, (x, w), g)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_empty():
    check_empty()


def test_a_gpu_that_no_image_fits():
    """Asked once a device, and each device has its own answer."""
    device.emulate_load_on.restype = ctypes.c_bool
    device.emulate_images(False)
    assert not device.emulate_load_on(5)
    device.emulate_images(True)
    assert device.emulate_load_on(6) and not device.emulate_load_on(5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype, approximate):
    """Around a vector and a block; misaligned; and the formula's values beside torch's."""
    vector = 16 // dtype.itemsize
    block = 256 * vector
    sizes = (1, vector - 1, vector, vector + 1, block - 1, block, block + 1, 3 * block + 5)
    for size, offset in itertools.product(sizes, (0, 1)):
        x, g = ((4 * torch.randn(size + offset)).to(dtype)[offset:] for _ in "xg")
        x = x.detach().requires_grad_()
        results = []
        for f, a, b in (
            (F.gelu, x, g), (torch.nn.functional.gelu, x, g), (reference.gelu, double(x), g.double())
        ):  # fmt: skip
            output = f(a, approximate=approximate)
            results.append((output, *torch.autograd.grad(output, a, b)))
        for ours, torchs, true in zip(*results, strict=True):
            assert_close(ours, torchs, true, f"{size} from {offset}", scale=x.abs().max().item())
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e-30]).repeat(3)
    expected = torch.tensor([float("nan"), float("inf"), float("nan"), 1e30, 0.0, 0.5e-30])
    torch.testing.assert_close(F.gelu(x, approximate=approximate)[:6], expected, equal_nan=True)


# Rows over and under a tile and a part; columns over and under a vector and a tile.
PRODUCTS = [((5,), 3), ((2, 3, 17), 33), ((70, 40), 136), ((130, 72), 64), ((200, 8), 300), ((9, 4), 520)]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu(dtype, approximate):
    for (shape, out), has_bias in itertools.product(PRODUCTS, (True, False)):
        x, weight, bias = (tensor(*s, dtype=dtype) for s in (shape, (out, shape[-1]), (out,)))
        args = x, weight, bias if has_bias else None, approximate
        grad = tensor(*shape[:-1], out, dtype=dtype, grad=False)
        compare_linear_gelu(args, grad, f"{shape} -> {out}, {approximate}")


@pytest.mark.parametrize("dtype", HALF)
def test_a_linear_that_reads_a_gelu(dtype):
    """Where CUTLASS has no kernel: a product, and the pass over it."""
    for (shape, hidden), approximate in itertools.product(PRODUCTS, ("none", "tanh")):
        with served(*AHEAD):
            leaves = mlp_leaves(dtype, shape, hidden, 12)
            compare_mlp(leaves, torch.randn(*shape[:-1], 12), f"{shape} -> {hidden}", approximate)


def test_linear_gelu_layouts():
    check_linear_gelu_layouts()


CHUNK = int(re.search(r"kStepChunk = (\d+);", (Path(__file__).parents[1] / "csrc/cuda/kernels.h").read_text())[1])
SIZES = [(0,), (1,), (3,), (4,), (5,), (), (3, 0, 2), (5, 13), (CHUNK - 1,), (CHUNK,), (2 * CHUNK + 3,), (0, 4)]


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES[2:], DTYPES], ids=str)
def test_adamw(dtypes, options):
    check_adamw(SIZES, dtypes, options, steps=2)


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_adamw_on_the_device(amsgrad, found):
    """Tensors of several chunks, which share a count."""
    device.emulate_scalars_on_device(True)
    check_adamw_on_the_device((0, 5, 3 * CHUNK + 1), amsgrad, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=str)
def test_optimizers(name, options, dtype):
    """Adam, SGD and RMSprop over the same table."""
    if name == "RMSprop" and dtype in HALF:
        options = {**options, "eps": 1e-3}  # which torch's arithmetic in 16 bits can tell from 0
    params, *grads = ([tensor(*s, dtype=dtype, grad=False) for s in SIZES] for _ in range(4))
    ours, optimizer = train(getattr(optim, name), params, grads, **options)
    torchs, _ = train(getattr(torch.optim, name), params, grads, **loop(name, options, dtype))
    true, _ = exact_step(name, params, grads, **options)
    for p, q, t in zip(ours, torchs, true, strict=True):
        assert_close(p, q, t, f"{tuple(p.shape)}")
    assert all(s["step"] == 3 for s in optimizer.state.values() if "step" in s)


def test_rmsprop_on_the_device():
    """Counts and lr that are on the GPU."""
    results = []
    for on_device in (False, True):
        torch.manual_seed(0)
        lists = [[torch.rand(s) for s in (0, 5, 3 * CHUNK + 1)] for _ in range(3)]
        steps = [torch.tensor(float(t)) for t in (3, 4, 9)]
        device.emulate_scalars_on_device(on_device)
        torch.ops.nnfast.rmsprop_(
            *lists, [], [], steps, lr=0.0 if on_device else 0.1, tensor_lr=torch.tensor(0.1) if on_device else None,
            alpha=0.9, eps=1e-8, weight_decay=0.1, momentum=0.0,
        )  # fmt: skip
        results.append((lists, steps))
    torch.testing.assert_close(*results)
    assert [s.item() for s in results[0][1]] == [4, 5, 10]


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES], ids=str)
def test_clipping(dtypes):
    """Whatever order the threads run in."""
    check_clipping(SIZES, dtypes, rtol=1e-7, in_another_order=device.emulate_order)


def test_a_captured_step_keeps_its_table():
    """The table is filled beside the graph; without memory for it: an error, no change, and the next step works."""
    device.emulate_capturing(True)
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        p, grads = torch.randn(1000, requires_grad=True), [torch.randn(1000) for _ in range(3)]
        optimizer = kind([p], lr=0.1)
        for step in range(3):
            p.grad = grads[step]  # each elsewhere, so that it takes a table of its own
            if step == 2 and kind is optim.AdamW:
                before = p.detach().clone()
                device.emulate_memory_left(0)
                with pytest.raises(RuntimeError, match="no memory"):
                    optimizer.step()
                device.emulate_memory_left(-1)
                assert torch.equal(p, before) and optimizer.state[p]["step"] == 2
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_adamw_layouts():
    """Other strides, and addresses that are no multiple of 16 bytes; a NaN stays where it is, amsgrad or not."""
    base = torch.randn(20, 18)
    base[3, 4] = float("nan")
    cases = {
        "transposed": (base.t().contiguous().t(), base),
        "gradient transposed": (base.clone(), base.t().contiguous().t()),
        "gradient with gaps": (base.clone(), torch.randn(20, 36)[:, ::2]),
        "parameter misaligned": (torch.randn(400)[3:363].view(20, 18), torch.randn(20, 18)),
        "gradient misaligned": (torch.randn(20, 18), torch.randn(400)[5:365].view(20, 18)),
    }
    for (name, (param, grad)), amsgrad in itertools.product(cases.items(), (False, True)):
        results = []
        for kind, p in ((optim.AdamW, param.detach()), (torch.optim.AdamW, param.clone())):
            p = p.clone() if "misaligned" not in name else p.detach()
            p.requires_grad_().grad = grad.clone() if "gradient m" not in name else grad
            optimizer = kind([p], lr=0.1, amsgrad=amsgrad)
            optimizer.step()
            optimizer.step()
            results.append(p.detach())
        torch.testing.assert_close(*results, msg=name, equal_nan=True)


def test_all_of_this_was_launched():
    """Last: every kernel that the library holds, each of its instances."""
    room = (ctypes.c_size_t * 4096)()
    found = set(room[: device.emulate_launched(room, len(room))])
    listed = subprocess.run(["nm", "-C", LIBRARY], capture_output=True, text=True, check=True).stdout
    kernels = {
        int(address, 16): name
        for address, name in re.findall(r"^(\w+) [tTwW] (.*_kernel(?:<.*>)?\(.*)$", listed, re.MULTILINE)
        if not any(part in name for part in ("clone", ".cold", "{lambda"))
    }
    assert len(kernels) > 50
    missing = sorted(name for at, name in kernels.items() if at not in found)
    assert not missing, "\n".join(missing)
