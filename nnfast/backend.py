"""Which kernels there are here, and the one switch that forces a backend.

The registry of kernels is PyTorch's dispatcher, and the gate that decides call by call stands in C++
(``csrc/python.cpp``). This module loads the extension, or says why it could not, and holds :func:`use_backend`.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch")


def _warn(why: str) -> None:
    warnings.warn_explicit(why, UserWarning, "nnfast", 1)  # one line: no line of source is shown below it


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason, without ever loading one that was built for another torch."""
    try:
        built_for = Path(__file__).with_name("_built_for.txt").read_text().strip()
    except FileNotFoundError:
        return None, "nnfast was installed without native kernels; reinstall it where a C++ compiler is at hand"
    if built_for != torch.__version__:
        why = (
            f"nnfast's kernels were built for torch {built_for} and torch {torch.__version__} is running, so torch "
            "serves every call; to rebuild: pip install --no-build-isolation --force-reinstall --no-deps nnfast"
        )
        _warn(why)
        return None, why
    try:
        from nnfast import _C
    except ImportError as e:
        why = f"nnfast's kernels could not be loaded ({e}), so torch serves every call"
        _warn(why)
        return None, why
    return _C, ""


#: The compiled extension, or None; and, where it is None, why.
native, why_not = _load()


class _Forced(threading.local):
    name: str | None = os.environ.get("NNFAST_BACKEND") or None


_forced = _Forced()


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
    return f"this version of nnfast has no {name} kernels yet"


def forced() -> str | None:
    """The backend that this thread is held to, or None."""
    return _forced.name


def _force(name: str | None) -> None:
    if name is not None and (why := available(name)):
        raise RuntimeError(f"nnfast: backend {name!r} was asked for, but {why}")
    _forced.name = name
    if native is not None:
        native.close(name == "torch")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Hold every nnfast op of this thread to one backend, for tests and benchmarks.

    Args:
        name: ``"cpu"`` (the native kernels), ``"torch"`` (torch's own ops), ``"cuda"`` or ``"triton"``.

    Raises:
        RuntimeError: at once where the backend is not to be had here, and at the call where it does not cover the
            inputs. Nothing falls back silently inside this block.
    """
    before = _forced.name
    _force(name)
    try:
        yield
    finally:
        _force(before)


def torch_serves(op: str) -> None:
    """Called before a call is handed to torch's op: an error where the user forced another backend."""
    if _forced.name not in (None, "torch"):
        raise RuntimeError(
            f"nnfast: backend {_forced.name!r} was asked for, and it does not cover this call of {op}: its tensors' "
            "type, dtype, device, layout or shape, or a transform or mode that is active"
        )


if native is not None and _forced.name is not None:
    _force(_forced.name)
