"""Whether kernels that were built for another torch may be used with this one.

A torch newer than every one that nnfast was built for is met with the newest kernels there are, if they pass here: in a
process of their own, for a library that does not fit may take the process down, they are loaded with every symbol
they need and each op gives the answers that torch's own gives. What came out is kept until torch or the kernels change.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_SECONDS = 300


def failure(minor: str) -> str:
    """Why the kernels for that minor version of torch, like ``2_13``, cannot be used with this one; or ""."""
    from nnfast import __version__

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "nnfast")
    files = [*Path(__file__).parent.glob(f"_C_{minor}.*"), *Path(__file__).parent.glob("lib/*.so")]
    key = [__version__, torch.__version__, sys.version, *(f"{f} {f.stat().st_mtime_ns}" for f in sorted(files))]
    kept = folder / f"selftest-{minor}.json"
    try:
        said = json.loads(kept.read_text())
        if said["key"] == key:
            return said["failure"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from nnfast import selftest; selftest.main()"],
            env={
                **os.environ,
                "NNFAST_SELFTEST": minor,
                "NNFAST_BACKEND": "",
                "LD_BIND_NOW": "1",  # every symbol, at once
                "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], *sys.path[1:]))),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except (OSError, TypeError, subprocess.TimeoutExpired) as e:  # TypeError: an embedded Python has no executable
        return f"it could not be run: {e}"
    lines = (done.stderr or done.stdout).strip().splitlines()
    why = "" if done.returncode == 0 else f"exit status {done.returncode}: {lines[-1] if lines else 'no word'}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"key": key, "failure": why}))
        os.replace(new, kept)
    except OSError:
        pass  # it is asked again next time
    return why


def _same(ours: Callable, torchs: Callable, *tensors: torch.Tensor) -> None:
    """The values and gradients of both, in float32 and bfloat16, near each other."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        results = []
        for function in (ours, torchs):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            output = function(*leaves)
            grad = torch.linspace(1, -1, output.numel()).view(output.shape).to(dtype)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _layer_norm() -> None:
    from nnfast.nn import functional as F

    torchs = torch.nn.functional.layer_norm
    _same(lambda x, w, b: F.layer_norm(x, (33,), w, b), lambda x, w, b: torchs(x, (33,), w, b),
          _numbers(7, 33), _numbers(33), _numbers(33))  # fmt: skip


def _gelu() -> None:
    from nnfast.nn import functional as F

    _same(F.gelu, torch.nn.functional.gelu, _numbers(7, 33))


def _linear_gelu() -> None:
    from nnfast.nn import functional as F

    def torchs(x, w, b):
        return torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b))

    _same(F.linear_gelu, torchs, _numbers(7, 33), _numbers(17, 33), _numbers(17))


def _cross_entropy() -> None:
    from nnfast.nn import functional as F

    target, torchs = torch.arange(7) * 4, torch.nn.functional.cross_entropy
    _same(lambda x: F.cross_entropy(x, target), lambda x: torchs(x, target), _numbers(7, 33))


def _linear() -> None:
    from nnfast.nn import functional as F

    _same(F.linear, torch.nn.functional.linear, _numbers(7, 33), _numbers(17, 33), _numbers(17))


def _linear_cross_entropy() -> None:
    from nnfast.nn import functional as F

    target = torch.arange(7) * 2

    def torchs(x, w):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target)

    _same(lambda x, w: F.linear_cross_entropy(x, w, target), torchs, _numbers(7, 33), _numbers(17, 33))


def _attention() -> None:
    from nnfast.nn import functional as F

    torchs = torch.nn.functional.scaled_dot_product_attention
    _same(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), lambda *qkv: torchs(*qkv, is_causal=True),
          _numbers(1, 2, 7, 16), _numbers(1, 2, 7, 16), _numbers(1, 2, 7, 16))  # fmt: skip


def _step(name: str, **options) -> Callable[[], None]:
    def answer() -> None:
        from nnfast import optim

        results = []
        for library in (optim, torch.optim):
            parameter = torch.nn.Parameter(_numbers(7, 33))
            optimizer = getattr(library, name)([parameter], lr=0.1, **options)
            for step in range(3):
                parameter.grad = _numbers(7, 33) * (step - 1.5)
                optimizer.step()
            results.append(parameter.detach())
        torch.testing.assert_close(*results)

    return answer


def _clip() -> None:
    from nnfast.nn import utils

    results = []
    for clip in (utils.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        parameter = torch.nn.Parameter(_numbers(7, 33))
        parameter.grad = _numbers(7, 33)
        results.append((clip([parameter], 1.0), parameter.grad))
    torch.testing.assert_close(*results)


#: The known answer of each op of the doctor's list.
ANSWERS: dict[str, Callable[[], None]] = {
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "linear": _linear,
    "linear_gelu": _linear_gelu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "scaled_dot_product_attention": _attention,
    "adamw_": _step("AdamW"),
    "sgd_": _step("SGD", momentum=0.9),
    "rmsprop_": _step("RMSprop"),
    "total_norm": _clip,
}


def main() -> None:
    """In the child: raises where an op does not give its answer, or was not ours."""
    from nnfast import backend

    assert backend.native is not None, backend.why_not
    if backend.native.cpu_kernels() is None:
        return
    with backend.use_backend("cpu"):  # an error where a call is handed to torch
        for answer in ANSWERS.values():
            answer()
