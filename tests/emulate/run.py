"""Builds, and runs tests/emulated.py under a sanitizer.

python tests/emulate/run.py asan|tsan|plain [what pytest takes]
"""

import os
import subprocess
import sys
from pathlib import Path

from build import ROOT, build

RUNTIMES = {"plain": [], "asan": ["libasan.so", "libstdc++.so"], "tsan": ["libtsan.so", "libstdc++.so"]}


def environment(kind: str, library: Path) -> dict[str, str]:
    """The environment of a process that loads the library: the sanitizer's runtime comes before all others."""
    compiler = os.environ.get("CXX", "c++")
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES[kind]
    ]
    return {
        **os.environ,
        "NNFAST_EMULATED": str(library),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def run(kind: str, library: Path, *args: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/emulated.py"), *args]
    return subprocess.run(command, env=environment(kind, library)).returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], build(sys.argv[1]), *sys.argv[2:]))
