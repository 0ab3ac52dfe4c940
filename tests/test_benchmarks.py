"""The benchmarks: a wrong result gets no number, ratios are taken within a lap, a loss is shown; the main job runs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnfast.benchmarks import (
    bench_adamw,
    bench_attention,
    bench_cross_entropy,
    bench_layer_norm,
    bench_linear,
    bench_linear_gelu,
    bench_optimizers,
    harness,
    report,
)

MODULES = (
    bench_layer_norm,
    bench_linear,
    bench_linear_gelu,
    bench_cross_entropy,
    bench_adamw,
    bench_attention,
    bench_optimizers,
)
ROOT = Path(__file__).parents[1]


def tiny(module):
    return next(case for case in module.cases("cpu") if "tiny" in case.model)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.OP)
def test_every_provider_is_right_and_timed(module, monkeypatch):
    monkeypatch.setattr(harness, "LAPS", (3, 3))
    case = tiny(module)
    rows = harness.run(case, module.task(case))
    assert {"torch", "nnfast"} <= {r.provider for r in rows}
    assert all(r.ms > 0 and r.speedup > 0 and r.of_ceiling > 0 for r in rows), rows


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.OP)
def test_a_wrong_result_gets_no_number(module, monkeypatch):
    monkeypatch.setattr(harness, "LAPS", (3, 3))
    case = tiny(module)
    task = module.task(case)
    right = task.providers["nnfast"]
    task.providers["off by a thousandth"] = lambda: [t * 1.001 for t in right()]
    task.providers["NaN"] = lambda: [t * float("nan") for t in right()]
    task.providers["cannot"] = lambda: 1 / 0
    rows = {r.provider: r for r in harness.run(case, task)}
    assert rows["nnfast"].ms is not None
    for name, note in {"off by a thousandth": "wrong: ", "NaN": "wrong: ", "cannot": "ZeroDivisionError"}.items():
        assert rows[name].ms is None and rows[name].note.startswith(note), rows[name]


def made_up(torch_times, our_times):
    case = harness.Case("layer_norm", "grid", (4, 8))
    task = harness.Task({"torch": list, "nnfast": list}, [], 64, 0, {"copy": list}, 1.0)
    laps = [{"torch": t, "nnfast": o, "copy": 1e-3} for t, o in zip(torch_times, our_times, strict=True)]
    return harness.rows(case, task, laps, {})


def test_a_speedup_is_the_median_of_the_ratios_within_a_lap():
    """The machine halves its speed in mid-run: the ratio stays what it is."""
    ours = made_up([2e-3, 2e-3, 4e-3, 4e-3, 4e-3], [1e-3, 1e-3, 2e-3, 2e-3, 2e-3])[1]
    assert (ours.speedup, ours.speedup_low, ours.speedup_high) == (2, 2, 2)
    assert ours.ms == 2 and ours.of_ceiling == 0.5


def test_a_loss_is_shown(tmp_path):
    lost = made_up([1e-3] * 5, [2e-3] * 5)
    assert "SLOWER" in harness.cells(lost)[0][-1]
    harness.append([vars(r) for r in lost], tmp_path / "layer_norm.csv")
    harness.append([vars(r) for r in lost], tmp_path / "layer_norm.csv")
    with (tmp_path / "layer_norm.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    ((found,),) = [report.summary(run) for run in report.load(tmp_path / "layer_norm.csv")]
    assert found[-1].startswith("2 of 2"), found
    report.page(tmp_path)
    assert "**0.50 (0.50-0.50)**" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "layer_norm.png").stat().st_size > 1000


def test_one_shape_from_the_command_line():
    command = [sys.executable, "-m", "nnfast", "bench", "--op", "layer_norm", "--shape"]
    found = subprocess.run([*command, "3,5"], capture_output=True, text=True, check=True).stdout
    assert "nnfast" in found and "ceiling" in found
    refused = subprocess.run([*command, "3"], capture_output=True, text=True)
    assert refused.returncode == 2 and "rows,size" in refused.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_main_job(tmp_path, dtype):
    command = [sys.executable, "benchmarks/train_gpt.py", "--steps=5", "--layers=1", "--width=64", "--batch=2"]
    command += [f"--dtype={dtype}", f"--out={tmp_path / 'out.png'}", f"--data={__file__}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "The losses agree" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "out.png").exists()


def test_bf16_weights(tmp_path):
    command = [sys.executable, "benchmarks/bf16_weights.py", "--steps=3", f"--out={tmp_path / 'out.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out.png").exists(), done.stdout + done.stderr
    assert "master_weights=True: " in done.stdout


def test_memory_counts_what_is_alive_at_once():
    def call():
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.int8)

    assert 1 << 20 <= harness.peak_memory(call, "cpu") < 2 << 20
