"""How everything here is measured: in turn, checked against float64 first, beside the machine's own ceiling.

A *case* is one cell of a table (op, shape, dtype, direction). Its *providers* do the same work: torch in its ways,
the peers that can be imported, nnfast. One *lap* times every provider once, so that whatever else the machine does
falls on all of them, and a speedup is the median over the laps of the ratio within a lap.
"""

import contextlib
import csv
import dataclasses
import datetime
import functools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import nnfast
from nnfast._torch import one_dnn_has
from nnfast.backend import forced

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward", "both")
OURS = "nnfast"

CALL_SECONDS = 50e-6  # shorter calls are repeated within a lap until they take this long together
CASE_SECONDS = 0.5  # how long the laps of a case may take ...
LAPS = (7, 200)  # ... and how few and how many there may be
LONGEST = (
    30.0  # seconds for the laps of a case where a peer takes seconds a call: then there are fewer, and one at least
)
#: Elements of the largest tensor of a case: in float64 it takes 8 GB, and a check holds about ten like it.
MOST_ELEMENTS = 1 << 30


def bare_products(input: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """``input @ weight.T`` by each library that has it here: the fastest bounds what is made of such products."""
    x, w = input.detach(), weight.detach()
    linear = torch.nn.functional.linear
    found: dict[str, Callable[[], object]] = {"product": lambda: linear(x, w)}
    if x.device.type == "cpu":
        found["our product"] = lambda: nnfast.nn.functional.linear(x, w)
        if torch.backends.mkldnn.is_available() and (x.dtype is torch.float32 or one_dnn_has(x.dtype)):
            found["oneDNN's product"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell. ``model`` says where such a shape is met; ``variant`` is the op's option (GELU's ``approximate``);
    ``graph``: on a GPU, what is timed is the replay of a CUDA graph."""

    op: str
    model: str
    shape: tuple[int, ...]
    dtype: str = "fp32"
    direction: str = "both"
    variant: str = ""
    device: str = "cpu"
    graph: bool = False

    @property
    def backend(self) -> str:
        """As it stands in the results: what nnfast is held to, if anything, and graph."""
        return " ".join(filter(None, (forced(), "graph" if self.graph else None)))

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its rows from those of another cell in a CSV file."""
        return "x".join(map(str, self.shape)), self.model, self.dtype, self.direction, self.variant, self.backend

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self):
        words = (self.op, "x".join(map(str, self.shape)), self.model, self.variant, self.dtype, self.direction)
        return " ".join(filter(None, words))


@dataclasses.dataclass
class Task:
    """A case made ready.

    Attributes:
        providers: name to a call that does the whole work once and returns the tensors to be checked.
        exact: the same tensors in float64.
        nbytes: bytes that must be read and written, each once. flops: operations of the matrix products.
        ceiling: bare copies or bare products, the best of which, times ``ceiling_scale``, bounds the case.
        names: what the tensors are, where their errors are worth a table; there may be several of the last.
    """

    providers: dict[str, Callable[[], Iterable[torch.Tensor]]]
    exact: list[torch.Tensor]
    nbytes: int
    flops: int
    ceiling: dict[str, Callable[[], object]]
    ceiling_scale: float
    names: tuple[str, ...] = ()


def function_task(
    case: Case, functions: dict, reference: Callable, tensors, grad, named=("input", "weight", "bias"), **bounds
) -> Task:
    """The task of a differentiable function of ``tensors``; its forward is that of training, recorded for backward."""

    def call(function, inputs, grad):
        if case.direction == "forward":
            return lambda: [function(*inputs).detach()]
        if case.direction == "both":

            def both():
                output = function(*inputs)
                return [output.detach(), *torch.autograd.grad(output, inputs, grad)]

            return both
        output = function(*inputs)
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    exact = call(reference, [t.detach().double().requires_grad_() for t in tensors], grad.double())()
    names = ("output", *(f"{name}'s gradient" for name in named)) if case.direction == "both" else ()
    return Task({name: call(f, tensors, grad) for name, f in functions.items()}, list(exact), names=names, **bounds)


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile's version, one graph for all shapes where compiling each would take longer than all the rest."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=device == "cpu" or None)


# ---- right or wrong ----


def errors(got: Iterable[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """The largest distance from the exact result, per tensor, as a part of the largest value in it."""
    distance = [
        ((g.double() - e).abs().max() / e.abs().max().clamp_min(1e-300)).item() if e.numel() else 0.0
        for g, e in zip(got, exact, strict=True)
    ]
    return [float("inf") if d != d else d for d in distance]


def wrong(case: Case, task: Task) -> dict[str, str]:
    """Provider -> why its result does not count; those whose result counts are left out.

    A result may be four times as far from float64 as plain torch's own, or four roundings of the dtype.
    """
    eps = torch.finfo(case.torch_dtype).eps
    allowed = [4 * max(e, eps) for e in errors(task.providers["torch"](), task.exact)]
    found = {}
    for name, call in task.providers.items():
        try:
            off = [(e, a) for e, a in zip(errors(call(), task.exact), allowed, strict=True) if e > a]
        except Exception as e:  # a peer that cannot do this shape, whatever it raises
            found[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:120]
        else:
            if off:
                found[name] = f"wrong: {off[0][0]:.1e} from float64, {off[0][1]:.1e} allowed"
    return found


# ---- time and memory ----


class CpuClock:
    """Seconds of wall time a call."""

    def __init__(self, calls: dict[str, Callable]):
        self.calls = {name: (call, self._repeats(call)) for name, call in calls.items()}

    def _repeats(self, call) -> int:
        call()
        return max(1, int(CALL_SECONDS / max(min(self._time(call, 1) for _ in range(2)), 1e-9)))

    def _time(self, call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def lap(self) -> dict[str, float]:
        return {name: self._time(call, repeats) for name, (call, repeats) in self.calls.items()}


#: A rehearsal without a GPU puts a stand-in here.
cuda = torch.cuda


class CudaClock(CpuClock):
    """Seconds on the device by events, with the L2 cache emptied before each call."""

    def __init__(self, calls: dict[str, Callable], device: str = "cuda"):
        self._flush = torch.empty(256 << 20 if device == "cuda" else 1 << 10, dtype=torch.int8, device=device)
        super().__init__(calls)

    def _repeats(self, call) -> int:
        call()
        return 1

    def _time(self, call, repeats: int) -> float:
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@contextlib.contextmanager
def capturable(case: Case):
    """Where a case's graph is captured, from the making of its task on: a stream beside the default one. A backward
    runs on the stream of its forward, so that, too, is recorded there."""
    if not case.graph:
        yield
        return
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        yield
    cuda.current_stream().wait_stream(stream)


def captured(call: Callable) -> Callable:
    """The replay of a CUDA graph of the call, which leaves the cost of the eager call on the host out."""
    for _ in range(3):
        call()
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=cuda.current_stream()):
        call()
    return graph.replay


def clock(case: Case, calls: dict[str, Callable]) -> CpuClock:
    return CudaClock(calls, case.device) if case.device == "cuda" or cuda is not torch.cuda else CpuClock(calls)


def laps_for(lap_seconds: float) -> int:
    fewest = max(1, min(LAPS[0], int(LONGEST / lap_seconds)))
    return max(fewest, min(LAPS[1], int(CASE_SECONDS / lap_seconds)))


@contextlib.contextmanager
def silent():
    """Nothing on stderr, from C++ either: torch's profiler says there that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(call: Callable, device: str) -> int:
    """Bytes allocated at the highest point of a call, beyond those that were there before it."""
    if device == "cuda" or cuda is not torch.cuda:
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        call()
        cuda.synchronize()
        return cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent(), torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# ---- what was found ----


@dataclasses.dataclass
class Row:
    """One provider in one case, as it stands in the results."""

    run: str
    device: str
    versions: str
    commit: str
    op: str
    model: str
    shape: str
    dtype: str
    direction: str
    variant: str
    nbytes: int
    flops: int
    provider: str
    backend: str  # the one that nnfast was held to, if any; and graph: replayed from a CUDA graph
    ms: float | None = None  # the median of the laps; None where the result does not count
    spread: float | None = None  # half the distance of the quartiles, as a part of the median
    of_ceiling: float | None = None  # the bare copy's or product's time over this one's
    speedup: float | None = None  # ours: over the best peer; a peer: over ours. The median of the ratios within a lap
    speedup_low: float | None = None  # the quartiles of those ratios
    speedup_high: float | None = None
    peak_bytes: int | None = None
    note: str = ""


@dataclasses.dataclass
class ErrorRow:
    """How far one provider is from float64 in one tensor of a case."""

    run: str
    device: str
    versions: str
    commit: str
    op: str
    model: str
    shape: str
    dtype: str
    variant: str
    provider: str
    tensor: str
    largest: float  # the largest value of the exact tensor
    error: float  # the largest distance from it


def error_rows(case: Case, task: Task) -> list[ErrorRow]:
    """Plain torch's and ours, a row a tensor; those of one name count as one."""
    same = {k: v for k, v in dataclasses.asdict(case).items() if k in ErrorRow.__annotations__}
    same |= provenance(case.device) | {"shape": "x".join(map(str, case.shape))}
    found = []
    for provider in ("torch", OURS) if task.names else ():
        worst: dict[str, tuple[float, float]] = {}
        for i, (got, exact) in enumerate(zip(task.providers[provider](), task.exact, strict=True)):
            name = task.names[min(i, len(task.names) - 1)]
            if exact.numel():
                pair = ((got.double() - exact).abs().max().item(), exact.abs().max().item())
                worst[name] = tuple(map(max, pair, worst.get(name, pair)))
        for name, (error, largest) in worst.items():
            found.append(ErrorRow(**same, provider=provider, tensor=name, largest=largest, error=error))
    return found


@functools.cache
def provenance(device: str) -> dict[str, str]:
    """Which run, machine, versions and commit a row comes from. NNFAST_COMMIT says it where there is no git."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("NNFAST_COMMIT", "unknown")
    versions = {"nnfast": nnfast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "run": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(device),
        "versions": " ".join(f"{k}-{v}" for k, v in versions.items()),
        "commit": commit,
    }


@functools.cache
def device_name(device: str) -> str:
    """What the machine calls itself; on a CPU with the instruction set that torch uses and the number of threads."""
    if device == "cuda" or cuda is not torch.cuda:
        return cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (m := re.search(r"model name\s*: (.+)", info.read_text())):
        name = m[1]
    return f"{name.strip()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def rows(case: Case, task: Task, laps: list[dict[str, float]], refused: dict[str, str]) -> list[Row]:
    """A row a provider from the laps' times."""
    median = {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}
    ceiling = min(median[name] for name in task.ceiling) * task.ceiling_scale
    peers = [name for name in task.providers if name in median and not name.startswith(OURS)]
    best = min(peers, key=median.get, default=None)
    same = dataclasses.asdict(case) | provenance(case.device)
    same |= {"shape": "x".join(map(str, case.shape)), "nbytes": task.nbytes, "flops": task.flops}
    same["backend"] = case.backend
    del same["graph"]
    found = []
    for name, call in task.providers.items():
        row = Row(**same, provider=name, note=refused.get(name, ""))
        found.append(row)
        if name not in median:
            continue
        low, row.ms, high = (1e3 * q for q in _quartiles([lap[name] for lap in laps]))
        row.spread = (high - low) / 2 / row.ms
        row.of_ceiling = ceiling / median[name]
        row.peak_bytes = peak_memory(call, case.device)
        other = best if name.startswith(OURS) else OURS
        if other in median:
            row.speedup_low, row.speedup, row.speedup_high = _quartiles([lap[other] / lap[name] for lap in laps])
            if other == best != "torch":
                row.note = f"best peer: {best}"
    return found


def run(case: Case, task: Task, repeat: Callable | None = None) -> list[Row]:
    """Check, time and describe every provider of a case.

    Args:
        repeat: ``repeat(lap, count)`` calls ``lap`` so many times; pytest-benchmark's, or a plain loop.
    """
    refused = wrong(case, task)
    timed = {name: call for name, call in task.providers.items() if name not in refused}
    if case.graph:
        for name, call in timed.copy().items():
            try:
                timed[name] = captured(call)
            except Exception as e:  # a peer that cannot be captured
                refused[name] = f"no graph: {type(e).__name__}: {e}".splitlines()[0][:120]
                del timed[name]
    timer = clock(case, timed | ({n: captured(c) for n, c in task.ceiling.items()} if case.graph else task.ceiling))
    start = time.perf_counter()
    timer.lap()
    count = laps_for(time.perf_counter() - start)
    laps: list[dict[str, float]] = []

    def lap():
        laps.append(timer.lap())

    if repeat:
        repeat(lap, count)
    else:
        for _ in range(count):
            lap()
    return rows(case, task, laps, refused)


def measured(path: Path) -> set[tuple[str, ...]]:
    """The keys of the cases whose rows a CSV file holds."""
    if not path.exists():
        return set()
    with path.open() as file:
        names = "shape", "model", "dtype", "direction", "variant", "backend"
        return {tuple(row[name] for name in names) for row in csv.DictReader(file)}


def folder(device: str) -> Path:
    """Where results of this machine are kept."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def append(found: list[dict], path: Path) -> None:
    """Add rows to a CSV file; what is there is never changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in found:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


# ---- what a reader sees ----

MEMORY_SHOWN = 64 << 10  # bytes; below, the statistics of a row decide the ratio
HEADINGS = ("shape", "model", "dtype", "direction", "torch ms", "ours ms", "speedup", "quartiles", "of ceiling")
HEADINGS += ("memory", "note")


def cells(found: list[Row]) -> list[tuple[str, ...]]:
    """The lines of a table for the rows of one case: one for each of our providers, losses marked."""
    torch_row = next(r for r in found if r.provider == "torch")
    lines = []
    for row in found:
        if not row.provider.startswith(OURS):
            continue
        shape = f"{row.shape} {row.variant}".strip()
        if row.ms is None:
            lines.append((shape, row.model, row.dtype, row.direction, "", "", "", "", "", "", row.note))
            continue
        verdict = "" if row.speedup is None or row.speedup >= 1 else "SLOWER" if row.speedup_high < 1 else "slower?"
        of_ceiling = f"{row.of_ceiling:.0%}" if row.of_ceiling else ""
        memory = f"{row.peak_bytes / torch_row.peak_bytes:.2f}x" if torch_row.peak_bytes > MEMORY_SHOWN else ""
        lines.append((
            shape, row.model, row.dtype, row.direction, f"{torch_row.ms:.4g}", f"{row.ms:.4g}",
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            "" if row.speedup is None else f"{row.speedup_low:.2f}-{row.speedup_high:.2f}", of_ceiling, memory,
            " ".join(filter(None, (verdict, row.provider.removeprefix(OURS).strip(), row.note))),
        ))  # fmt: skip
    return lines
