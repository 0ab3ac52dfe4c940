"""Every code block of the README and the docs runs, and every command in them is there."""

import re
from pathlib import Path

import pytest
from common import run_script

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
    run_script(block, cwd=ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    """`make X` is a target; a file that is linked is there."""
    text = page.read_text()
    assert {name for name in re.findall(r"(?:`|^)make ([\w-]+)", text, re.M)} <= TARGETS
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    assert all(language in ("", "python", "console") for p, _, language, _ in BLOCKS if p == page)
