"""What the tests would miss: breaks the kernels in one place at a time and sees that tests/emulated.py turns red.

    python tests/emulate/mutants.py [words of a mutant's name]

Each mutant is built and run under AddressSanitizer, and, where that is green, under ThreadSanitizer. Prints a table,
and fails where a mutant lives.
"""

# ruff: noqa: E501
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from run import environment

from build import ROOT, build, commands, compile_and_link

# name, file, what stands there, what stands there instead, and which tests look.
LAYER_NORM, GELU, ADAMW, CLIP, ALL = "layer_norm", "gelu", "adamw", "clipping", "layer_norm or gelu"
MUTANTS = [
    # Barriers, in the order of the files.
    ("no barrier in sum_over_threads", "device.cuh", "    __syncthreads();\n#pragma unroll\n    for (int k = 0; k < K; ++k) {\n      float sum", "#pragma unroll\n    for (int k = 0; k < K; ++k) {\n      float sum", LAYER_NORM),
    ("no barrier in sum_tile", "device.cuh", "  __syncthreads();\n  if (line >= K) return;", "  if (line >= K) return;", ALL),
    ("no barrier in sum_parts", "device.cuh", "  __syncthreads();\n  if (line ||", "  if (line ||", ALL),
    ("one slot for the sums of all rows", "layer_norm.cu", "sum_over_threads<H::kThreads>(s, slot)", "sum_over_threads<H::kThreads>(s)", LAYER_NORM),
    ("one slot for the sums of all a cluster's rows", "layer_norm.cu", "(cluster, s, slot)", "(cluster, s, 0)", LAYER_NORM),
    ("no barrier of a cluster's sums", "device.cuh", "  cluster.sync();\n#pragma", "#pragma", LAYER_NORM),
    ("a barrier of one block of a cluster", "device.cuh", "  cluster.sync();\n#pragma", "  __syncthreads();\n#pragma", LAYER_NORM),
    ("blocks of a cluster that may not run yet", "layer_norm.cu", "    cluster.sync();  // all", "    // all", LAYER_NORM),
    ("rows that have not come yet", "layer_norm.cu", "    if (Vectors) __pipeline_wait_prior(0);\n", "", LAYER_NORM),
    ("rows that are no group", "layer_norm.cu", "    if (Vectors) __pipeline_commit();\n", "", LAYER_NORM),
    ("rows that come too early", "layer_norm.cu", "    if (row < b.rows) {\n      if constexpr (Vectors) {", "    fetch(row + stride);\n    if (row < b.rows) {\n      if constexpr (Vectors) {", LAYER_NORM),
    ("fetches past a row", "device.cuh", "      if (inside(k * V))\n", "", LAYER_NORM),
    ("fetches past the last row", "layer_norm.cu", "const auto fetch = [&](int64_t row) {\n    if (row < b.rows) {", "const auto fetch = [&](int64_t row) {\n    {", LAYER_NORM),
    ("no wait for the kernel before", "device.cuh", "  after_the_kernel_before();\n", "", ALL),
    ("no barrier between groups", "layer_norm.cu", "      __syncthreads();\n    }\n    if (group !=", "    }\n    if (group !=", LAYER_NORM),
    ("no barrier before the step's scalars", "optimizer.cuh", "  __syncthreads();\n", "", ADAMW),
    ("no barrier before the norm's last block", "clip_grad.cu", "  __syncthreads();\n  if (!last)", "  if (!last)", CLIP),
    ("no barrier in the norm's sum", "clip_grad.cu", "    __syncthreads();\n", "", CLIP),
    # Shuffles.
    ("one shuffle less", "device.cuh", "Threads / 2; offset > 0", "Threads / 2; offset > 1", LAYER_NORM),
    ("lanes that write to no block", "device.cuh", "  if (lane < blocks)\n", "  if (lane < 2)\n", LAYER_NORM),
    ("lanes that do not shuffle", "layer_norm.cu", "  const int64_t row = wanted < f.rows ? wanted : f.rows - 1;", "  const int64_t row = wanted;\n  if (row >= f.rows) return;", LAYER_NORM),
    # Bounds.
    ("loads of vectors past a row", "device.cuh", "if (inside(k * V)) cuda::load<V>", "cuda::load<V>", LAYER_NORM),
    ("loads of elements past a row", "device.cuh", "inside(e) ? Out(row[column(e)]) : Out(0)", "Out(row[column(e)])", LAYER_NORM),
    ("stores of vectors past a row", "device.cuh", "if (inside(k * V)) store_global", "store_global", LAYER_NORM),
    ("stores of elements past a row", "device.cuh", "        if (inside(e)) row[column(e)] = U(x[e]);", "        row[column(e)] = U(x[e]);", LAYER_NORM),
    ("lanes past a row in the variance", "device.cuh", "if (vectors && !inside(k * V)) continue;", "", LAYER_NORM),
    ("elements past a row in the variance", "device.cuh", "if (vectors || inside(k * V + j)) body", "body", LAYER_NORM),
    ("rows past the last, forward", "layer_norm.cu", "  if (wanted >= f.rows) return;\n", "", LAYER_NORM),
    ("rows past the last are read, backward", "layer_norm.cu", "    if (row < b.rows) {\n      if constexpr (Vectors) {", "    {\n      if constexpr (Vectors) {", LAYER_NORM),
    ("rows past the last are written, backward", "layer_norm.cu", "    if (row >= b.rows) continue;\n", "", LAYER_NORM),
    ("long rows, a vector too far", "layer_norm.cu", "i < n; i += kLongBlock * V", "i <= n; i += kLongBlock * V", LAYER_NORM),
    ("long rows, an element too far", "layer_norm.cu", "i < n; i += kLongBlock) body", "i <= n; i += kLongBlock) body", LAYER_NORM),
    ("a tile's rows", "device.cuh", "row < rows; row += int64_t(gridDim.y)", "row <= rows; row += int64_t(gridDim.y)", ALL),
    ("columns of the second step", "device.cuh", "if (line || column >= n) return;", "if (line) return;", ALL),
    ("partial sums of the second step", "device.cuh", "k < count; k += kSumLines", "k <= count; k += kSumLines", ALL),
    ("vectors of GELU", "linear_gelu.cu", "if (i < vectors) body", "if (i <= vectors) body", GELU),
    ("elements of GELU", "linear_gelu.cu", "V > 1 && rest < count", "V > 1 && rest <= count", GELU),
    ("no elements after the vectors of GELU", "linear_gelu.cu", "V > 1 && rest < count", "V > 1 && rest < 0", GELU),
    ("partial sums of the norm", "clip_grad.cu", "i < gridDim.x; i +=", "i <= gridDim.x; i +=", CLIP),
    ("every block of the norm the last", "clip_grad.cu", " == gridDim.x - 1;", " < gridDim.x;", CLIP),
    ("a norm that many threads write", "clip_grad.cu", "  if (threadIdx.x != 0) return;\n", "", CLIP),
    ("elements of AdamW", "optimizer.cuh", "for (; i < end; i", "for (; i <= end; i", ADAMW),
    ("vectors of AdamW", "optimizer.cuh", "k < whole; k +=", "k <= whole; k +=", ADAMW),
    # 16-byte accesses.
    ("rows of any size by vectors", "layer_norm.cu", "return size % kVector<T> == 0 && stride", "return stride", LAYER_NORM),
    ("rows any way apart by vectors", "layer_norm.cu", "== 0 && stride % kVector<T> == 0", "== 0", LAYER_NORM),
    ("inputs anywhere by vectors", "layer_norm.cu", " && aligned(f.input)", "", LAYER_NORM),
    ("weights anywhere by vectors", "layer_norm.cu", " && aligned(f.weight)", "", LAYER_NORM),
    ("gradients anywhere by vectors", "layer_norm.cu", " && aligned(b.grad_out)", "", LAYER_NORM),
    ("GELU anywhere by vectors", "linear_gelu.cu", "vectors = aligned(input) && aligned(output)", "vectors = true", GELU),
    ("AdamW anywhere by vectors", "optimizer.cuh", "if (aligned) {", "if (true) {", ADAMW),
    # What only some launches do.
    ("shared memory that nobody asked for", "layer_norm.cu", "if (bytes <= 32 << 10) return cudaSuccess;", "return cudaSuccess;", LAYER_NORM),
    ("clusters of what was compiled for none", "layer_norm.cu", "    if (!compiled_for_hopper(kernel)) return 0;\n", "", LAYER_NORM),
    ("a second kernel that overlaps where it cannot", "device.cuh", "1, compiled_for_hopper(kernel)}", "1, true}", LAYER_NORM),
    ("nobody behind a cluster that is refused", "layer_norm.cu", "      if (const auto e = launch_long()) return e;\n    }\n  } else", "    }\n  } else", LAYER_NORM),
    ("a count that every chunk advances", "optimizer.cuh", " == t.chunks - 1) {", " < t.chunks) {", ADAMW),
    ("GELU's derivative elsewhere", "linear_gelu.cu", "float>(pre[j]);", "float>(pre[j] + 1);", GELU),
]  # fmt: skip


def red(kind: str, library: Path, tests: str) -> str:
    """The first line that says why it turned red, or ""."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--capture=no", "-p", "no:cacheprovider", "-k", tests]
    done = subprocess.run(
        [*command, str(ROOT / "tests/emulated.py")],
        env={**environment(kind, library), "NNFAST_EMULATE": "slice"}, capture_output=True, text=True,
    )  # fmt: skip
    if not done.returncode:
        return ""
    said = (done.stdout + done.stderr).splitlines()
    words = "AddressSanitizer:", "runtime error:", "ThreadSanitizer: data race", "emulate:", "AssertionError", "E  "
    return next((line.strip() for word in words for line in said if word in line), f"exit status {done.returncode}")


def main() -> int:
    wanted = sys.argv[1:]
    kinds = "asan", "tsan"
    checked = set()  # what is green with nothing broken: else every mutant would look caught
    lived = 0
    for name, file, old, new, tests in MUTANTS:
        if not all(word in name for word in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "csrc")
            shutil.copytree(ROOT / "csrc", source)
            path = source / "cuda" / file
            text = path.read_text()
            if text.count(old) != 1:
                print(f"{name}: stands {text.count(old)} times in {file}")
                lived += 1
                continue
            path.write_text(text.replace(old, new))
            says = ""
            for kind in kinds:
                if (kind, tests) not in checked and (says := red(kind, build(kind), tests)):
                    sys.exit(f"{kind}, nothing broken: {says}")
                checked.add((kind, tests))
                base = commands(kind, source, ROOT / "build/emulate")
                wanted_tests = {
                    "layer_norm.o": LAYER_NORM, "linear_gelu.o": GELU, "adamw.o": ADAMW, "clip_grad.o": CLIP,
                }  # fmt: skip
                own = {
                    o: Path(folder, o.name) for o in base
                    if file == f"{o.stem}.cu" or (file.endswith(".cuh") and o.name in wanted_tests and
                                                  wanted_tests[o.name] in tests)
                }  # fmt: skip
                library = Path(folder, f"{kind}.so")
                compile_and_link(
                    kind, {own[o]: base[o] for o in own}, [own.get(o, o) for o in base], library
                )  # fmt: skip
                if says := red(kind, library, tests):
                    break
            print(f"{name} | {kind if says else 'LIVES'} | {says[:150]}", flush=True)
            lived += not says
    return 1 if lived else 0


if __name__ == "__main__":
    os.environ.setdefault("NNFAST_EMULATE", "slice")
    sys.exit(main())
