"""Compiles ``csrc/cuda/*.cu``: into the extension, for ``setup.py``; and as a script, ``make compile-gpu``, for every
architecture on a machine that need have no GPU.

The script prints what the compiler and the machine code say, kernel by kernel, and fails where one spills registers,
has a stack frame, has its matrix instructions serialised, lost its 16-byte accesses, converts number by number or, for
LayerNorm, issues for longer than its bytes take; and where the host code beside the kernels does not compile against
torch's headers: this torch's, and those of the folders that are named. What it needs it takes from the machine
(CUDA_HOME, nvcc on the PATH, /usr/local/cuda) or, where that has no CUDA 13, from PyPI into ``build/``.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUTLASS = "nvidia-cutlass==4.2.0.0"
TOOLKIT = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
DISASSEMBLER = ["nvidia-cuda-cuobjdump==13.2.*", "nvidia-cuda-nvdisasm==13.2.*"]

# Real architectures; the last without a letter is also kept as PTX, which later GPUs compile when they load it. PTX for
# 90a is for no GPU but that.
ARCHS = ("80", "90a", "100")


def archs() -> tuple[str, ...]:
    """The architectures to build for: NNFAST_CUDA_ARCH, like ``90a`` or ``80;90a``, or all."""
    return tuple(re.findall(r"\w+", os.environ.get("NNFAST_CUDA_ARCH", ""))) or ARCHS


def sources(wanted: Iterable[str]) -> dict[Path, tuple[str, ...]]:
    """Each source and what it is compiled for: ``<op>_sm90a.cu`` for that architecture alone."""
    found = {}
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        only = re.search(r"_sm(\w+)$", path.stem)
        if matching := tuple(a for a in wanted if only is None or a == only[1]):
            found[path] = matching
    return found


def toolkit() -> Path | None:
    """The CUDA toolkit of this machine: where ``bin/nvcc`` and ``include/cuda_runtime.h`` are."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    candidates.append(ROOT / "build/cuda/nvidia/cu13")
    whole = (
        Path(c) for c in candidates if c and all(Path(c, p).exists() for p in ("bin/nvcc", "include/cuda_runtime.h"))
    )
    return next(whole, None)


def release(root: Path) -> str:
    """The toolkit's version, like ``13.0``."""
    said = subprocess.run([root / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def cutlass() -> Path | None:
    """CUTLASS's sources, from where ``pip install`` has put them."""
    for place in (ROOT / "build/cutlass", sysconfig.get_path("purelib")):
        if (found := Path(place, "cutlass_library/source")).is_dir():
            return found
    return None


def command(root: Path, source: Path, wanted: Iterable[str], out: Path, ptx: bool = False) -> list[str]:
    """The call of nvcc that compiles one source for some architectures; ``ptx``: the last general one as PTX too."""
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    if ptx and (general := [a for a in wanted if a.isdigit()]):
        newest = max(general, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    includes = [root / "include/cccl"]
    if (headers := cutlass()) is not None:
        includes += [headers / "include", headers / "tools/util/include"]
    flags += [f"-I{path}" for path in includes]
    return [str(root / "bin/nvcc"), *flags, "-Xptxas", "-v", "-c", str(source), "-o", str(out)]


def host_command(root: Path, torch: Path) -> list[str]:
    """The call of the C++ compiler that checks the host code against the headers of a torch, all of it as one file:
    they are what takes the time. A torch that is not for CUDA lacks a header, which says how its own CUDA library was
    built."""
    from torch.utils.cpp_extension import get_cxx_compiler

    absent, every = (ROOT / "build/gpu" / name for name in ("headers/c10/cuda/impl/cuda_cmake_macros.h", "host.cpp"))
    absent.parent.mkdir(parents=True, exist_ok=True)
    absent.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    every.write_text("".join(f'#include "{path}"\n' for path in sorted((ROOT / "csrc/cuda").glob("*.cpp"))))
    torchs = torch / "include", torch / "include/torch/csrc/api/include"
    includes = [f"-I{root / 'include'}", f"-I{absent.parents[3]}"]
    includes += [f"-isystem{path}" for path in (*torchs, sysconfig.get_path("include"))]
    defines = ["-DNNFAST_SM90A", "-fsyntax-only", "-std=c++20"]
    return [get_cxx_compiler(), *defines, *includes, str(every)]


def version(torch: Path) -> str:
    return re.search(r"__version__ = '([\d.]+)", (torch / "version.py").read_text())[1]


def run_all(jobs: dict, workers: int) -> Iterator[tuple]:
    """Runs the commands of ``jobs`` and yields ``(key, process, seconds)`` as each ends."""

    def run(key):
        start = time.perf_counter()
        done = subprocess.run(jobs[key], capture_output=True, text=True)
        return key, done, time.perf_counter() - start

    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run, key) for key in jobs]):
            yield future.result()


# ---- what the compiler and the machine code say ----

INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "HMMA": r"\bHMMA\b",
    # LD and ST: from and to pointers that were themselves read from memory, as in AdamW's table.
    "16-byte loads": r"\bLDG?\.E\.(?:\w+\.)*128\b",
    "16-byte stores": r"\bSTG?\.E\.(?:\w+\.)*128\b",
    "F2F": r"\bF2F\.",  # a quarter of the speed of a packed conversion; between double and float for single numbers
    "instructions": r"/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?(?!NOP\b)[A-Z]",
}


def kernel_name(mangled: str) -> str:
    """The kernel's own name: the identifier in the mangled one that ends in ``_kernel``, told by its length."""
    for digits in re.finditer(r"\d+", mangled):
        for start in range(digits.start(), digits.end()):  # more digits may stand before the length
            identifier = mangled[digits.end() :][: int(mangled[start : digits.end()])]
            if identifier.endswith("_kernel"):
                return identifier
    return mangled


def compiler_report(said: str) -> tuple[dict[str, dict], list[str]]:
    """From ptxas's words: per kernel, mangled, its registers, shared memory, spilled bytes and stack; and warnings."""
    kernels, current = {}, None
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels[match[1]] = {"registers": 0, "shared": 0, "spilled": 0, "stack": 0}
        elif match := re.search(r"Function properties for (\w+)", line):
            # A function that is called, and not inlined, counts with the kernels.
            name = match[1]
            current = kernels.get(name) or {"registers": 0, "shared": 0, "spilled": 0, "stack": 0}
            kernels[name] = current
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["stack"] = int(match[1])
            current["spilled"] = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current["shared"] = int(shared[1])
    warnings = [line for line in said.splitlines() if "Performance Loss" in line or "warning" in line]
    return kernels, warnings


def instruction_counts(sass: str) -> dict[str, dict[str, int]]:
    """Per kernel, mangled: how often each of INSTRUCTIONS stands in its machine code."""
    counts = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split("\n", 1)[0].strip()
        counts[name] = {label: len(re.findall(pattern, part)) for label, pattern in INSTRUCTIONS.items()}
        counts[name]["longest loop"] = longest_loop(part)
    return counts


def longest_loop(sass: str) -> int:
    """The instructions of the longest stretch that a jump goes back over."""
    instruction = INSTRUCTIONS["instructions"].replace("[0-9a-f]{4,}", "([0-9a-f]{4,})")
    at = [int(address, 16) for address in re.findall(instruction, sass)]
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?\w+ +)?BRA\b[^;]*\b0x([0-9a-f]+)", sass)
    spans = [(int(to, 16), int(source, 16)) for source, to in jumps]
    return max((sum(first <= a <= last for a in at) for first, last in spans if first < last), default=0)


def problems(kernels: dict[str, dict], warnings: list[str]) -> list[str]:
    """One line for each kernel that spills or has a stack frame, and for each warning."""
    found = [
        f"{kernel_name(name)}: {k['spilled']} bytes spilled, {k['stack']} bytes of stack ({name})"
        for name, k in kernels.items()
        if k["spilled"] or k["stack"]
    ]
    return found + warnings


# Kernels whose every instance reads, and whose every instance writes, 16 bytes at a time where the rows allow it.
WIDE_LOADS = {
    "layer_norm_fwd_kernel", "layer_norm_fwd_long_kernel", "layer_norm_bwd_kernel", "layer_norm_bwd_long_kernel",
    "layer_norm_bwd_affine_kernel", "gelu_bwd_bias_kernel", "adamw_kernel", "sgd_kernel", "rmsprop_kernel",
    "norm_kernel", "scale_kernel",
}  # fmt: skip
WIDE_STORES = WIDE_LOADS - {"layer_norm_bwd_affine_kernel", "norm_kernel"}
# Those that form a tensor's numbers in double, in one thread.
IN_DOUBLE = {"adamw_kernel", "sgd_kernel", "rmsprop_kernel", "norm_kernel"}
# Those that round by two numbers an instruction; CUTLASS calls all of its own device_kernel.
IN_PAIRS = WIDE_LOADS - IN_DOUBLE | {"device_kernel"}


def by_elements(mangled: str) -> bool:
    """Whether an instance is for rows that do not lie on 16 bytes."""
    return (
        "layer_norm_fwd_kernel" in mangled
        and "EELb0ELb0EE" in mangled
        or bool(re.search(r"layer_norm_bwd_kernel\w*EELb0ELb[01]EE", mangled))
    )


def slipped(mangled: str, counts: dict[str, int]) -> list[str]:
    """One line for each way in which a kernel has lost its 16-byte accesses, converts number by number, or issues for
    longer than its bytes take."""
    name = kernel_name(mangled)
    wanted = {"16-byte loads": name in WIDE_LOADS, "16-byte stores": name in WIDE_STORES}
    found = [] if by_elements(mangled) else [f"{name}: no {k}" for k, wide in wanted.items() if wide and not counts[k]]
    if counts["F2F"] > 1 and name in IN_PAIRS:  # one: eps comes in double
        found.append(f"{name}: {counts['F2F']} F2F ({mangled})")
    clocks = row_clocks(mangled, counts)
    if clocks and clocks[0] > clocks[1]:
        found.append("{}: {:.0f} clocks to issue a row, {:.0f} for its bytes ({})".format(name, *clocks, mangled))
    return found


# An H200: 4.3 TB/s over 132 multiprocessors at 1.98 GHz, and instructions that each of them issues.
BYTES_A_CLOCK, SLOTS_A_CLOCK = 16.4, 4


def row_clocks(mangled: str, counts: dict[str, int]) -> tuple[float, float] | None:
    """LayerNorm in bfloat16 over full rows by vectors, which issues most for its bytes: the clocks of a multiprocessor
    that a row's instructions take, and its bytes. Forward runs straight through, so each instruction counts once;
    backward is a loop over rows. Of a cluster: the part of a row that is a block's."""
    kind = r"layer_norm_(fwd|bwd)_kernelI13__nv_bfloat16S\w*_NS\w*_4HeldILi(\d+)ELi(\d+)EEELb1ELb([01])EE"
    held = re.search(kind, mangled)
    if held is None or held[1] == "fwd" and held[4] == "0":
        return None
    forward, (threads, elements) = held[1] == "fwd", map(int, held.groups()[1:3])
    instructions = counts["instructions" if forward else "longest loop"]
    tensors = 2 if forward else 3  # x and output; both gradients and x
    return instructions * threads / 32 / SLOTS_A_CLOCK, 2 * tensors * threads * elements / BYTES_A_CLOCK


def span(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def fetch(packages: list[str], target: str) -> None:
    """Packages from PyPI, without what they depend on, into a folder of ``build/``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(ROOT / "build" / target), *packages], check=True)


def fetched_toolkit() -> Path:
    """The toolkit, from this machine where it has CUDA 13, or from PyPI."""
    root = toolkit()
    if root is None or int(release(root).split(".")[0]) < 13:
        fetch(TOOLKIT, "cuda")
        root = ROOT / "build/cuda/nvidia/cu13"
    return root


def disassembler() -> str:
    fetched = ROOT / "build/cuobjdump/nvidia/cu13/bin/cuobjdump"
    if found := shutil.which("cuobjdump"):
        return found
    if not fetched.exists():
        fetch(DISASSEMBLER, "cuobjdump")
    return str(fetched)


def main() -> int:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    # The torch that is here, and those whose folders are named.
    torchs = [Path(torch.__file__).parent, *map(Path, sys.argv[1:])]
    root = fetched_toolkit()
    if cutlass() is None:
        fetch([CUTLASS], "cutlass")
    cuobjdump = disassembler()
    console = Console(width=None if sys.stdout.isatty() else 170)
    out = ROOT / "build/gpu"
    out.mkdir(parents=True, exist_ok=True)

    # The longest first, so that they do not end up alone.
    todo = [(source, arch) for source, each in sources(archs()).items() for arch in each]
    todo.sort(key=lambda job: ("_sm" not in job[0].stem, "layer_norm" not in job[0].stem))
    objects = {(source, arch): out / f"{source.stem}.sm_{arch}.o" for source, arch in todo}
    jobs = {(source, arch): command(root, source, [arch], path) for (source, arch), path in objects.items()}
    jobs = {("host code", f"torch {version(t)}"): host_command(root, t) for t in torchs} | jobs
    console.print(f"nvcc {release(root)} of {root}, {len(jobs)} compilations")
    failures, rows, rows_issued = [], [], []
    start = time.perf_counter()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=len(jobs))
        for (source, arch), done, seconds in run_all(jobs, os.cpu_count() or 1):
            progress.advance(bar)
            what = f"host code for {arch}" if source == "host code" else f"{source.name} for sm_{arch}"
            progress.print(f"{what}: {seconds:.0f} s")
            if done.returncode:
                failures.append(f"{what}: {done.stdout}{done.stderr}")
                continue
            if source == "host code":
                continue
            kernels, warnings = compiler_report(done.stderr + done.stdout)
            if not kernels:
                failures.append(f"{what}: no kernel in it")
            failures += [f"{what}: {problem}" for problem in problems(kernels, warnings)]
            sass = subprocess.run(
                [cuobjdump, "--dump-sass", objects[source, arch]], capture_output=True, text=True, check=True
            )
            counts = instruction_counts(sass.stdout)
            groups = defaultdict(list)
            for name, k in kernels.items():
                if name in counts:
                    if arch == "90a":  # the budgets are for it alone: other architectures have other instructions
                        failures += [f"{what}: {problem}" for problem in slipped(name, counts[name])]
                        if clocks := row_clocks(name, counts[name]):
                            rows_issued.append((name, *clocks))
                    groups[kernel_name(name)].append({**k, **counts[name]})
            for name, group in groups.items():
                rows.append([source.name, f"sm_{arch}", name, str(len(group))])
                rows[-1] += [span([k[key] for k in group]) for key in ("registers", "shared", "spilled", *INSTRUCTIONS)]

    table = Table("file", "for", "kernel", "instances", "registers", "shared", "spilled", *INSTRUCTIONS)
    for row in sorted(rows):
        table.add_row(*row)
    for name, issue, memory in sorted(rows_issued, key=lambda r: ("bwd" in r[0], r[2])):
        way = "forward" if "fwd" in name else "backward"
        held = "x".join(re.search(r"HeldILi(\d+)ELi(\d+)", name).groups())
        held += " by each block of a cluster" if "bwd" in name and "ELb1ELb1E" in name else ""
        console.print(f"LayerNorm {way}, bf16, {held} a row: {issue:.0f} clocks to issue, {memory:.0f} for its bytes")
    console.print(table, f"{time.perf_counter() - start:.0f} s")
    for failure in failures:
        console.print(failure, style="red", markup=False, soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
