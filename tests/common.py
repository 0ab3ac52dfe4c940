"""What the tests share: dtypes, awkward layouts, how close is close enough, who served, and what a call gives."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# What the kernels of a GPU, and ours of attention, compute in.
FLOAT_AND_HALF = (torch.float32, *HALF)
DTYPES = (*FLOAT_AND_HALF, torch.float64)


def rows_of_tables() -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    """Of each row of README.md's tables: the table's number, the first cell, and every (file, test) that the last cell
    names. A test without a file is one of the file before it."""
    table, file = -1, ""
    for line in Path(__file__).with_name("README.md").read_text().splitlines():
        if line.endswith("| where |"):
            table += 1
        elif table >= 0 and line.startswith("| "):
            _, first, *_, last, _ = line.split("|")
            tests = []
            for path, test in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", last):
                file = path or file
                tests.append((file, test))
            yield table, first, tests


def contract() -> set[tuple[str, str]]:
    """Every (file, test) that the first table, the contract's rows, names."""
    return {test for table, _, tests in rows_of_tables() if table == 0 for test in tests}


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


def run(function: Callable, args, grad_out: Tensor, **keywords) -> list[Tensor]:
    """Output and gradients of one call."""
    output = function(*args, **keywords)
    leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    return [output, *torch.autograd.grad(output, leaves, grad_out)]


def compare(ours: Callable, torchs: Callable, formula: Callable, args, grad_out: Tensor, what: str) -> None:
    """Output and gradients of a call of ours, beside torch's and the formula's in float64."""
    exact = [double(a) if isinstance(a, Tensor) else a for a in args]
    results = run(ours, args, grad_out), run(torchs, args, grad_out), run(formula, exact, grad_out.double())
    for name, a, b, true in zip(("output", "input", "weight", "bias"), *results, strict=False):
        assert_close(a, b, true, f"{what}: {name}")


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
def served(*paths: str, when: bool = True):
    """Fails unless each of these ops and internal paths of ours (``Path`` in csrc) was taken inside the block. Where
    ``when`` is false, as for torch's half of a comparison, it looks at nothing."""
    from nnfast.backend import native

    before = native.paths() if when else {}
    yield
    after = native.paths() if when else {}
    missed = [path for path in paths if when and after[path] == before[path]]
    assert not missed, f"not served by ours: {missed}"


@contextlib.contextmanager
def left_to_torch(*paths: str):
    """Fails if one of these ops and internal paths of ours was taken inside the block."""
    from nnfast.backend import native

    before = native.paths()
    yield
    after = native.paths()
    taken = [path for path in paths if after[path] != before[path]]
    assert not taken, f"served by ours: {taken}"


@contextlib.contextmanager
def threads(count: int):
    """With so many threads of torch's inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def outcome(call, *args, **keywords):
    """What a call gives: its result, or the type and text of the error that it raises."""
    try:
        return call(*args, **keywords)
    except Exception as e:
        return type(e), str(e)


def is_error(found) -> bool:
    """Whether an outcome is an error."""
    return isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], type)


def assert_same_error(ours: Callable, torchs: Callable, *args, **keywords) -> None:
    """Both refuse the call: the same type of error, with the same text."""
    found = [outcome(function, *args, **keywords) for function in (ours, torchs)]
    assert is_error(found[0]) and is_error(found[1]) and found[0] == found[1], (found, args, keywords)


def run_script(code: str, *args, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a script prints in an interpreter of its own; ``env`` comes on top of this process's. A hang is an error."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def available_memory() -> int:
    """Bytes that the system has free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
