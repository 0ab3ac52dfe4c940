"""Which kernels there are here, and the one switch that forces a backend.

The registry of kernels is PyTorch's dispatcher, and the gate that decides call by call stands in C++
(``csrc/gate/python.cpp``). This module loads the extension, or says why it could not, and holds ``use_backend``.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from nnfast import kernels, selftest
from nnfast._torch import has_kernel

BACKENDS = ("cuda", "triton", "cpu", "torch")


def _warn(why: str) -> None:
    warnings.warn_explicit(why, UserWarning, "nnfast", 1)  # one line: no line of source is shown below it


_HERE = Path(__file__).parent


def _load() -> tuple[ModuleType | None, str]:
    """The extension for this torch, and a note on it or ""; or None, and why."""
    there = sorted(tuple(map(int, path.name.split(".")[0].split("_")[2:])) for path in _HERE.glob("_C_*.so"))
    if not there:
        return None, "nnfast was installed without native kernels; install it again where a C++ compiler is at hand"
    running = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    built_for = ", ".join(f"{major}.{minor}" for major, minor in there)
    why, note = "", ""
    if asked := os.environ.get("NNFAST_SELFTEST"):  # this process is the self-test of those kernels
        running = tuple(map(int, asked.split("_")))
    elif running not in there:
        why = note = f"nnfast's kernels were built for torch {built_for} and torch {torch.__version__} is running"
        if running > there[-1]:
            running = there[-1]
            if why := selftest.failure("{}_{}".format(*running)):
                why = f"{note}, where they fail their self-test ({why})"
            note += f"; those for torch {built_for.split()[-1]} passed their self-test with it and serve"
    if why:
        why += ", so torch serves every call; install nnfast again, from its folder or a newer wheel"
        _warn(why)
        return None, why
    minor = "{}_{}".format(*running)
    try:
        _load_cuda(minor)
        return importlib.import_module(f"nnfast._C_{minor}"), note
    except ImportError as e:
        why = f"nnfast's kernels could not be loaded ({e}), so torch serves every call"
        _warn(why)
        return None, why


def _load_cuda(minor: str) -> None:
    """Load the CUDA kernels, if any are for this torch's CUDA. The gate looks for them once, when it is loaded next."""
    major = (torch.version.cuda or "").split(".")[0]
    library = _HERE / f"lib/libnnfast_torch_{minor}_cuda_{major}.so"
    if major and library.exists():
        try:
            ctypes.CDLL(str(library))
        except OSError as e:
            _warn(f"nnfast's CUDA kernels could not be loaded ({e}), so Triton's or torch's serve")


#: The compiled extension, and a note on it or ""; or None, and why.
native, why_not = _load()


class _Forced(threading.local):
    name: str | None = os.environ.get("NNFAST_BACKEND") or None
    overriding = False  # whether this thread wants Triton's kernels in the place of C++'s


_forced = _Forced()
#: How many threads are held to torch's ops: a compiled graph cannot tell which of them runs it.
torch_is_held = int(_forced.name == "torch")


def available(name: str) -> str:
    """Why backend ``name`` cannot serve here, or "" where it can."""
    if name not in BACKENDS:
        return f"there is no such backend; there are {', '.join(BACKENDS)}"
    if name == "torch":
        return ""
    if name == "cpu":
        if native is None:
            return why_not
        if native.cpu_kernels() is None:
            return f"this CPU offers neither AVX2 nor AVX-512 to torch ({torch.backends.cpu.get_cpu_capability()})"
        return ""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if native is None:
        return why_not
    if name == "triton":
        return no_triton()
    return "" if native.cuda_kernels() else "nnfast was built without CUDA kernels"


def server(op: str, device: str) -> tuple[str, str]:
    """Who serves ``op`` on a device of this kind, ``"cpu"`` or ``"cuda"``, and why."""
    if forced() is not None:
        return forced(), "it was asked for"
    if why := available("cpu") if device == "cpu" else available("cuda") and available("triton"):
        return "torch", why
    if device == "cpu":
        double = "" if op in ("scaled_dot_product_attention", "gelu") else ", float64"
        return "cpu", f"{native.cpu_kernels()}: float32, bfloat16, float16{double}"
    covered = "float32, bfloat16, float16"
    if op in native.cuda_kernels():
        return "cuda", covered
    if why := no_triton():
        return "torch", f"not among the CUDA kernels, and {why}"
    return ("triton", covered) if op in kernels.OPS else ("torch", "nnfast has no GPU kernel for it")


@functools.cache
def no_triton() -> str:
    """Why Triton's kernels cannot be used with this torch, or ""; asked without importing Triton."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch is built for CPUs alone"
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


# Triton's kernels at the CUDA key of the dispatcher (HIP's too), as long as this lives.
_library: torch.library.Library | None = None
# How many threads want them in the place of C++'s.
_overriding, _lock = 0, threading.Lock()


def _register(override: bool) -> None:
    """Put Triton's kernels where C++ left the CUDA key empty, or everywhere. Nothing is imported or compiled yet."""
    global _library
    if _library is not None:
        _library._destroy()
    _library = torch.library.Library("nnfast", "IMPL")
    empty = [op for op in kernels.OPS if not has_kernel(f"nnfast::{op}", "CUDA")]
    ops = list(kernels.OPS) if override else empty
    for op in ops:
        _library.impl(op, kernels.launcher(op), "CUDA", allow_override=override)
    native.triton_kernels([*ops, *kernels.RECORDED] if "gelu_linear_backward" in ops else ops)


def forced() -> str | None:
    """The backend that this thread is held to, or None."""
    return _forced.name


def _force(name: str | None) -> None:
    global torch_is_held
    if name is not None and (why := available(name)):
        raise RuntimeError(f"nnfast: backend {name!r} was asked for, but {why}")
    with _lock:
        torch_is_held += (name == "torch") - (_forced.name == "torch")
    _forced.name = name
    if native is not None:
        _override(name == "triton")
        native.hold(name)


def _override(wanted: bool) -> None:
    global _overriding
    with _lock:
        before = _overriding
        _overriding += wanted - _forced.overriding
        _forced.overriding = wanted
        if bool(_overriding) != bool(before):
            _register(override=wanted)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Hold every nnfast op of this thread to one backend, for tests and benchmarks.

    Args:
        name: ``"cpu"`` (the native kernels), ``"torch"`` (torch's own ops), ``"cuda"`` (kernels compiled with the
            extension) or ``"triton"``. The last puts Triton's kernels at the CUDA key of PyTorch's dispatcher, so other
            threads that hold to no backend see them too until the block ends.

    Raises:
        RuntimeError: at once where the backend is not to be had here, and at the call where it does not cover the
            inputs (but for ``embedding``, whose arithmetic is torch's in any case). Nothing else falls back silently
            inside this block.
    """
    before = _forced.name
    _force(name)
    try:
        yield
    finally:
        _force(before)


def empty_cache() -> None:
    """Give the memory that is kept for the next large CPU outputs back to the system.

    Outputs from half a MB on reuse memory that was freed before. Kept and used memory together are never more than was
    in use at once, and what was not needed for some ten seconds is given back at the next call. GPU memory is
    ``torch.cuda.empty_cache``'s.
    """
    if native is not None:
        native.empty_cache()


def torch_serves(op: str) -> None:
    """To be called before torch's op is: raises where the user forced another backend, except in a compiled graph."""
    if not torch.compiler.is_compiling() and _forced.name not in (None, "torch"):
        raise RuntimeError(
            f"nnfast: backend {_forced.name!r} was asked for, and it does not cover this call of {op}: its tensors' "
            "type, dtype, device, layout or shape, or a transform or mode that is active"
        )


if native is not None and not no_triton():
    _register(override=False)
if native is not None:
    native.known_answers(selftest.right, False)
if native is not None and _forced.name is not None:
    _force(_forced.name)
