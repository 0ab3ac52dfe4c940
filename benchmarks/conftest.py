"""The suite under pytest-benchmark: a case a test, a progress bar, a table, and rows in results/<device>/<op>.csv.

pytest benchmarks --benchmark-only [-k "layer_norm and bf16"] [--device cuda] [--backend triton] [--compile] [--graph]

In parts, where a command may take only so long: --seconds 500 --resume, again until nothing is left.
"""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import nnfast

from . import harness, rehearsal


def pytest_addoption(parser):
    group = parser.getgroup("nnfast")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda", "rehearsal"))
    group.addoption("--backend", choices=("cuda", "triton", "cpu"), help="hold nnfast to one of its backends")
    group.addoption("--compile", action="store_true", help="torch.compile as a provider as well")
    group.addoption("--graph", action="store_true", help="on a GPU: time CUDA graphs, not eager calls")
    group.addoption("--no-results", action="store_true", help="leave the CSV files alone")
    group.addoption("--results", type=Path, help="where the CSV files are; otherwise results/<device>")
    group.addoption("--resume", action="store_true", help="leave out the cells that the CSV files hold")
    group.addoption("--goals", action="store_true", help="only the shapes that a GPU's figures are judged by")
    group.addoption("--seconds", type=float, help="start no cell after so long")


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device, module = option("--device"), metafunc.module
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here")
    cases = module.cases("cuda" if device == "rehearsal" else device)
    if option("--graph") and device != "cpu":
        cases = [dataclasses.replace(case, graph=True) for case in cases]
    if option("--goals"):
        cases = [case for case in cases if case.model in module.GOALS]
        cases.sort(key=lambda case: case.dtype != "bf16")
    if device == "rehearsal":
        cases = list(dict.fromkeys(map(rehearsal.case, cases)))
    if option("--resume"):
        there = harness.measured(results(metafunc.config, cases[0].device) / f"{module.OP}.csv")
        cases = [case for case in cases if case.key not in there]
    metafunc.parametrize("case", cases, ids=lambda case: str(case).replace(" ", "-"))


def results(config, device: str) -> Path:
    return config.getoption("--results") or harness.folder(device)


@pytest.fixture
def race(case, benchmark, request):
    """``race(case, task)``: every provider of the case in turn, lap by lap, pytest-benchmark counting the laps."""
    option = request.config.getoption

    def run(case, task):
        torch.manual_seed(0)
        benchmark.group = case.op
        with harness.capturable(case):
            made = task(case, compile=option("--compile"))
            errors = [vars(row) for row in harness.error_rows(case, made)]
            found = harness.run(
                case, made, repeat=lambda lap, count: benchmark.pedantic(lap, rounds=count, iterations=1)
            )
        benchmark.extra_info["rows"] = rows = [vars(row) for row in found]
        request.config.stash[FOUND].append(found)
        if not option("--no-results"):
            folder = results(request.config, case.device)
            if errors:
                harness.append(errors, folder / "errors.csv")
            harness.append(rows, folder / f"{case.op}.csv")  # last: it says that the cell is done

    return run


# ---- progress and table ----

FOUND = pytest.StashKey[list]()
PROGRESS = pytest.StashKey[Progress]()
STARTED = time.monotonic()


def pytest_configure(config):
    config.stash[FOUND] = []
    if config.getoption("--device") == "rehearsal":
        rehearsal.begin()
    config.option.benchmark_quiet = True  # its table holds the laps' own time, which says nothing
    if backend := config.getoption("--backend"):
        forced = nnfast.use_backend(backend)
        forced.__enter__()
        config.add_cleanup(lambda: forced.__exit__(None, None, None))


def pytest_collection_finish(session):
    columns = (TextColumn("benchmarks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
    progress.add_task("", total=len(session.items))
    session.config.stash[PROGRESS] = progress
    if not session.config.option.collectonly:
        progress.start()


def pytest_runtest_setup(item):
    item.config.stash[PROGRESS].update(0, description=str(item.callspec.params["case"]))


def pytest_runtest_teardown(item):
    item.config.stash[PROGRESS].advance(0)
    seconds = item.config.getoption("--seconds")
    if seconds and time.monotonic() - STARTED > seconds:
        item.session.shouldstop = f"{seconds:.0f} s are over; --resume goes on"


def pytest_report_teststatus(report):
    if report.when == "call" and report.passed:
        return "passed", "", ""  # the bar shows it


def pytest_terminal_summary(terminalreporter, config):
    config.stash[PROGRESS].stop()
    console = Console(width=140)
    losses = 0
    for op in dict.fromkeys(found[0].op for found in config.stash[FOUND]):
        of_op = [found for found in config.stash[FOUND] if found[0].op == op]
        table = Table(*harness.HEADINGS, title=f"{op} on {of_op[0][0].device}")
        for found in of_op:
            for line in harness.cells(found):
                style = "red" if "SLOWER" in line[-1] else "yellow" if "slower?" in line[-1] else None
                losses += style == "red"
                table.add_row(*line, style=style)
        console.print(table)
    console.print(f"{losses} cells where the best peer is faster beyond the laps' quartiles; they are marked SLOWER")
