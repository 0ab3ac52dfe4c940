"""Whole training steps, each library in a process of its own, the processes in turn.

    python benchmarks/steps.py                         every model, in float32 and under bfloat16 autocast
    python benchmarks/steps.py --models gpt2-1x512 --dtypes float32 --rounds 3 --record

Two models in one process are not alike: whichever comes second runs up to a quarter slower, torch beside torch. So a
round starts a process for each library, one after another, and a speedup is the median over the rounds of the ratio
within a round. A step is zero_grad, forward, backward, clipping and the optimizer, as a training script has them;
torch's optimizer is its own ``fused=True``. The floor is what the step's matrix products alone would take at the
speed of the best large product here, which no step can beat.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

import nnfast
import nnfast.nn
import nnfast.optim
from nnfast.benchmarks import harness, models

WARMUP = 3  # steps that are trained and not timed
LONGEST = 60.0  # seconds that a process trains; where a step takes about as long, one is timed after one that is not
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Model:
    """``build(nn)`` gives the model, whose forward is the loss of a batch that ``draw()`` gives."""

    build: Callable
    draw: Callable
    accelerated: bool = False  # whether nnfast comes to it by accelerate, and not by the import
    steps: int = 6


def _images(batch: int):
    return lambda: (torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)))


def _texts(batch: int, length: int):
    return lambda: (torch.randint(30522, (batch, length)), torch.randint(2, (batch,)))


def _gpt2(batch: int, length: int, fused_loss: bool = False) -> Model:
    def build(nn):
        return models.gpt(nn, 12, 768, 50257, 1024, fused_loss)

    return Model(build, models.tokens(50257, batch, length))


MODELS = {
    "gpt2-1x512": _gpt2(1, 512),
    "gpt2-4x256": _gpt2(4, 256),
    "gpt2-4x256-fused-loss": _gpt2(4, 256, fused_loss=True),
    "bert-8x128": Model(lambda nn: models.bert_base(), _texts(8, 128), accelerated=True),
    "vit-8": Model(lambda nn: models.vit_base(), _images(8), accelerated=True),
    "gpt-demo": Model(lambda nn: models.gpt(nn, 4, 256, 256, 128), models.tokens(256, 16, 128), steps=30),
}
LIBRARIES = ("torch", "torch compiled", "nnfast", "nnfast compiled")


# ---- one library's process ----


def child(name: str, dtype: str, library: str) -> dict:
    """Train ``WARMUP`` and the model's number of steps. Milliseconds of a step, the losses, the peak of memory."""
    model = MODELS[name]
    ours = library.startswith("nnfast")
    nn, optim = (nnfast.nn, nnfast.optim) if ours else (torch.nn, torch.optim)
    torch.manual_seed(0)
    module = model.build(torch.nn if model.accelerated else nn)
    if ours and model.accelerated:
        nnfast.accelerate(module)
    optimizer = optim.AdamW(module.parameters(), lr=1e-4, **({} if ours else {"fused": True}))
    forward = torch.compile(module) if library.endswith("compiled") else module
    half = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    seconds, losses = [], []

    def step(batch) -> None:
        optimizer.zero_grad()
        with half:
            loss = forward(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    for _ in range(WARMUP + model.steps):
        batch = model.draw()
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 1 and sum(seconds) > LONGEST:
            break
    timed = seconds[min(WARMUP, len(seconds) - 1) :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"ms": 1e3 * statistics.median(timed), "losses": losses, "peak_bytes": peak}


def products(name: str, dtype: str) -> float:
    """Milliseconds that a step's products take at the speed of the best large product here."""
    from torch.utils.flop_counter import FlopCounterMode

    model = MODELS[name]
    module = model.build(torch.nn)
    with FlopCounterMode(display=False) as counter:
        module(*model.draw()).backward()
    size, kind = 2048, getattr(torch, dtype)
    a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    best = float("inf")
    for call in harness.bare_products(a, b).values():
        for _ in range(5):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return 1e3 * best * counter.get_total_flops() / (2 * size**3)


# ---- all of them, in turn ----


def run_child(*arguments: str) -> dict:
    command = [sys.executable, "-m", "nnfast.benchmarks.steps", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def rows(name: str, dtype: str, rounds: dict[str, list[dict]], floor_ms: float) -> list[dict]:
    """What is recorded: a row a library, its speedups over torch eager and over torch compiled."""
    found = []
    for library, runs in rounds.items():
        good = [r for r in runs if "error" not in r]
        row = {"model": name, "dtype": dtype, "library": library, "rounds": len(good), "floor_ms": floor_ms}
        row["ms"] = statistics.median(r["ms"] for r in good) if good else ""
        row["peak_bytes"] = max((r["peak_bytes"] for r in good), default="")
        row["loss"] = good[-1]["losses"][-1] if good else ""
        for base in ("torch", "torch compiled"):
            pairs = zip(rounds.get(base, []), runs, strict=False)
            ratios = [a["ms"] / b["ms"] for a, b in pairs if "error" not in a and "error" not in b]
            word = "speedup" if base == "torch" else "over_compiled"
            row[word], row[f"{word}_low"], row[f"{word}_high"] = (
                (statistics.median(ratios), min(ratios), max(ratios)) if ratios else ("", "", "")
            )
        row["note"] = next((r["error"] for r in runs if "error" in r), "")
        found.append(row | harness.provenance("cpu"))
    return found


def table(found: list[dict]) -> Table:
    shown = Table(
        *("model", "dtype", "library", "ms a step", "over torch", "over compiled", "of the floor", "peak", "")
    )
    for row in found:
        if not row["ms"]:
            shown.add_row(row["model"], row["dtype"], row["library"], "", "", "", "", "", row["note"])
            continue
        ratios = [
            f"{row[w]:.2f}x ({row[f'{w}_low']:.2f}-{row[f'{w}_high']:.2f})" if row[w] else ""
            for w in ("speedup", "over_compiled")
        ]
        floor, memory = f"{row['floor_ms'] / row['ms']:.0%}", f"{row['peak_bytes'] / 1e6:.0f} MB"
        shown.add_row(row["model"], row["dtype"], row["library"], f"{row['ms']:.1f}", *ratios, floor, memory, "")
    return shown


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/results/<device>/")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "DTYPE", "LIBRARY"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        name, dtype, library = options.child
        result = {"floor_ms": products(name, dtype)} if library == "products" else child(name, dtype, library)
        print(json.dumps(result))
        return 0
    console, found = Console(), []
    cells = list(itertools.product(options.models, options.dtypes))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("", total=len(cells) * (options.rounds * len(options.libraries) + 1))
        for name, dtype in cells:
            progress.update(task, description=f"{name} {dtype}")
            floor_ms = run_child(name, dtype, "products").get("floor_ms", float("nan"))
            progress.advance(task)
            rounds: dict[str, list[dict]] = {library: [] for library in options.libraries}
            for _ in range(options.rounds):
                for library in options.libraries:
                    rounds[library].append(run_child(name, dtype, library))
                    progress.advance(task)
            new = rows(name, dtype, rounds, floor_ms)
            found += new
            if options.record:
                harness.append(new, harness.folder("cpu") / "steps.csv")
    console.print(table(found))
    return 0 if all(row["ms"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
