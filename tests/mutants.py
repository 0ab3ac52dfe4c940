"""Changes one line at a time in the kernels, the contracts and the gate: a test must turn red.

python tests/mutants.py [--draw 150] [--seed 0] [--out build/mutants/survivors.txt]

universalmutator makes the changes. Each drawn one is built in a copy of the tree, where only what includes the file is
compiled again, and the tests of its op run until one fails. A change that does not compile is drawn again, as is one
that the compiler makes the same machine code of. What survives is written down as a patch, to be explained in
README.md or to get a test. Not part of the suite: a mutant takes a minute or two.
"""

import argparse
import difflib
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build/mutants"
TREE, LIB = HOME / "tree", HOME / "lib"
FOLDERS = ("csrc/ops", "csrc/gate", "csrc/cpu", "csrc/math")
SECONDS = 900  # of tests, after which a mutant hangs: that is red too


def tests_of(source: Path) -> list[str]:
    """Those of its op; of all for what the ops share."""
    stem = source.stem.removeprefix("covers_")
    ops = [p.stem for p in (ROOT / "csrc/ops").glob("*.cpp")]
    found = [stem] if stem in ops else ops
    files = [f"tests/test_{op}.py" for op in found if (ROOT / f"tests/test_{op}.py").exists()]
    if stem not in ops:
        files += ["tests/test_process.py", "tests/test_surface.py"]
    return [*files, "tests/test_fuzz.py"]


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, **options)


def build() -> str | None:
    """The extension's digest, or None where it does not compile."""
    places = ["--build-base", str(HOME / "objects"), "--build-lib", str(LIB)]
    done = run(sys.executable, "setup.py", "--quiet", "build", *places)
    (built,) = LIB.glob("nnfast/_C.*.so")
    return None if done.returncode else hashlib.sha256(built.read_bytes()).hexdigest()


def red(tests: list[str]) -> bool:
    """Whether a test fails, hangs or dies. The built package goes before every other, in child processes too."""
    tests = [str(TREE / test) for test in tests]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--deselect", "tests/test_surface.py::test_other_instruction_sets"]
    command = [sys.executable, "-m", "pytest", "-c", str(TREE / "pyproject.toml"), "--rootdir", str(TREE)]
    try:
        done = subprocess.run([*command, *options, *tests], cwd=LIB, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def mutants(source: Path, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    run("mutate", str(source), "cpp", "--noCheck", "--mutantDir", str(folder))
    return sorted(folder.iterdir(), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=150, help="how many that compile to something else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path holds this")
    parser.add_argument("--out", type=Path, default=HOME / "survivors.txt")
    given = parser.parse_args()

    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = git.stdout.splitlines()
    for name in listed:
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copyfile(ROOT / name, target)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = [Path(name) for name in listed if name.startswith(FOLDERS) and given.only in name]
    if (clean := build()) is None or red(sorted({test for source in sources for test in tests_of(source)})):
        print("without a change already the build or a test fails", file=sys.stderr)
        return 2
    drawn = [(source, m) for source in sources for m in mutants(source, HOME / "drawn" / source)]
    random.Random(given.seed).shuffle(drawn)

    killed, survivors = 0, []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("mutants", total=given.draw)
        for source, mutant in drawn:
            if killed + len(survivors) == given.draw:
                break
            before, after = (TREE / source).read_text(), mutant.read_text()
            try:
                (TREE / source).write_text(after)
                digest = build()
                if digest in (None, clean):
                    continue
                if red(tests_of(source)):
                    killed += 1
                else:
                    lines = (text.splitlines(keepends=True) for text in (before, after))
                    survivors.append("".join(difflib.unified_diff(*lines, str(source), str(source), n=1)))
                    progress.console.print(survivors[-1])
            finally:
                (TREE / source).write_text(before)
            progress.update(task, advance=1, description=f"{len(survivors)} survive")
    given.out.write_text("\n".join(survivors))
    count = killed + len(survivors)
    print(f"{killed} of {count} mutants turn a test red ({killed / max(1, count):.0%}); survivors: {given.out}")
    return 0 if killed >= 0.9 * count else 1


if __name__ == "__main__":
    sys.exit(main())
