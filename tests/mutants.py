"""Changes one line at a time in the kernels, the contracts and the gate: a test must turn red.

python tests/mutants.py [--count 150] [--seed 0] [--minutes 60] [--only csrc/cpu] [--out build/mutants/results.jsonl]

universalmutator makes the changes, of which a seed draws some. Each is built in a copy of the tree, where only what
includes the file is compiled again, and the tests of its op run until one fails. A change that does not compile is
passed over, as is one that the compiler makes the same machine code of. Each result is written down at once, with the
change as a patch, and what stands there is not run again: stop it when you like, and go on later. What survives is to
be explained in README.md or to get a test. Not part of the suite: a mutant takes a minute or two.
"""

import argparse
import difflib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build/mutants"
TREE, LIB = HOME / "tree", HOME / "lib"
FOLDERS = ("csrc/ops", "csrc/gate", "csrc/cpu", "csrc/math")
SECONDS = 900  # of tests, after which a mutant hangs: that is red too
# What several ops share, and which of them see it first.
SHARED = {
    "optimizer": ["adamw", "optimizers", "faults"],
    "step": ["adamw", "optimizers", "faults"],
    "product": ["linear", "linear_gelu", "faults"],
    "memory": ["process", "faults", "linear_gelu"],
    "python": ["layer_norm", "linear", "adamw", "surface", "process"],
    "sgd": ["optimizers"],
    "rmsprop": ["optimizers"],
    "moments": ["layer_norm"],
    "rows": ["layer_norm", "cross_entropy"],
}


def tests_of(source: Path) -> list[str]:
    """Those of its op, and what draws random cases; of all ops where none is named."""
    ops = [p.stem for p in (ROOT / "csrc/ops").glob("*.cpp")]
    found = SHARED.get(source.stem) or ([source.stem] if source.stem in ops else ops)
    files = [f"tests/test_{name}.py" for name in found if (ROOT / f"tests/test_{name}.py").exists()]
    return [*files, "tests/test_fuzz.py"]


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, **options)


def build() -> str | None:
    """The libraries' digest, or None where they do not compile."""
    places = ["--build-base", str(HOME / "objects"), "--build-lib", str(LIB)]
    done = run(sys.executable, "setup.py", "--quiet", "build", *places)
    libraries = sorted(LIB.rglob("*.so"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in libraries)).hexdigest()
    return None if done.returncode or not libraries else digest


def red(tests: list[str]) -> str:
    """The test that fails, or how they end; empty where they pass. The built package goes before every other, in child
    processes too."""
    tests = [str(TREE / test) for test in tests]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--deselect", "tests/test_surface.py::test_other_instruction_sets"]
    command = [sys.executable, "-m", "pytest", "-c", str(TREE / "pyproject.toml"), "--rootdir", str(TREE)]
    try:
        done = subprocess.run([*command, *options, *tests], cwd=LIB, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "hangs"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "" if done.returncode == 0 else failed[1] if failed else f"ends with {done.returncode}"


def mutants(source: Path, folder: Path) -> list[Path]:
    if not folder.exists():
        folder.mkdir(parents=True)
        run("mutate", str(source), "cpp", "--noCheck", "--mutantDir", str(folder))
    return sorted(folder.iterdir(), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def code(text: str) -> str:
    """Without its comments."""
    return re.sub(r"//.*", "", text)


def copy_tree() -> list[Path]:
    """The tree as git knows it, in HOME; the sources that may change."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in git.stdout.splitlines():
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copyfile(ROOT / name, target)
            if name.startswith(FOLDERS):
                shutil.rmtree(HOME / "drawn" / name, ignore_errors=True)
    return [Path(name) for name in git.stdout.splitlines() if name.startswith(FOLDERS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150, help="how many that compile to something else")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no mutant is begun after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path holds this")
    parser.add_argument("--out", type=Path, default=HOME / "results.jsonl")
    given = parser.parse_args()

    end = time.monotonic() + 60 * given.minutes
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = [source for source in copy_tree() if given.only in str(source)]
    if (clean := build()) is None:
        print("it does not compile without a change", file=sys.stderr)
        return 2
    drawn = [(source, m) for source in sources for m in mutants(source, HOME / "drawn" / source)]
    random.Random(given.seed).shuffle(drawn)
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    results = {result["patch"]: result["by"] for result in known}
    counted = Counter()
    for test in sorted({test for source, _ in drawn[: given.count] for test in tests_of(source)}):
        note = HOME / f"green-{clean[:12]}-{Path(test).stem}"
        if not note.exists() and (why := red([test])):
            print(f"without a change already: {test}: {why}", file=sys.stderr)
            return 2
        note.touch()

    with given.out.open("a") as out, Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("mutants", total=given.count)
        for source, mutant in drawn:
            if counted.total() >= given.count or time.monotonic() > end:
                break
            before, after = (TREE / source).read_text(), mutant.read_text()
            if code(before) == code(after):
                continue
            lines = (text.splitlines(keepends=True) for text in (before, after))
            patch = "".join(difflib.unified_diff(*lines, str(source), str(source), n=1))
            if patch not in results:
                try:
                    (TREE / source).write_text(after)
                    by = None if build() in (None, clean) else red(tests_of(source))
                finally:
                    (TREE / source).write_text(before)
                results[patch] = by
                print(json.dumps({"by": by, "patch": patch}), file=out, flush=True)
            if (by := results[patch]) is not None:
                counted["killed" if by else "survive"] += 1
                if not by:
                    progress.console.print(patch)
                progress.update(task, advance=1, description=f"{counted['survive']} survive")
    print(f"{counted['killed']} of {counted.total()} mutants turn a test red; each, and by which: {given.out}")
    return 0 if counted["killed"] >= 0.9 * counted.total() else 1


if __name__ == "__main__":
    sys.exit(main())
