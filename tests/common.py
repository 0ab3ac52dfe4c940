"""What the tests of the ops share: dtypes, awkward layouts, and how close is close enough."""

import contextlib
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)


def contract() -> set[tuple[str, str]]:
    """Every (file, test) that the first table of README.md, the contract's rows, names."""
    table = Path(__file__).with_name("README.md").read_text().partition("| row |")[2].partition("\n\n")[0]
    tests, file = set(), ""
    for line in table.splitlines():
        for path, test in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", line.split("|")[-2] if "|" in line else ""):
            file = path or file
            tests.add((file, test))
    return tests


def double(t: Tensor | None) -> Tensor | None:
    """The same values in float64, a leaf that requires a gradient where t does."""
    return None if t is None else t.detach().double().requires_grad_(t.requires_grad)


def assert_close(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "", scale: float = 0) -> None:
    """``ours`` is as near to ``exact``, which is in float64, as ``torchs`` is, up to the luck of rounding.

    The bound: twice torch's largest error, for two ways to the same sum are two draws from one distribution, and
    one unit in the last place at the tensor's largest value, for torch's draw may have been zero. ``scale`` is the
    size of the terms, where they cancel to something smaller. In float64 ``exact`` is itself such a draw, so the bound
    is four times as wide.
    Whether we are worse on average is what the tests named ``no_less_accurate`` look at, over many values.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape == exact.shape, what
    unit, draws = torch.finfo(ours.dtype).eps, 2 if ours.dtype != torch.float64 else 8
    ours, torchs, exact = (t.detach().double() for t in (ours, torchs, exact))
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{what}: NaN elsewhere than torch's"
    finite = exact.isfinite() & torchs.isfinite()
    if finite.any():
        error, torchs_error = ((t - exact)[finite].abs().max() for t in (ours, torchs))
        bound = draws * (torchs_error + unit / 2 * max(exact[finite].abs().max(), scale))
        assert error <= bound, f"{what}: error {error:.3g} over the bound of {bound:.3g}"


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The values of a matrix or batch of them, in memory in all the ways a user's tensor may lie."""
    wide = t.new_empty(*t.shape[:-1], t.shape[-1] + 3)
    wide[..., : t.shape[-1]] = t
    apart = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    apart[..., ::2] = t
    offsets = {}
    for k in (1, 3, 7):
        flat = t.new_empty(t.numel() + 7)
        offsets[f"offset {k}"] = flat[k : k + t.numel()].view(t.shape).copy_(t)
    return {
        "contiguous": t.contiguous(),
        "rows apart": wide[..., : t.shape[-1]],
        "elements apart": apart[..., ::2],
        "transposed": t.transpose(0, -1).contiguous().transpose(0, -1),
        "one row expanded": t[:1].expand_as(t),
        "one element expanded": t.flatten()[:1].view([1] * t.dim()).expand_as(t),
        **offsets,
    }


@contextlib.contextmanager
def served(*paths: str):
    """Fails unless each of these ops and internal paths of ours (``Path`` in csrc) was taken inside the block."""
    from nnfast.backend import native

    before = native.paths()
    yield
    after = native.paths()
    assert not (missed := [path for path in paths if after[path] == before[path]]), f"not served by ours: {missed}"


@contextlib.contextmanager
def thresholds(**values: int):
    """Numbers that choose between internal paths (``Threshold`` in csrc; a dot in a name is two underscores here)."""
    from nnfast.backend import native

    values = {name.replace("__", "."): value for name, value in values.items()}
    before = native.thresholds() if values else {}
    try:
        for name, value in values.items():
            native.set_threshold(name, value)
        yield
    finally:
        for name in values:
            native.set_threshold(name, before[name])


@contextlib.contextmanager
def failing_allocation(n: int):
    """Allocation number ``n`` of the block, torch's or ours, counted from 0, fails; yields whether it has.

    Not where torch serves: its own backward of addmm ends the process then.
    """
    from nnfast.backend import available, native

    assert not available("cpu")
    failed = []
    native.fail_allocation(n)
    try:
        yield failed
    finally:
        if native.fail_allocation(-1) < 0:
            failed.append(True)


def every_allocation_fails(call, state: Callable[[], list[Tensor]] = list) -> int:
    """Each allocation of a call fails once: torch's error, ``state()`` as it was, and then the call does its work.

    ``call`` gives the same tensors each time, or changes ``state()``, which is put back before the next call. None of
    our memory may leak. Returns how many allocations there were.
    """
    from nnfast.backend import native

    def copy():
        return [t.detach().clone() for t in state()]

    def put_back():
        for t, value in zip(state(), before, strict=True):
            t.detach().copy_(value)

    before = copy()
    live = native.memory()[0]
    expected = [*(t.detach().clone() for t in call() or ()), *copy()]
    for n in itertools.count():
        put_back()
        error = None
        with failing_allocation(n) as failed:
            try:
                call()
            except RuntimeError as e:
                error = str(e)
        if not failed:
            assert error is None and n > 0
            put_back()
            return n
        assert error and "allocate memory" in error, f"allocation {n}: {error}"
        assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True)), f"allocation {n} left a change"
        assert native.memory()[0] == live, f"allocation {n} leaked"
        again = [*(call() or ()), *state()]
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), f"after allocation {n}"
        del again


def outcome(call):
    """What a call gives: a tensor, or the error it raises."""
    try:
        return call()
    except Exception as e:
        return type(e), str(e)


def available_memory() -> int:
    """Bytes that the system has free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
