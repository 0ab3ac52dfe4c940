"""benchmarks/gpu_lap.py, rehearsed from end to end on a machine without a GPU: from a copy of the tree, without git and
without a network, in parts."""

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nnfast import backend

ROOT = Path(__file__).parents[1]
NAMES = "layer_norm", "linear_gelu", "adamw", "optimizers", "train_gpt"
NO_EXPECTTEST = """\
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name == "expecttest":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def elsewhere(tmp_path):
    """(the copy's folder, the environment): of the tree what is needed there, its native libraries included."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "docs", "results", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    # As an editable installation maps them.
    for name in ("kernels", "benchmarks"):
        (copy / "nnfast" / name).symlink_to(copy / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "cc", "g++", "gcc", "as", "ld", "nm"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_EXPECTTEST)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NNFAST", "GIT"))}
    env |= {
        "PATH": str(tools),
        "PYTHONPATH": os.pathsep.join((str(copy), str(site))),
        "TORCHDYNAMO_DISABLE": "1",  # other tests compile, which takes minutes
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
    }
    return copy, env


def lap(elsewhere, out, *options):
    copy, env = elsewhere
    command = [sys.executable, "benchmarks/gpu_lap.py", "--rehearse", "--commit", "abc", "--out", str(out), *options]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600)
    log = out / "lap.log"
    return done, done.stdout + done.stderr + (log.read_text()[-5000:] if log.exists() else "")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.skipif(bool(backend.available("cpu")), reason="the rehearsal is of this CPU's kernels")
def test_rehearsal(elsewhere, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    # Time for a few cells.
    done, said = lap(elsewhere, first, "--steps", "doctor", "test", "goals", "--seconds", "75")
    assert done.returncode == 0, said
    done, said = lap(elsewhere, second, "--before", str(first))
    assert done.returncode == 0, said
    found = rows(second / "lap.csv")
    outcomes = {}
    for row in found:
        outcomes.setdefault(row["step"], []).append(row["outcome"])
        assert row["commit"] == "abc" and row["device"] == "rehearsal"
    assert set(outcomes) == {"doctor", "test", "goals", "train", "graphs"}, "what is built is not built again"
    assert all(each[-1] == "ok" and set(each) <= {"ok", "unfinished"} for each in outcomes.values()), said
    assert outcomes["doctor"] == ["ok"], "what was done is not done again"
    files = sorted(path.name for path in second.iterdir())
    assert len(files) <= 8 and {f"{name}.csv" for name in NAMES} <= set(files), files
    for op, shapes in (("layer_norm", {"40x40", "1x40"}), ("linear_gelu", {"40x40x40"}), ("adamw", None)):
        cells = rows(second / f"{op}.csv")
        keys = [(*(r[k] for k in ("shape", "model", "dtype", "direction", "variant", "backend", "provider")),)
                for r in cells]  # fmt: skip
        assert len(keys) == len(set(keys)), "each cell once"
        assert all(r["ms"] for r in cells), [r for r in cells if not r["ms"]]
        assert {r["backend"] for r in cells} == {"", "graph", "cpu"} and {r["commit"] for r in cells} == {"abc"}
        assert shapes is None or {r["shape"] for r in cells} == shapes
        assert cells[0]["dtype"] == "bf16", "what is judged by comes first"


@pytest.mark.skipif(bool(backend.available("cpu")), reason="the rehearsal is of this CPU's kernels")
def test_what_was_built_elsewhere_is_used(elsewhere, tmp_path):
    """A wheel for this Python in dist: its libraries are put in their place, and nothing is built."""
    copy, env = elsewhere
    env["PYTHONPATH"] = str(tmp_path / "site")
    (copy / "dist").mkdir()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    with zipfile.ZipFile(copy / f"dist/nnfast-0-{tag}-{tag}-manylinux.whl", "w") as wheel:
        for library in (copy / "nnfast").rglob("*.so"):
            wheel.write(library, library.relative_to(copy))
            library.unlink()
    for name in ("kernels", "benchmarks"):
        (copy / "nnfast" / name).unlink()
    out = tmp_path / "out"
    done, said = lap(elsewhere, out, "--steps", "build", "doctor")
    assert done.returncode == 0, said
    assert [(row["step"], row["outcome"]) for row in rows(out / "lap.csv")] == [("doctor", "ok")]
    assert "native  built for torch" in (out / "lap.log").read_text()
