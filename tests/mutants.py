"""Changes one line at a time in the kernels, the contracts and the gate: a test must turn red.

python tests/mutants.py [--count 150] [--seed 0] [--minutes 60] [--only csrc/cpu] [--out tests/mutants.jsonl]

universalmutator makes the changes, of which a seed draws some. Each is built in a copy of the tree, where only what
includes the file is compiled again, and the tests of its op run until one fails. A change that does not compile is
passed over, as is one that the compiler makes the same machine code of. Of a kernel, one instruction set's build is
compiled: the best that this CPU has or, where that stays as it was, AVX2's, which the tests then run. Each result is
written down at once, with the change as a patch, and what stands there is not run again: stop it when you like, and go
on later. What survives is to be explained in README.md or to get a test. Not part of the suite: a mutant takes half a
minute of a core, or two.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build/mutants"
TREE, LIB, OBJECTS, CLEAN = (HOME / name for name in ("tree", "lib", "objects", "clean"))
FOLDERS = ("csrc/ops", "csrc/gate", "csrc/cpu", "csrc/math")
SECONDS = 900  # of tests, after which a mutant hangs: that is red too
# What several ops share, and which of them see it first.
SHARED = {
    "optimizer": ["adamw", "optimizers"],
    "step": ["adamw", "optimizers"],
    "sgd": ["optimizers"],
    "rmsprop": ["optimizers"],
    "product": ["linear", "linear_gelu"],
    "memory": ["process", "linear_gelu"],
    "python": [
        "embedding",
        "clip_grad",
        "layer_norm",
        "linear",
        "cross_entropy",
        "attention",
        "adamw",
        "surface",
        "process",
    ],
    "moments": ["layer_norm"],
    "rows": ["layer_norm", "cross_entropy"],
    "gelu": ["linear_gelu"],
    "tiles": ["attention", "linear"],
    "gemm": ["linear", "linear_gelu"],
    "attention_backward": ["attention"],
}
# Of test_fuzz.py, what draws cases for them.
FUZZ = {"linear": "linear_gelu", "clip_grad": "optimizers"}
CAPABILITY = "ATEN_CPU_CAPABILITY"
# What a compilation spends most of its time on, compiled once. g++ takes it where the options are the same.
HEADERS = ("ATen/Parallel.h", "ATen/autocast_mode.h", "torch/csrc/autograd/custom_function.h", "torch/library.h")


def tests_of(source: Path) -> list[str]:
    """The tests of the file's op, or of all ops where it names none; its random cases; and allocations that fail. What
    takes least time stands first."""
    ops = sorted(p.stem for p in (ROOT / "csrc/ops").glob("*.cpp") if p.stem not in SHARED)
    found = SHARED.get(source.stem) or ([source.stem] if source.stem in ops else ops)
    tests = [f"tests/test_{name}.py" for name in found if (ROOT / f"tests/test_{name}.py").exists()]
    fuzz = (ROOT / "tests/test_fuzz.py").read_text()
    drawn = dict.fromkeys(FUZZ.get(name, name) for name in found)
    tests += [f"tests/test_fuzz.py::test_{name}" for name in drawn if f"def test_{name}(" in fuzz]
    return [*tests, "tests/test_faults.py"]


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, **options)


def precompile() -> None:
    """Compile torch's headers once, to be included before every file that can find them."""
    include = f"{Path(torch.__file__).parent}/include"
    header = HOME / "torch.h"
    lines = "".join(f"#include <{name}>\n" for name in HEADERS)
    header.write_text(f"#if __has_include(<torch/library.h>)\n{lines}#endif\n")
    # Without inlining a file compiles sooner. A compiler that cannot take the precompiled header reads the plain one.
    os.environ["CFLAGS"] = f"-O1 -march=native -DNNFAST_NO_INLINE -include {header}"
    flags = [
        "-std=c++20",
        "-O1",
        "-march=native",
        "-DNDEBUG",
        "-fPIC",
        "-fopenmp",
        "-fno-semantic-interposition",
        f"-I{include}",
    ]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    run(*compiler, *flags, f"-I{include}/torch/csrc/api/include", "-x", "c++-header", header, "-o", f"{header}.gch")


def build_all() -> bool:
    places = ["--build-base", str(OBJECTS), "--build-lib", str(LIB)]
    return run(sys.executable, "setup.py", "--quiet", "build", *places).returncode == 0


def ninja(*what) -> subprocess.CompletedProcess:
    (plan,) = OBJECTS.glob("*.ninja")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    return run(sys.executable, "-m", "ninja", "-f", plan, *jobs, *what)


def digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


class Build:
    """The build without a change, and the build of a change beside it."""

    def __init__(self):
        shutil.copytree(OBJECTS, CLEAN, dirs_exist_ok=True)  # with the times of change, for Ninja goes by them
        # By instruction set, the best that this CPU has first.
        has = Path("/proc/cpuinfo").read_text()
        best = [isa for isa, flag in (("avx512_bf16", "avx512_bf16"), ("avx512", "avx512f")) if flag in has][:1]
        kernels = OBJECTS / "temp.kernels/csrc/cpu"
        self.kernels = {isa: kernels / f"{isa}.o" for isa in (*best, "avx2")}
        self.digest = self.built()
        self.link = shlex.split(ninja("-t", "commands", *OBJECTS.rglob("libnnfast_cpu.so")).stdout.splitlines()[-1])
        # The files that only kernels include: for a change of these, one instruction set's build is compiled.
        included, by_others = set(), set()
        for block in ninja("-t", "deps").stdout.split("\n\n"):
            made, *of = block.splitlines() or [""]
            (included if str(kernels) in made else by_others).update(os.path.normpath(line.strip()) for line in of)
        self.of_kernels = included - by_others

    def built(self) -> str:
        return digest(list((OBJECTS / "lib.native").rglob("*.so")))

    def change(self, source: Path) -> dict[str, str] | None:
        """The environment in which the change is seen; None where it does not compile or changes nothing."""
        if str(source) not in self.of_kernels:
            return {} if ninja().returncode == 0 and self.built() != self.digest else None
        for isa, built in self.kernels.items():
            if ninja(built).returncode:
                return None
            if digest([built]) != digest([CLEAN / built.relative_to(OBJECTS)]):
                run(*self.link, check=True)
                return {CAPABILITY: "avx2"} if isa == "avx2" else {}
        return None

    def install(self) -> None:
        for built in (OBJECTS / "lib.native").rglob("*.so"):
            library = LIB / built.relative_to(OBJECTS / "lib.native")
            library.unlink()  # a process that has the old one open keeps it
            shutil.copyfile(built, library)

    def undo(self) -> None:
        for built in (*OBJECTS.rglob("*.o"), *OBJECTS.rglob("*.so")):
            clean = CLEAN / built.relative_to(OBJECTS)
            if built.stat().st_mtime_ns != clean.stat().st_mtime_ns:
                shutil.copy2(clean, built)


def red(tests: list[str], environment: dict[str, str]) -> str:
    """The test that fails, or how they end; empty where they pass. The built package goes before every other, in child
    processes too."""
    tests = [str(TREE / test) for test in tests]
    # Without inlining no product is fused with its sum, and what looks at the last digits fails in any case.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not (test_other_instruction_sets or no_less_accurate)"]
    command = [sys.executable, "-m", "pytest", "-c", str(TREE / "pyproject.toml"), "--rootdir", str(TREE)]
    environment = {**os.environ, **environment}
    try:
        done = subprocess.run(
            [*command, *options, *tests], cwd=LIB, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "" if done.returncode == 0 else failed[1] if failed else f"ends with {done.returncode}"


def mutants(source: Path, folder: Path) -> list[Path]:
    if not folder.exists():
        folder.mkdir(parents=True)
        run("mutate", str(source), "cpp", "--noCheck", "--mutantDir", str(folder))
    return sorted(folder.iterdir(), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def change(before: list[str], after: list[str]) -> tuple[str, str] | None:
    """The line that a mutant changes, before and after; None where it adds one, mostly a break where there is no loop,
    or where only a comment differs."""
    if len(before) != len(after):
        return None
    old, new = next(((a, b) for a, b in zip(before, after, strict=True) if a != b), ("", ""))
    code = [re.sub(r" *//.*", "", line) for line in (old, new)]
    return (old, new) if code[0] != code[1] else None


def may_compile(old: str, new: str) -> bool:
    """By the look of it: of what universalmutator does to C++, half breaks names, templates or brackets."""
    old, new = (re.sub(r" *//.*", "", line) for line in (old, new))
    if old.startswith(("#", "template", "namespace", "}")):
        return False
    if new.strip().startswith("/*"):
        return old.rstrip().endswith(";")

    def balance(line):
        return [line.count(a) - line.count(b) for a, b in ("()", "[]", "{}")]

    def types(line):
        """Templates' brackets, pointers and references, and names with a digit."""
        line = re.sub(r" (<<|>>|[<>]=?) |->", " ", line)  # comparisons and shifts stand between spaces
        return [line.count("<"), line.count(">"), *sorted(re.findall(r"\w[*&]+ ", line)), *names(line)]

    def names(line):
        return [] if "==1)" in new else sorted(re.findall(r"[A-Za-z_]\w*\d\w*", line))

    return balance(old) == balance(new) and types(old) == types(new)


def changed(patch: str) -> tuple[str, str, str]:
    """File, and line before and after, of a patch."""
    source, _, _, *lines = patch.splitlines()
    old, new = (next(line[1:] for line in lines if line.startswith(sign)) for sign in "-+")
    return source.removeprefix("--- "), old, new


def draw(sources: list[Path], seed: int, first) -> list[tuple[str, str, str]]:
    """File, and line before and after, of all changes, in an order by chance that stays when other lines change; those
    that `first` has go first. Of lines that are equal the first one changes."""
    found = set()
    for source in sources:
        before = (TREE / source).read_text().splitlines()
        for mutant in mutants(source, HOME / "drawn" / source):
            one = change(before, mutant.read_text().splitlines())
            if one and may_compile(*one):
                found.add((str(source), *one))

    def chance(one):
        return hashlib.sha256(repr((seed, *one)).encode()).digest()

    return sorted(found, key=lambda one: (one not in first, chance(one)))


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
    parser.add_argument("--trust", action="store_true", help="the tests are known to pass without a change")
    parser.add_argument("--only", default="", help="files whose path holds this")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/mutants.jsonl")
    given = parser.parse_args()

    end = time.monotonic() + 60 * given.minutes
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = [source for source in copy_tree() if given.only in str(source)]
    precompile()
    if not build_all():
        print("it does not compile without a change", file=sys.stderr)
        return 2
    build = Build()
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    results = {changed(result["patch"]): result["by"] for result in known}
    drawn = draw(sources, given.seed, results)
    counted = Counter()
    # Without a change all are green, or every mutant would look caught.
    if not given.trust:
        for capability in ({}, {CAPABILITY: "avx2"}):
            tests = sorted({test for source, _, _ in drawn[: given.count] for test in tests_of(Path(source))})
            if why := red(tests, capability):
                print(f"without a change already: {why}", file=sys.stderr)
                return 2

    with given.out.open("a") as out, Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("mutants", total=given.count)
        for one in drawn:
            if counted.total() >= given.count or time.monotonic() > end:
                break
            source, old, new = one
            before = (TREE / source).read_text()
            after = before.replace(f"\n{old}\n", f"\n{new}\n", 1)
            lines = (text.splitlines(keepends=True) for text in (before, after))
            patch = "".join(difflib.unified_diff(*lines, source, source, n=1))
            if one not in results:
                times = (TREE / source).stat()
                try:
                    (TREE / source).write_text(after)
                    by = None
                    if (environment := build.change(Path(source))) is not None:
                        build.install()
                        by = red(tests_of(Path(source)), environment)
                finally:
                    (TREE / source).write_text(before)
                    os.utime(TREE / source, ns=(times.st_atime_ns, times.st_mtime_ns))
                    build.undo()
                results[one] = by
                print(json.dumps({"by": by, "patch": patch}), file=out, flush=True)
            if (by := results[one]) is not None:
                counted["killed" if by else "survive"] += 1
                if not by:
                    progress.console.print(patch)
                progress.update(task, advance=1, description=f"{counted['survive']} survive")
    print(f"{counted['killed']} of {counted.total()} mutants turn a test red; each, and by which: {given.out}")
    return 0 if counted["killed"] >= 0.9 * counted.total() else 1


if __name__ == "__main__":
    sys.exit(main())
