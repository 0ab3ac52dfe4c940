"""Every code block of the README and the docs runs, and every command in them is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page, number, language, block)
    for page in PAGES
    for number, (language, block) in enumerate(re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S), 1)
]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{p.name}-{n}") for p, n, language, b in BLOCKS if language == "python"]
)
def test_python(block):
    """As a script of its own."""
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    """`make X` is a target; `python -m nnfast` runs; a file that is linked is there."""
    text = page.read_text()
    assert {name for name in re.findall(r"(?:`|^)make ([\w-]+)", text, re.M)} <= TARGETS
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    assert all(language in ("", "python", "console") for p, _, language, _ in BLOCKS if p == page)


def test_the_doctor_runs():
    done = subprocess.run([sys.executable, "-m", "nnfast"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "served by" in done.stdout, done.stderr
