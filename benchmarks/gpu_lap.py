"""Builds, tests and benchmarks everything in one go, on a machine with a GPU and without git or a network.

    python benchmarks/gpu_lap.py --out results                      every step
    python benchmarks/gpu_lap.py --out results --steps build test   some of them
    python benchmarks/gpu_lap.py --out more --before results        what a lap before this one has not finished
    python benchmarks/gpu_lap.py --out build/lap --rehearse         all of it on a machine that has no GPU

Beforehand, on a machine with a network: ``make compile-gpu``, which leaves CUTLASS's headers in ``build/cutlass``. They
go along, with the checkout. Or, for the GPU machine's Python, torch and GPU, ``NNFAST_CUDA_ARCH=90a make wheel
PYTHONS=python3.12 TORCHES=2.11.0``, and ``dist`` goes along: nothing is then built there, where the slowest file takes
five minutes. The GPU machine needs PyTorch for CUDA, its CUDA toolkit, a C++ compiler and the packages setuptools,
pytest, pytest-benchmark, hypothesis, ninja, rich and matplotlib.

It ends within ``--seconds``, and a stop loses nothing: a step's words go to ``lap.log`` as they come, its outcome to
``lap.csv`` when it ends, and each cell of the benchmarks to its op's CSV file as soon as it is measured, the shapes
that a GPU is judged by first. What has failed does not keep the next step from running, except the build. Afterwards,
anywhere: ``benchmarks/report.py``, with the files in ``benchmarks/results/<device>/``.
"""

import argparse
import csv
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("setuptools", "pytest", "pytest_benchmark", "hypothesis", "ninja", "matplotlib")
# Seconds after which a command is stopped: a lap ends though one thing hangs.
LIMITS = {"build": 500, "doctor": 60, "test": 400, "goals": 500, "graphs": 500, "train": 300, "bench": 500}
# The benchmarks that a lap runs.
OPS = "layer_norm", "linear_gelu", "adamw", "optimizers"
OVER = 30  # seconds that a cell may take beyond the last start, and a stopped process to end
INSTALLED = "from nnfast import backend, kernels; assert backend.available({!r}) == '', backend.available({!r})"


def commands(out: Path, rehearse: bool) -> dict[str, list[list[str]]]:
    """What each step runs, in the order of a lap."""
    python = [sys.executable, "-u"]
    device, other = ("rehearsal", "cpu") if rehearse else ("cuda", "triton")
    modes = ["--compile"], ["--compile", "--graph"], ["--backend", other]

    def bench(*options: str) -> list[list[str]]:
        # Triton has no kernels of SGD and RMSprop.
        ops = [op for op in OPS if "triton" not in options or op != "optimizers"]
        return [
            [*python, "-m", "pytest", f"benchmarks/bench_{op}.py", "--benchmark-only", "-q", "-p", "no:cacheprovider",
             "--device", device, "--results", str(out), "--resume", *options]
            for op in ops
        ]  # fmt: skip

    # Editable: nnfast.kernels lies in a folder of its own, which only an installation finds.
    build = [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    # Its picture stays where it is made.
    train = [*python, "benchmarks/train_gpt.py", "--record", "--results", str(out)]
    train += ["--dtype", "bfloat16"]
    if rehearse:
        train += ["--steps", "4", "--layers", "1", "--width", "64", "--batch", "1"]
    else:
        train += ["--device", "cuda", "--steps", "200", "--layers", "12", "--width", "768", "--batch", "32"]
        train += ["--compile"]
    goals = [bench("--goals", *mode) for mode in modes]
    # A rehearsal's cells are all of a few shapes: those of the goals are enough.
    rest = [] if rehearse else [command for mode in modes for command in bench(*mode)]
    return {
        "build": [build],
        "doctor": [[*python, "-m", "nnfast"]],
        "test": [[*python, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider"]],
        "goals": goals[0],
        "train": [train],
        "graphs": goals[1] + goals[2],
        "bench": rest,
    }


def unpack() -> bool:
    """Puts the native libraries of a wheel for this Python, if there is one in ``dist``, where the checkout finds them;
    and what lies in folders of its own where an installation has it."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted((ROOT / "dist").glob(f"nnfast-*-{tag}-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        return False
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(ROOT, [n for n in wheel.namelist() if n.startswith("nnfast/") and n.endswith(".so")])
    for name in ("kernels", "benchmarks"):
        if not (ROOT / "nnfast" / name).exists():
            (ROOT / "nnfast" / name).symlink_to(ROOT / name)
    return True


def describe(rehearse: bool) -> dict[str, str]:
    """What a result depends on, for every line of ``lap.csv``."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ["NNFAST_COMMIT"],
        "device": "rehearsal" if rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
    }


def commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty=+"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run(command: list[str], limit: float, env: dict[str, str], log: Path, console: Console) -> tuple[str, float]:
    """Runs one command into the log; what became of it, and how many seconds it took."""
    start = time.perf_counter()
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        begin = file.tell()
        try:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    # 5: pytest has found nothing to do, as every cell is there already.
    if code == 0 or (code == 5 and "--resume" in command):
        outcome = "ok"
    elif code == 2 and any("--resume goes on" in line for line in said):
        outcome = "unfinished"
    else:
        outcome = f"exit status {code}" if code is not None else f"stopped after {limit:.0f} s"
    seconds = time.perf_counter() - start
    console.print(f"{' '.join(command[2:6])}: {outcome}, {seconds:.0f} s", markup=False)
    for line in said[-15:] if outcome not in ("ok", "unfinished") else said[-1:]:
        console.print(f"    {line}", markup=False, highlight=False)
    return outcome, seconds


def finished(table: Path) -> set[str]:
    """The commands that a lap before this one has done."""
    if not table.exists():
        return set()
    with table.open() as file:
        return {row["command"] for row in csv.DictReader(file) if row["outcome"] == "ok"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results go: eight files at the most")
    parser.add_argument("--before", type=Path, help="where those of the laps before this one are")
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS), help="which steps to run")
    parser.add_argument("--seconds", type=float, default=560, help="how long it may take (default: %(default)s)")
    parser.add_argument("--commit", help="what stands in the results, where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="on a machine without a GPU")
    args = parser.parse_args()
    console, start = Console(), time.monotonic()
    if not args.rehearse and not torch.cuda.is_available():
        console.print("There is no GPU that this torch can use; without one: --rehearse, make compile-gpu, make test")
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        console.print(f"Missing here: {', '.join(missing)}")
        return 2

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.before:
        shutil.copytree(args.before, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    os.environ["NNFAST_COMMIT"] = args.commit or commit()
    env = dict(os.environ)
    if not args.rehearse:
        major, minor = torch.cuda.get_device_capability()
        env.setdefault("NNFAST_CUDA_ARCH", f"{major}{minor}" + ("a" if major == 9 else ""))
    backend = "cpu" if args.rehearse else "cuda"
    asked = [sys.executable, "-c", INSTALLED.format(backend, backend)]

    def is_built() -> bool:
        return subprocess.run(asked, cwd=ROOT, env=env, capture_output=True).returncode == 0

    # This may be another machine than last time, so it is asked whether the build is there.
    built = is_built()
    if not built and unpack():
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        built = is_built()
    hopper = not built and not args.rehearse and torch.cuda.get_device_capability()[0] == 9
    folders = ROOT / "build/cutlass", *map(Path, sys.path)
    if hopper and not any((folder / "cutlass_library/source").is_dir() for folder in folders):
        console.print(
            "CUTLASS's headers are not here, and without them Hopper's own kernels are not built: take build/cutlass "
            "along, which make compile-gpu makes on a machine with a network"
        )
        return 2

    done = finished(out / "lap.csv")
    todo = [
        (step, command)
        for step, each in commands(out, args.rehearse).items()
        for command in each
        if step in args.steps and (not built if step == "build" else words(command, out) not in done)
    ]
    failed = left = 0
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress, (out / "lap.csv").open("a", newline="") as file:
        table = csv.DictWriter(file, [*describe(args.rehearse), "step", "command", "outcome", "seconds"])
        if file.tell() == 0:
            table.writeheader()
        bar = progress.add_task("lap", total=len(todo))
        for i, (step, command) in enumerate(todo):
            progress.update(bar, description=step)
            limit = min(LIMITS[step], args.seconds - (time.monotonic() - start))
            resumes = "--resume" in command
            if limit < (2 * OVER if resumes else 5):
                left = len(todo) - i
                break
            call = [*command, "--seconds", f"{limit - OVER:.0f}"] if resumes else command
            outcome, seconds = run(call, limit, env, out / "lap.log", progress.console)
            row = {"step": step, "command": words(command, out), "outcome": outcome, "seconds": f"{seconds:.1f}"}
            table.writerow({**describe(args.rehearse), **row})
            file.flush()
            progress.advance(bar)
            failed += outcome not in ("ok", "unfinished")
            left += outcome == "unfinished"
            if step == "build" and outcome != "ok":
                break
    if left:
        console.print(f"{left} commands are left: another lap with --before {args.out}")
    return 1 if failed else 0


def words(command: list[str], out: Path) -> str:
    """A command as ``lap.csv`` names it, wherever its results go."""
    return " ".join(command[1:]).replace(str(out), "OUT")


if __name__ == "__main__":
    sys.exit(main())
