"""Whether kernels may be used where nobody has tried them: each op must give the answers that torch's own gives.

With a torch newer than every one that nnfast was built for, the newest kernels serve if they pass here. They are
loaded, with every symbol they need, in a process of their own, for a library that does not fit may take its process
down. What came out is kept until torch or the kernels change.

The kernels of a GPU are tried before their first call there, op by op and dtype by dtype, LayerNorm's for each way to
hold a row. What passes is kept until the GPU's name, its driver, torch or the kernels change; what does not is
torch's for the rest of the process, with one warning.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

_SECONDS = 300


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "nnfast")


def _read(path: Path) -> dict:
    try:
        said = json.loads(path.read_text())
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, said: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(said))
        os.replace(new, path)
    except OSError:
        pass  # it is asked again next time


def _key(*files: Path) -> list[str]:
    """What an answer depends on."""
    from nnfast import __version__

    return [__version__, torch.__version__, sys.version, *(f"{f} {f.stat().st_mtime_ns}" for f in sorted(files))]


def failure(minor: str) -> str:
    """Why the kernels for that minor version of torch, like ``2_13``, cannot be used with this one; or ""."""
    here, kept = Path(__file__).parent, _folder() / f"selftest-{minor}.json"
    key = _key(*here.glob(f"_C_{minor}.*"), *here.glob("lib/*.so"))
    said = _read(kept)
    if said.get("key") == key and "failure" in said:
        return said["failure"]
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
    _write(kept, {"key": key, "failure": why})
    return why


# ---- the answers ----


@dataclasses.dataclass(frozen=True)
class Where:
    """Where an op is tried: on a device, in a dtype, and with rows of a size where kernels differ by that."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    size: int = 32

    def numbers(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    @property
    def tolerance(self) -> float:
        """A kernel that is broken is off by the size of its numbers. On a GPU a product may be in TF32, as the user
        wants it."""
        exact = 1e-4 if self.device == "cpu" else 1e-2
        return {torch.float32: exact, torch.float16: 1e-2, torch.bfloat16: 0.05}[self.dtype]

    @property
    def processors(self) -> int:
        """The multiprocessors of a GPU."""
        on_gpu = self.device != "cpu"
        return torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 0

    def close(self, ours: torch.Tensor, torchs: torch.Tensor) -> None:
        scale = max(1.0, torchs.abs().max().item())
        torch.testing.assert_close(ours, torchs, rtol=self.tolerance, atol=self.tolerance * scale)

    def same(self, ours: Callable, torchs: Callable, *shapes: tuple[int, ...]) -> None:
        """The values and gradients of both, near each other."""
        results = []
        for function in (ours, torchs):
            leaves = [self.numbers(*shape).requires_grad_() for shape in shapes]
            output = function(*leaves)
            grad = torch.linspace(1, -1, output.numel(), device=self.device).view(output.shape).to(output.dtype)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
        for a, b in zip(*results, strict=True):
            self.close(a, b)


def _layer_norm(at: Where) -> None:
    from nnfast.nn import functional as F

    torchs = torch.nn.functional.layer_norm
    rows = 7
    # Persistent kernels hold up to 8192 elements on a multiprocessor: with these rows they go three rounds.
    rows += 2 * at.processors * 8192 // max(at.size, 64)

    def cast(f: Callable) -> Callable:
        """From 16 bits to float32, which autocast wants on a GPU."""

        def call(*args):
            with torch.autocast(at.device.partition(":")[0], dtype=at.dtype):
                return f(*args)

        return call

    # By vectors and by elements.
    for n in {at.size, max(1, at.size - 3)}:
        ours, its = lambda x, w, b, n=n: F.layer_norm(x, (n,), w, b), lambda x, w, b, n=n: torchs(x, (n,), w, b)
        at.same(ours, its, (rows, n), (n,), (n,))
        if at.dtype != torch.float32:
            at.same(cast(ours), cast(its), (rows, n), (n,), (n,))


def _gelu(at: Where) -> None:
    from nnfast.nn import functional as F

    for approximate in ("none", "tanh"):
        at.same(lambda x, a=approximate: F.gelu(x, approximate=a),
                lambda x, a=approximate: torch.nn.functional.gelu(x, approximate=a), (7, 33))  # fmt: skip


def _linear_gelu(at: Where) -> None:
    from nnfast.nn import functional as F

    torchs = torch.nn.functional
    # Sizes that a product on a GPU's tensor cores takes, and sizes that it does not.
    cases = [(7, 33, 17, "none"), (70, 64, 136, "tanh")]
    if at.processors:  # and for each kernel of csrc/cuda/linear_gelu_sm90a.cu
        for approximate in ("none", "tanh"):
            cases += [(70, 64, 136, approximate), (128 * (at.processors // 8 + 1), 64, 1024, approximate)]
            cases += [(128 * (at.processors // 4 + 1), n, 2048, approximate) for n in (64, 16384)]
    for rows, n, out, approximate in cases:
        ours = lambda x, w, b, a=approximate: F.linear_gelu(x, w, b, a)  # noqa: E731
        its = lambda x, w, b, a=approximate: torchs.gelu(torchs.linear(x, w, b), approximate=a)  # noqa: E731
        at.same(ours, its, (rows, n), (out, n), (out,))
        with torch.no_grad():  # which keeps nothing for a backward
            given = [at.numbers(*shape) for shape in ((rows, n), (out, n), (out,))]
            at.close(ours(*given), its(*given))


def _cross_entropy(at: Where) -> None:
    from nnfast.nn import functional as F

    target, torchs = torch.arange(7, device=at.device) * 4, torch.nn.functional.cross_entropy
    at.same(lambda x: F.cross_entropy(x, target), lambda x: torchs(x, target), (7, 33))


def _linear(at: Where) -> None:
    from nnfast.nn import functional as F

    torchs = torch.nn.functional
    at.same(F.linear, torchs.linear, (7, 33), (17, 33), (17,))

    def mlp(linear: Callable, gelu: Callable, approximate: str) -> Callable:
        return lambda x, w, b, v: linear(gelu(linear(x, w, b), approximate=approximate), v)

    def by_columns(linear: Callable) -> Callable:
        return lambda x, w, *b: linear(x, w.t().contiguous().t() if w.size(0) == 64 else w, *b)

    # One that reads a GELU, whose gradient it works out on a GPU; sizes as for linear_gelu.
    for rows, n, out, approximate in [(7, 33, 17, "none"), (200, 64, 136, "tanh"), (200, 64, 136, "none")]:
        for lies in (lambda linear: linear, by_columns):
            at.same(mlp(lies(F.linear), F.gelu, approximate), mlp(lies(torchs.linear), torchs.gelu, approximate),
                    (rows, n), (out, n), (out,), (n, out))  # fmt: skip


def _linear_cross_entropy(at: Where) -> None:
    from nnfast.nn import functional as F

    target = torch.arange(7, device=at.device) * 2

    def torchs(x, w):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target)

    at.same(lambda x, w: F.linear_cross_entropy(x, w, target), torchs, (7, 33), (17, 33))


def _embedding(at: Where) -> None:
    from nnfast.nn import functional as F

    indices, torchs = torch.arange(7, device=at.device) * 4, torch.nn.functional.embedding
    at.same(lambda w: F.embedding(indices, w), lambda w: torchs(indices, w), (1 << 15, 64))  # no smaller table is ours


def _attention(at: Where) -> None:
    from nnfast.nn import functional as F

    torchs = torch.nn.functional.scaled_dot_product_attention
    at.same(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
            lambda *qkv: torchs(*qkv, is_causal=True), *[(1, 2, 7, 16)] * 3)  # fmt: skip


def _step(name: str, **options) -> Callable[[Where], None]:
    """Three steps, with an eps and squares of gradients that torch's arithmetic in 16 bits can tell from 0."""

    def answer(at: Where) -> None:
        from nnfast import optim

        results, shapes = [], ((7, 33), (9000,), ())
        for library in (optim, torch.optim):
            parameters = [torch.nn.Parameter(at.numbers(*shape)) for shape in shapes]
            optimizer = getattr(library, name)(parameters, lr=0.1, **options)
            for step in range(3):
                for p, shape in zip(parameters, shapes, strict=True):
                    g = at.numbers(*shape)
                    p.grad = (g + 2 * g.sign()) * (step - 1.5)
                optimizer.step()
            results.append([p.detach() for p in parameters])
        for a, b in zip(*results, strict=True):
            at.close(a, b)

    return answer


def _clip(at: Where) -> None:
    from nnfast.nn import utils

    results = []
    for clip in (utils.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        parameter = torch.nn.Parameter(at.numbers(7, 33))
        parameter.grad = at.numbers(7, 33)
        results.append((clip([parameter], 1.0), parameter.grad))
    for a, b in zip(*results, strict=True):
        at.close(a, b)


#: What tries each op of the doctor's list; it raises where ours is wrong.
ANSWERS: dict[str, Callable[[Where], None]] = {
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "linear": _linear,
    "linear_gelu": _linear_gelu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "adamw_": _step("AdamW", eps=1e-3),
    "sgd_": _step("SGD", momentum=0.9),
    "rmsprop_": _step("RMSprop", eps=1e-3),
    "total_norm": _clip,
}


def main() -> None:
    """Of the child process: raises where an op gives a wrong answer or ours did not serve it."""
    from nnfast import backend

    assert backend.native is not None, backend.why_not
    if backend.native.cpu_kernels() is None:
        return
    with backend.use_backend("cpu"):  # an error where a call is handed to torch
        for answer in ANSWERS.values():
            for dtype in (torch.float32, torch.bfloat16):
                answer(Where("cpu", dtype))


# ---- of a GPU's kernels, before their first call ----

_lock = threading.Lock()
_known: dict[tuple, bool] = {}


def _capturing(device: int) -> bool:
    return device >= 0 and torch.cuda.is_current_stream_capturing()


def _gpu(device: int) -> list[str]:
    if device < 0:
        return ["cpu"]
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        driver = str(torch.version.hip)
    return [torch.cuda.get_device_name(device), driver]


def right(op: str, backend: str, device: int, dtype: str, size: int) -> bool | None:
    """Whether the kernels of ``backend`` for ``op`` are right on a GPU, in a dtype and for rows of ``size`` (a power
    of two, by which a kernel is launched); None while a graph is captured, which must not record the test. Where there
    is no memory for it, torch serves for the rest of the process, without a word, and the next process asks again."""
    asked = op, backend, device, dtype, size
    if asked in _known:
        return _known[asked]
    if _capturing(device):
        return None
    with _lock:  # another thread that asks waits: a forward and its recomputation must decide alike
        if asked not in _known:
            from nnfast import kernels

            native, triton = Path(__file__).parent.glob("lib/*.so"), Path(kernels.__file__).parent.glob("*.py")
            key, kept = _key(*native, *triton), _folder() / "gpu.json"
            said = _read(kept)
            passed = said.get("passed", []) if said.get("key") == key else []
            entry = [*_gpu(device), op, backend, dtype, size]
            why = "" if entry in passed else _fails(op, device, dtype, size)
            _known[asked] = why == ""
            if why:
                warnings.warn_explicit(
                    f"{backend}'s kernel of {op} in {dtype} fails its known-answer test on {entry[0]} ({why}), so "
                    "torch serves it there",
                    UserWarning, "nnfast", 1,
                )  # fmt: skip
            elif why is not None and entry not in passed:
                _write(kept, {"key": key, "passed": [*passed, entry]})
    return _known[asked]


def _fails(op: str, device: int, dtype: str, size: int) -> str | None:
    """Why they are wrong; or "", or None where memory ran out. They run in a thread of its own, without the caller's
    modes, hooks, autocast and streams, so what they save for a backward is not counted with what the caller saves."""
    from nnfast import backend

    said = []

    def ask() -> None:
        backend.native.asking(True)
        try:
            where = Where("cpu" if device < 0 else f"cuda:{device}", getattr(torch, dtype), size)
            ANSWERS[op](where)
            if device >= 0:
                torch.cuda.synchronize(device)
            said.append("")
        except torch.OutOfMemoryError:
            said.append(None)
        except Exception as e:
            said.append(f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:200])

    thread = threading.Thread(target=ask)
    debug = torch.cuda.get_sync_debug_mode() if device >= 0 else 0
    try:
        if debug:  # comparing waits for the GPU, which is no fault of the user's step
            torch.cuda.set_sync_debug_mode(0)
        thread.start()
        thread.join()
    finally:
        if debug:
            torch.cuda.set_sync_debug_mode(debug)
    return said[0] if said else "no answer"
