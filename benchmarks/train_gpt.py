"""The main job: a small GPT learns real text with torch and with nnfast, and the two are laid side by side.

    python benchmarks/train_gpt.py --steps 40 --layers 4 --width 256 --batch 8

Both train from the same seed on the same batches, in turn, step by step, so that whatever else the machine does
falls on both. The losses must agree; then the table and the picture say what was gained. With ``--compile`` both run
compiled as well, beside the eager two. The text is Python's own standard library, which every machine has, or
``--data FILE``, byte by byte.
"""

import argparse
import contextlib
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import nnfast
import nnfast.nn
import nnfast.optim
from nnfast.benchmarks import harness, models

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LIBRARIES = {"torch": (torch.nn, torch.optim), "nnfast": (nnfast.nn, nnfast.optim)}
COMPILED = " + torch.compile"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT, VOCABULARY = 128, 256
WARMUP = 3  # steps that are trained and not timed

# How far the losses may lie apart: rounding to 16 bits makes a step's gradient differ by a part in some hundreds,
# whoever sums it.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}


def read_text(path: str | None) -> torch.Tensor:
    """The bytes of ``path``, or of the standard library's modules, as token numbers."""
    files = [Path(path)] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(f.read_bytes() for f in files)
    if len(text) <= CONTEXT + 1:
        raise SystemExit(f"train_gpt: {path} has {len(text)} bytes; at least {CONTEXT + 2} are needed")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Run:
    """One library's model and optimizer, its losses and its step times in seconds."""

    def __init__(self, name: str, options: argparse.Namespace):
        nn, optim = LIBRARIES[name.removesuffix(COMPILED)]
        torch.manual_seed(0)
        self.name, self.options = name, options
        self.model = models.gpt(nn, options.layers, options.width, VOCABULARY, CONTEXT).to(options.device)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-3)
        self.forward = torch.compile(self.model) if name.endswith(COMPILED) else self.model
        self.losses, self.seconds = [], []

    def step(self, tokens, targets) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        dtype = DTYPES[self.options.dtype]
        half = torch.autocast(self.options.device, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with half:
            loss = self.forward(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds[WARMUP:])

    def beside(self) -> None:
        """Forget the last step's loss and time, for it ran under a profiler."""
        self.losses.pop(), self.seconds.pop()

    def peak_bytes(self, batch) -> int:
        """What a step allocates at its highest point, beside parameters and optimizer state."""
        peak = harness.peak_memory(lambda: self.step(*batch), self.options.device)
        self.beside()
        return peak

    def profile(self, batches) -> dict[str, float]:
        """Milliseconds a step in each kind of work, by the profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = self.options.device != "cpu"
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with harness.silent(), torch.profiler.profile(activities=activities) as profile:
            for batch in batches:
                self.step(*batch)
                self.beside()
        shares = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in profile.key_averages():
            kind = next((k for k, words in KINDS.items() if any(w in event.key.lower() for w in words)), "other")
            shares[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / len(batches)
        return shares


# What an operator's name says about the work it does; the first that fits.
KINDS = {
    "attention": ("attention",),
    "matrix products": ("addmm", "::mm", "bmm", "linear_pointwise", "aten::linear", "gemm", "cutlass"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm", "layernorm"),
    "AdamW": ("adam", "foreach", "optimizer", "lerp", "addcmul", "addcdiv", "sqrt"),
    "loss": ("nll_loss", "log_softmax", "cross_entropy"),
}


def picture(runs: list[Run], shares: list[dict[str, float]], path: Path) -> None:
    """Both loss curves over each other, and where the step's time goes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for run, style in zip(runs, ("-", "--", "-.", ":"), strict=False):
        left.plot(run.losses, style, label=run.name, linewidth=2)
    left.set(xlabel="step", ylabel="loss", title="the same loss")
    left.legend()
    below = [0.0] * len(runs)
    for kind in shares[0]:
        heights = [s[kind] for s in shares]
        right.bar([r.name.replace(COMPILED, "\ncompiled") for r in runs], heights, bottom=below, label=kind)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    right.set(ylabel="ms a step, as profiled", title="where a step's time goes")
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def row(run: Run, base: Run, options: argparse.Namespace, peak_bytes: int) -> dict:
    """What is recorded of a run; the speedup is over ``base``, the median of the ratios step by step."""
    ratios = [a / b for a, b in zip(base.seconds[WARMUP:], run.seconds[WARMUP:], strict=True)]
    return {
        "model": f"{options.layers} layers of {options.width}, batch {options.batch}, {options.dtype}",
        "library": run.name,
        "steps": options.steps,
        "ms": run.step_seconds * 1e3,
        "speedup": statistics.median(ratios),
        "loss": run.losses[-1],
        "peak_bytes": peak_bytes,
        **harness.provenance(options.device),
    }


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="timed and untimed steps")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help=f"a multiple of {models.HEAD}")
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {CONTEXT} bytes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="16 bits: under autocast")
    parser.add_argument("--compile", action="store_true", help="run both compiled as well")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/results/<device>/")
    parser.add_argument("--results", type=Path, help="where to append it, otherwise")
    parser.add_argument("--data", help="a file to read in place of the standard library")
    parser.add_argument("--out", default="benchmarks/out/train_gpt.png", type=Path, help="the picture")
    options = parser.parse_args(argv)
    if options.width % models.HEAD or options.width <= 0:
        parser.error(f"--width must be a multiple of {models.HEAD}")
    if options.steps <= WARMUP:
        parser.error(f"--steps must be over {WARMUP}: the first {WARMUP} are not timed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def main(argv=None) -> int:
    options = parse(argv)
    console = Console()
    text = read_text(options.data)
    draw = torch.Generator().manual_seed(0)

    def batch():
        starts = torch.randint(len(text) - CONTEXT - 1, (options.batch,), generator=draw)
        window = text[starts[:, None] + torch.arange(CONTEXT + 1)].long().to(options.device)
        return window[:, :-1], window[:, 1:]

    names = [*LIBRARIES, *(name + COMPILED for name in LIBRARIES if options.compile)]
    runs = [Run(name, options) for name in names]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    console.print(
        f"A GPT of {parameters / 1e6:.1f}M parameters on {len(text) / 1e6:.1f} MB of text; torch {torch.__version__}, "
        f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads"
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.steps, loss="")
        for _ in range(options.steps):
            tokens = batch()
            for run in runs:
                run.step(*tokens)
            progress.update(task, advance=1, loss="  ".join(f"{r.name} {r.losses[-1]:.4f}" for r in runs))

    found = [row(run, runs[0], options, run.peak_bytes(batch())) for run in runs]
    table = Table("", "last loss", "tokens/s", "ms a step", "speedup", "peak memory")
    for r in found:
        tokens = f"{options.batch * CONTEXT / r['ms'] * 1e3:.0f}"
        memory = f"{r['peak_bytes'] / 1e6:.0f} MB"
        table.add_row(r["library"], f"{r['loss']:.4f}", tokens, f"{r['ms']:.1f}", f"{r['speedup']:.2f}x", memory)
    console.print(table)
    if options.record:
        path = (options.results or harness.folder(options.device)) / "train_gpt.csv"
        harness.append(found, path)
        console.print(f"Appended to {path}")
    picture(runs, [run.profile([batch() for _ in range(3)]) for run in runs], options.out)
    console.print(f"The loss curves, and where a step's time goes: {options.out}")

    # On a GPU each compiler and library sums in an order of its own, and what that makes of a step grows from then on.
    steps = options.steps if options.device == "cpu" else min(options.steps, 20)
    apart = max(max(step) - min(step) for step in list(zip(*(r.losses for r in runs), strict=True))[:steps])
    tolerance = TOLERANCE[options.dtype]
    equal = apart <= tolerance
    agree = "agree" if equal else "DIFFER"
    console.print(f"The losses {agree}: at most {apart:.1e} apart in {steps} steps, {tolerance:g} allowed")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
