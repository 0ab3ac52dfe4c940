"""Installing: from a wheel, without a compiler, beside another torch. No test here uses the checkout's own build."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.served_in_children

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "benchmarks", "nnfast", "setup.py", "pyproject.toml", "MANIFEST.in")
SOURCES += ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
MINOR = "_".join(torch.__version__.split(".")[:2])

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
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy(source, to / name)
    return to


def pip(*args, **env):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What a release uploads, made of a clean copy of the sources."""
    source = copy_sources(tmp_path_factory.mktemp("sources"))
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").iterdir()
    return archive


# Where it is the way of a build that is tested, and not what comes out.
SOONER = {"CXXFLAGS": "-O1"}


def build(tmp_path_factory, sdist: Path, *options, **env) -> Path:
    """A wheel of the sdist, unpacked as a site of its own."""
    base = tmp_path_factory.mktemp("install")
    options = options or ("--no-build-isolation",)
    done = pip("wheel", *options, "--no-deps", "-w", str(base), str(sdist), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = base.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(base / "site")
    return base / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory, sdist):
    return build(tmp_path_factory, sdist)


@pytest.fixture(scope="module")
def site_without_native(tmp_path_factory, sdist):
    return build(tmp_path_factory, sdist, NNFAST_BUILD="torch")


def run(site: Path, code: str = TRY_IT, **env):
    env = {**os.environ, "PYTHONPATH": str(site), **env}
    return subprocess.run([sys.executable, "-c", code], cwd=site.parent, env=env, capture_output=True, text=True)


def test_wheel(site):
    assert sorted(p.name for p in site.iterdir() if p.suffix != ".dist-info") == ["nnfast"]
    assert (site / "nnfast/kernels/__init__.py").is_file() and (site / "nnfast/py.typed").is_file()
    assert list((site / "nnfast").glob(f"_C_{MINOR}.*"))
    assert {p.name for p in (site / "nnfast/lib").iterdir()} == {"libnnfast_cpu.so", f"libnnfast_torch_{MINOR}.so"}
    done = run(site)
    assert done.returncode == 0, done.stderr
    path, kernels = done.stdout.split()
    assert Path(path).is_relative_to(site) and kernels != "False"


def as_if(site: Path, to: Path, version: str) -> Path:
    """A copy of the site, for whose processes torch is of another version."""
    other = shutil.copytree(site, to / "site")
    (other / "sitecustomize.py").write_text(f"import torch\ntorch.__version__ = {version!r}\n")
    return other


def said(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if "nnfast" in line]


def test_patch_and_local_part_of_the_version_do_not_matter(site, tmp_path):
    done = run(as_if(site, tmp_path, MINOR.replace("_", ".") + ".99+cu999"))
    assert done.returncode == 0 and not said(done), done.stderr
    assert done.stdout.split()[1] not in ("False", "None")


def test_built_for_another_torch(site, tmp_path):
    """Noticed before the extension is loaded, said in one line, and left unused."""
    other = as_if(site, tmp_path, "2.0.0")
    (extension,) = (other / "nnfast").glob("_C_*")
    extension.write_bytes(b"loading this would fail")
    done = run(other)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"
    assert len(said(done)) == 1 and "2.0.0" in said(done)[0] and MINOR.replace("_", ".") in said(done)[0]
    assert "install nnfast" not in said(done)[0].replace("install nnfast again, from its folder", "")


DOCTOR = "import runpy; runpy.run_module('nnfast', run_name='__main__')"


def test_an_unknown_newer_torch(site, tmp_path):
    """The newest kernels serve where they pass their self-test, which runs once; the doctor says so."""
    other = as_if(site, tmp_path, "2.999.0")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run(other, **cache)
    assert done.returncode == 0 and not said(done), done.stderr
    assert done.stdout.split()[1] not in ("False", "None")
    doctor = run(other, DOCTOR, **cache).stdout
    assert "passed their self-test" in doctor and "2.999.0" in doctor
    # What is kept is believed, for these files and this torch alone.
    (kept,) = (tmp_path / "cache/nnfast").iterdir()
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "failure": "as kept"}))
    assert "as kept" in run(other, **cache).stderr
    (other / "sitecustomize.py").write_text("import torch\ntorch.__version__ = '2.998.0'\n")
    assert not said(run(other, **cache))


BREAK = {
    # A symbol that a newer torch has no more; and one whose meaning changed.
    "does not load": "for path in here.glob('lib/libnnfast_torch*'): path.write_bytes(b'not a library')",
    "wrong answer": "import torch; f = torch.nn.functional.layer_norm\n"
    "torch.nn.functional.layer_norm = lambda *args: f(*args) + 0.01",
}


@pytest.mark.parametrize("how", BREAK)
def test_an_unknown_newer_torch_that_differs(site, tmp_path, how):
    """One line, and torch serves: the process itself never loads what failed."""
    other = as_if(site, tmp_path, "2.999.0")
    with (other / "sitecustomize.py").open("a") as file:
        file.write(f"from pathlib import Path\nhere = Path({str(other / 'nnfast')!r})\n{BREAK[how]}\n")
    done = run(other, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0 and done.stdout.split()[1] == "False", done.stderr
    assert len(said(done)) == 1 and "fail their self-test" in said(done)[0], done.stderr


def test_every_op_has_its_known_answer():
    from nnfast import backend, selftest

    assert set(selftest.ANSWERS) == set(backend.native.ops())


def test_extension_that_does_not_load(site, tmp_path):
    other = shutil.copytree(site, tmp_path / "site")
    (extension,) = (other / "nnfast").glob("_C_*")
    extension.write_bytes(b"not a library")
    done = run(other)
    assert done.returncode == 0 and done.stdout.split()[1] == "False" and "could not be loaded" in done.stderr


NAMES = re.findall(r'_found\(\s*"([\w.]+)", "(\w+)"', (ROOT / "nnfast/_torch.py").read_text())

# Takes the names away, imports what is asked for, and gives them back, for torch needs them itself.
WITHOUT = """
import importlib, sys, torch, torch.fx, torch.nn, torch.optim, torch.jit._builtins, torch.autograd.forward_ad
names = {names!r}
taken = []
for owner, name in names:
    try:
        owner = importlib.import_module(owner)
    except ImportError:
        owner = torch.optim.Optimizer
    if hasattr(owner, name):
        taken.append((owner, name, owner.__dict__[name]))
        delattr(owner, name)
assert taken
import nnfast._torch
if {whole}:
    import nnfast
for owner, name, value in taken:
    setattr(owner, name, value)
"""


def test_private_names_of_torch(site_without_native):
    """With each of them gone, and with all, nnfast imports and runs."""
    assert len(NAMES) > 8
    for name in NAMES:
        done = run(site_without_native, "import sys\nsys.modules['nnfast'] = type(sys)('nnfast')\n"
                   f"sys.modules['nnfast'].__path__ = [{str(site_without_native / 'nnfast')!r}]\n"
                   + WITHOUT.format(names=[name], whole=False))  # fmt: skip
        assert done.returncode == 0 or "assert taken" in done.stderr, (name, done.stderr)
    code = WITHOUT.format(names=NAMES, whole=True) + TRY_IT
    done = run(site_without_native, code)
    assert done.returncode == 0, done.stderr


def test_private_names_stand_in_one_file():
    private = re.compile(r"from torch[\w.]* import (.*, )?_(?!_)\w|from torch[\w.]*\._(?!_)|torch(\.\w+)*\._(?!_)\w")
    for path in (ROOT / "nnfast").rglob("*.py"):
        lines = path.read_text().splitlines()
        found = [line for line in lines if private.search(line.split("#")[0])]
        assert path.name == "_torch.py" or not found, (path, found)


def test_without_native_kernels(site_without_native):
    """What `NNFAST_BUILD=torch pip install .` leaves: everything works, by torch's ops, and the doctor says so."""
    assert not list((site_without_native / "nnfast").glob("_C_*"))
    done = run(site_without_native)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.split()[1] == "False"
    doctor = run(site_without_native, "import runpy; runpy.run_module('nnfast', run_name='__main__')")
    assert "without native kernels" in doctor.stdout
    forced = run(site_without_native, "import nnfast\nwith nnfast.use_backend('cpu'): pass")
    assert "RuntimeError" in forced.stderr and "without native kernels" in forced.stderr


def test_with_build_isolation(tmp_path_factory, sdist):
    """pip makes an environment without torch for the build: the torch it installs beside is found all the same."""
    if pip("download", "--no-deps", "-d", str(tmp_path_factory.mktemp("net")), "setuptools>=77", "ninja").returncode:
        pytest.skip("pip finds no setuptools and ninja to build with from here")
    site = build(tmp_path_factory, sdist, "--use-pep517", **SOONER)
    assert list((site / "nnfast").glob(f"_C_{MINOR}.*"))


def test_editable(tmp_path):
    """What `pip install -e .` asks of the build: the libraries lie in the sources then."""
    source = copy_sources(tmp_path)
    hook = "from setuptools import build_meta; build_meta.build_editable('.')"
    env = {**os.environ, **SOONER}
    done = subprocess.run([sys.executable, "-c", hook], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(source)
    assert done.returncode == 0 and done.stdout.split()[1] not in ("False", "None"), done.stderr


def test_no_torch_to_build_for(tmp_path):
    """One line that says what to do."""
    source = copy_sources(tmp_path)
    code = "import sys, importlib.util as u, subprocess as s; find = u.find_spec\n"
    code += "u.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
    code += "s.run = lambda *a, **k: type('Done', (), {'stdout': ''})\n"
    code += "sys.argv = ['setup.py', '-q', 'build']; exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    done = subprocess.run([sys.executable, "-c", "__file__ = 'setup.py'\n" + code], cwd=source, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode != 0 and "install torch first" in done.stderr.splitlines()[-1], done.stderr


def test_cuda_without_cutlass(tmp_path):
    """The build goes on without the kernel that needs it, and says so in one line."""
    source = copy_sources(tmp_path)
    nvcc = tmp_path / "cuda/bin/nvcc"
    for path in (nvcc, tmp_path / "cuda/include/cuda_runtime.h", tmp_path / "cuda/lib64/libcudart.so"):
        path.parent.mkdir(parents=True)
        path.touch()
    nvcc.write_text("#!/bin/sh\necho release 13.0,\n")
    nvcc.chmod(0o755)
    code = """
import setuptools
setuptools.setup = lambda **options: None
import setup
setup.cuda.cutlass = lambda: None
todo = setup.plan(setup.Path("build"), [setup.Torch(setup.Path("torch"), "2.13.0+cu130", "13.0")])
print(*todo.lines, sep="\\n")
"""
    env = {**os.environ, "CUDA_HOME": str(nvcc.parents[1]), "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "CUTLASS" in done.stderr, done.stderr
    assert "_sm90a" not in done.stdout and "NNFAST_SM90A" not in done.stdout
    assert "libnnfast_cuda_13.so" in done.stdout and "libnnfast_torch_2_13_cuda_13.so" in done.stdout


# Interpreters of environments with the torches of the wheels, which CI does not download: it has 2.13 alone.
ENVIRONMENTS = [path for path in os.environ.get("NNFAST_ENVIRONMENTS", "").split(os.pathsep) if path]


@pytest.mark.parametrize("python", ENVIRONMENTS or ["none"])
def test_wheels(python, tmp_path):
    """Each wheel in an environment with its Python and one of its torches, without a compiler on the PATH."""
    if python == "none":
        pytest.skip("NNFAST_ENVIRONMENTS names no environments to try the wheels of dist/ in")
    about = subprocess.run(
        [python, "-c", "import sys, torch; print(f'cp{sys.version_info[0]}{sys.version_info[1]}', torch.__version__)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tag, version = about.stdout.split()
    (wheel,) = (ROOT / "dist").glob(f"*-{tag}-{tag}-*.whl")
    assert "manylinux_2_28" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "nowhere").mkdir()
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": str(tmp_path / "nowhere"), "HOME": str(tmp_path)}
    code = TRY_IT + "print(backend.native.built_for); from nnfast import selftest; selftest.main()"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "could not be loaded" not in done.stderr, done.stderr
    path, kernels, built_for = done.stdout.split()
    assert path.startswith(str(tmp_path)) and kernels not in ("False", "None")
    assert built_for.split(".")[:2] == version.split(".")[:2]


def test_no_compiler(tmp_path):
    """One line that says what is missing and how to do without, and nothing installed."""
    source = copy_sources(tmp_path)
    target = tmp_path / "target"
    done = pip("install", "--no-build-isolation", "--no-deps", "--target", str(target), str(source), CXX="no-such-c++")
    assert done.returncode != 0 and not target.exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if "no-such-c++" in line]
    assert said and "NNFAST_BUILD=torch pip install" in said[0]


def test_a_build_that_fails_installs_nothing(tmp_path):
    source = copy_sources(tmp_path)
    (source / "csrc/cpu/avx2.cpp").write_text("#error broken on purpose\n")
    target = tmp_path / "target"
    done = pip("install", "--no-build-isolation", "--no-deps", "--target", str(target), str(source))
    assert done.returncode != 0 and not target.exists()
