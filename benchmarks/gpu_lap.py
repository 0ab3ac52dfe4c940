"""Builds, tests and benchmarks everything in one go, on a machine with a GPU and without a network.

    python benchmarks/gpu_lap.py                        every step, into benchmarks/results/<device>/
    python benchmarks/gpu_lap.py --steps build test     some of them

Beforehand, on a machine with a network: ``make compile-gpu``, which leaves CUTLASS's headers in ``build/cutlass``. They
go along, with the checkout. The GPU machine needs PyTorch for CUDA, its CUDA toolkit, a C++ compiler and the packages
pytest, pytest-benchmark, hypothesis, ninja, rich and matplotlib.

A stop loses nothing: a step's words go to ``lap.log`` as they come, its outcome to ``lap.csv`` when it ends, and each
cell of the benchmarks to its op's CSV file as soon as it is measured. What has failed does not keep the next step from
running, except the build.
"""

import argparse
import csv
import datetime
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("pytest", "pytest_benchmark", "hypothesis", "ninja", "matplotlib")
# Seconds after which a command is stopped: a lap ends though one thing hangs.
LIMITS = {"build": 600, "doctor": 60, "test": 900, "bench": 900, "train": 600, "report": 60}


def commands(out: Path) -> dict[str, list[list[str]]]:
    """What each step runs, in the order of a lap."""
    python = [sys.executable, "-u"]
    bench = [
        [*python, "-m", "pytest", str(path), "--benchmark-only", "-q", "--device", "cuda", *options]
        for options in (["--compile"], ["--compile", "--graph"], ["--backend", "triton"])
        for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))
    ]
    # Editable: nnfast.kernels lies in a folder of its own, which only an installation finds.
    build = [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    train = [*python, "benchmarks/train_gpt.py", "--device", "cuda", "--dtype", "bfloat16", "--steps", "200"]
    train += ["--layers", "12", "--width", "768", "--batch", "32", "--out", str(out / "step.png")]
    train += ["--compile", "--record"]
    return {
        "build": [build],
        "doctor": [[*python, "-m", "nnfast"]],
        "test": [[*python, "-m", "pytest", "-m", "gpu", "-q", "--durations=10"]],
        "bench": bench,
        "train": [train],
        "report": [[*python, "benchmarks/report.py"]],
    }


def describe() -> dict[str, str]:
    """What a result depends on, for every line of ``lap.csv``."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
    }


def run(command: list[str], limit: float, env: dict[str, str], log: Path, console: Console) -> tuple[str, float]:
    """Runs one command into the log; what became of it, and how many seconds it took."""
    start = time.perf_counter()
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        begin = file.tell()
        try:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file, timeout=limit).returncode
            outcome = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
    seconds = time.perf_counter() - start
    said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    console.print(f"{' '.join(command[1:4])}: {outcome}, {seconds:.0f} s", markup=False)
    for line in said[-15:] if outcome != "ok" else said[-1:]:
        console.print(f"    {line}", markup=False, highlight=False)
    return outcome, seconds


def main() -> int:
    device = describe()["device"]
    default = ROOT / "benchmarks/results" / re.sub(r"\W+", "-", device.lower())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default, help="where results go (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS), help="which steps to run")
    args = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        console.print("There is no GPU that this torch can use; without one: make compile-gpu, make test")
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        console.print(f"Missing here: {', '.join(missing)}")
        return 2

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    env = {**os.environ, "NNFAST_CUDA_ARCH": os.environ.get("NNFAST_CUDA_ARCH", arch)}
    todo = [(step, command) for step, each in commands(out).items() if step in args.steps for command in each]
    failed = 0
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress, (out / "lap.csv").open("a", newline="") as file:
        table = csv.DictWriter(file, [*describe(), "step", "command", "outcome", "seconds"])
        if file.tell() == 0:
            table.writeheader()
        bar = progress.add_task("lap", total=len(todo))
        for step, command in todo:
            progress.update(bar, description=step)
            outcome, seconds = run(command, LIMITS[step], env, out / "lap.log", progress.console)
            row = {"step": step, "command": " ".join(command[1:]), "outcome": outcome, "seconds": f"{seconds:.1f}"}
            table.writerow({**describe(), **row})
            file.flush()
            progress.advance(bar)
            failed += outcome != "ok"
            if step == "build" and outcome != "ok":
                break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
