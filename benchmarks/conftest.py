"""The suite under pytest-benchmark: a case a test, a progress bar, a table, and rows in results/<device>/<op>.csv.

pytest benchmarks --benchmark-only [-k "layer_norm and bf16"] [--device cuda] [--backend triton] [--compile] [--graph]
"""

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import nnfast

from . import harness


def pytest_addoption(parser):
    group = parser.getgroup("nnfast")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--backend", choices=("cuda", "triton", "cpu"), help="hold nnfast to one of its backends")
    group.addoption("--compile", action="store_true", help="torch.compile as a provider as well")
    group.addoption("--graph", action="store_true", help="on a GPU: time CUDA graphs, not eager calls")
    group.addoption("--no-results", action="store_true", help="leave the CSV files alone")


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here")
    cases = metafunc.module.cases(device)
    metafunc.parametrize("case", cases, ids=lambda case: str(case).replace(" ", "-"))


@pytest.fixture
def race(case, benchmark, request):
    """``race(case, task)``: every provider of the case in turn, lap by lap, pytest-benchmark counting the laps."""
    option = request.config.getoption

    def run(case, task):
        torch.manual_seed(0)
        benchmark.group = case.op
        made = task(case, compile=option("--compile"))
        errors = [vars(row) for row in harness.error_rows(case, made)]
        found = harness.run(
            case,
            made,
            repeat=lambda lap, count: benchmark.pedantic(lap, rounds=count, iterations=1),
            graph=option("--graph"),
        )
        benchmark.extra_info["rows"] = rows = [vars(row) for row in found]
        request.config.stash[FOUND].append(found)
        if not option("--no-results"):
            harness.append(rows, harness.folder(case.device) / f"{case.op}.csv")
            if errors:
                harness.append(errors, harness.folder(case.device) / "errors.csv")

    return run


# ---- progress and table ----

FOUND = pytest.StashKey[list]()
PROGRESS = pytest.StashKey[Progress]()


def pytest_configure(config):
    config.stash[FOUND] = []
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
