"""Installing: from a wheel, without a compiler, beside another torch. No test here uses the checkout's own build."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "benchmarks", "nnfast", "setup.py", "pyproject.toml", "README.md", "LICENSE")

TRY_IT = """
import warnings; warnings.simplefilter("error", DeprecationWarning)
import torch, nnfast, nnfast.nn as nn, nnfast.optim as optim, nnfast.kernels
from nnfast import backend
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8))
optimizer = optim.AdamW(model.parameters())
model(torch.randn(4, 6)).square().sum().backward()
optimizer.step()
print(nnfast.__file__)
print(backend.native is not None and backend.native.cpu_kernels())
"""


def copy_sources(to: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "_built_for.txt")
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy(source, to / name)
    return to


def pip(*args, **env):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def build(tmp_path_factory, **env) -> Path:
    """A wheel from a clean copy of the sources, unpacked as a site of its own."""
    base = tmp_path_factory.mktemp("install")
    (base / "source").mkdir()
    source = copy_sources(base / "source")
    done = pip("wheel", "--no-build-isolation", "--no-deps", "-w", str(base), str(source), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = base.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(base / "site")
    return base / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory)


@pytest.fixture(scope="module")
def site_without_native(tmp_path_factory):
    return build(tmp_path_factory, NNFAST_BACKEND="torch")


def run(site: Path, code: str = TRY_IT, **env):
    env = {**os.environ, "PYTHONPATH": str(site), **env}
    return subprocess.run([sys.executable, "-c", code], cwd=site.parent, env=env, capture_output=True, text=True)


def test_wheel(site):
    assert sorted(p.name for p in site.iterdir() if p.suffix != ".dist-info") == ["nnfast"]
    assert (site / "nnfast/kernels/__init__.py").is_file() and (site / "nnfast/py.typed").is_file()
    assert list((site / "nnfast").glob("_C.*"))
    done = run(site)
    assert done.returncode == 0, done.stderr
    path, kernels = done.stdout.split()
    assert Path(path).is_relative_to(site) and kernels != "False"


def test_built_for_another_torch(site, tmp_path):
    """Noticed before the extension is loaded, said in one line, and left unused."""
    other = shutil.copytree(site, tmp_path / "site")
    (other / "nnfast/_built_for.txt").write_text("2.0.0")
    (extension,) = (other / "nnfast").glob("_C.*")
    extension.write_bytes(b"loading this would fail")
    done = run(other)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"
    said = [line for line in done.stderr.splitlines() if "nnfast" in line]
    assert len(said) == 1 and "2.0.0" in said[0] and torch.__version__ in said[0]


def test_extension_that_does_not_load(site, tmp_path):
    other = shutil.copytree(site, tmp_path / "site")
    (extension,) = (other / "nnfast").glob("_C.*")
    extension.write_bytes(b"not a library")
    done = run(other)
    assert done.returncode == 0 and done.stdout.split()[1] == "False" and "could not be loaded" in done.stderr


def test_without_native_kernels(site_without_native):
    """What `NNFAST_BACKEND=torch pip install .` leaves: everything works, by torch's ops, and the doctor says so."""
    assert not list((site_without_native / "nnfast").glob("_C.*"))
    done = run(site_without_native)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.split()[1] == "False"
    doctor = run(site_without_native, "import runpy; runpy.run_module('nnfast', run_name='__main__')")
    assert "without native kernels" in doctor.stdout
    forced = run(site_without_native, "import nnfast\nwith nnfast.use_backend('cpu'): pass")
    assert "RuntimeError" in forced.stderr and "without native kernels" in forced.stderr


def test_no_compiler(tmp_path):
    """One line that says what is missing and how to do without, and nothing installed."""
    source = copy_sources(tmp_path)
    target = tmp_path / "target"
    done = pip("install", "--no-build-isolation", "--no-deps", "--target", str(target), str(source), CXX="no-such-c++")
    assert done.returncode != 0 and not target.exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if "no-such-c++" in line]
    assert said and "NNFAST_BACKEND=torch pip install" in said[0]


def test_a_build_that_fails_installs_nothing(tmp_path):
    source = copy_sources(tmp_path)
    (source / "csrc/cpu/avx2.cpp").write_text("#error broken on purpose\n")
    target = tmp_path / "target"
    done = pip("install", "--no-build-isolation", "--no-deps", "--target", str(target), str(source))
    assert done.returncode != 0 and not target.exists()
