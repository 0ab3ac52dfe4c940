"""Every script of examples/ runs as its README says."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"`((?:python|torchrun) .*?)`", (ROOT / "examples/README.md").read_text())
NEEDS = {"examples/finetune.py": "transformers", "examples/lightning_module.py": "lightning"}


def test_every_script_is_listed():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {Path(c).name for c in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(command):
    program, *arguments = shlex.split(command)
    if (package := NEEDS.get(arguments[-1])) and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    started = [sys.executable] if program == "python" else [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run([*started, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    # A thread of gloo's may ask for the GIL while Python ends, and torch then aborts the process: the work is done.
    aborted_at_exit = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or (program == "torchrun" and aborted_at_exit), done.stderr[-2000:]
    assert "loss" in done.stdout
