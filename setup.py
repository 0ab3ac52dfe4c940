"""Builds what is compiled, in layers, each of which knows only those above it:

  nnfast/lib/libnnfast_cpu.so             the CPU kernels; no torch, no Python
  nnfast/lib/libnnfast_torch_2_13.so      the ops over torch 2.13: one for each minor version of torch
  nnfast/_C_2_13.cpython-311-....so       the way in from Python: one for each minor version of both
  nnfast/lib/libnnfast_cuda_13.so         the CUDA kernels, where there is a toolkit; no torch
  nnfast/lib/libnnfast_torch_2_13_cuda_13.so    their way in, loaded where torch has that CUDA

pip install .                       for the torch that is installed
NNFAST_BUILD=torch pip install .    nothing of it: every call is then torch's own
NNFAST_TORCH=/a/torch:/b/torch      for other torches than that: folders with the include and lib of each. None is
                                    imported, so any will do, and make wheel builds for several at once
NNFAST_WHEEL=1                      to be carried to other machines: runs with an older glibc than that of this one
NNFAST_CUDA_ARCH="90a"              where torch has CUDA and a toolkit is there: for these of csrc/cuda/compile.py's
                                    architectures, like "80;90a"
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc/cuda"))
import compile as cuda  # noqa: E402

WITHOUT = "install without native kernels: NNFAST_BUILD=torch pip install ."
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"


@dataclass
class Torch:
    folder: Path
    version: str
    cuda: str | None  # the version it was built with

    @classmethod
    def at(cls, folder: Path) -> "Torch":
        said = runpy.run_path(str(folder / "version.py"))
        return cls(folder, said["__version__"], said.get("cuda"))

    @property
    def minor(self) -> str:
        return "_".join(re.match(r"(\d+)\.(\d+)", self.version).groups())


def torches() -> list[Torch]:
    """The torches to build for; looked at, not imported."""
    if named := os.environ.get("NNFAST_TORCH"):
        return [Torch.at(Path(folder)) for folder in named.split(os.pathsep)]
    if spec := importlib.util.find_spec("torch"):
        return [Torch.at(Path(spec.origin).parent)]
    # In an environment that pip made for this build alone, the one that is installed into is hidden: ask for it.
    look = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"
    found = subprocess.run([sys.executable, "-I", "-c", look], capture_output=True, text=True).stdout.strip()
    if not found:
        sys.exit("nnfast compiles against the torch it will run with, and there is none here: install torch first (and "
                 f"pass --no-build-isolation where your installer is not pip), or {WITHOUT}")  # fmt: skip
    return [Torch.at(Path(found).parent)]


def say(what: str) -> None:
    print(f"nnfast: {what}", file=sys.stderr)


def cuda_toolkit(torches: list[Torch]) -> Path | None:
    """The toolkit to build the CUDA kernels with, or None where they are not built."""
    asked = "NNFAST_CUDA_ARCH" in os.environ
    wanted = {torch.cuda.split(".")[0] for torch in torches if torch.cuda}
    if not wanted:
        if asked:
            sys.exit(f"NNFAST_CUDA_ARCH is set, and torch {torches[0].version} was built without CUDA")
        return None
    root = cuda.toolkit()
    if root is None:
        said = f"no CUDA toolkit (CUDA_HOME, nvcc), and torch {torches[0].version} has CUDA {torches[0].cuda}"
        if asked:
            sys.exit(f"NNFAST_CUDA_ARCH is set, and there is {said}")
        say(f"{said}; building without CUDA kernels")
        return None
    if cuda.release(root).split(".")[0] not in wanted:
        sys.exit(f"torch {torches[0].version} was built with CUDA {torches[0].cuda}, and the toolkit at {root} is "
                 f"{cuda.release(root)}: set CUDA_HOME to one of the same major version")  # fmt: skip
    return root


class Plan:
    """The commands, and which file each makes of which: written down for Ninja, which runs those that are due."""

    def __init__(self, base: Path):
        self.base, self.library_folder, self.libraries = base, base / "lib.native", []
        environment = " ".join(os.environ.get(name, "") for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS"))
        self.compiler = shlex.split(os.environ.get("CXX", "c++"))
        self.flags = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-g0", "-Wall", "-Wno-maybe-uninitialized"]
        self.flags += shlex.split(environment)
        self.link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        self.everywhere = []  # objects that every library takes in
        self.lines = [
            f"builddir = {base}",
            "rule compile\n  command = $cmd\n  description = $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cmd\n  description = $out",
        ]

    def step(self, rule: str, out: Path, inputs: list, command: list) -> Path:
        made, *of = (re.sub(r"[$ :]", r"$\g<0>", str(path)) for path in (out, *inputs))
        command = shlex.join(map(str, command)).replace("$", "$$")
        self.lines.append(f"build {made}: {rule} {' '.join(of)}\n  cmd = {command}")
        return out

    def compile(self, room: str, source: str, *flags) -> Path:
        out = self.base / f"temp.{room}" / f"{source}.o".replace(".cpp.o", ".o")
        command = [*self.compiler, *self.flags, *flags, "-MMD", "-MF", f"{out}.d", "-c", source, "-o", out]
        return self.step("compile", out, [source], command)

    def link(self, name: str, objects: list[Path], *flags) -> Path:
        out = self.library_folder / "nnfast" / name
        self.libraries.append(out)
        objects = [*objects, *self.everywhere]
        flags = [*objects, *self.link_flags, *flags, "-o", out]
        return self.step("link", out, objects, [*self.compiler, "-shared", f"-Wl,-soname,{out.name}", *flags])

    def run(self) -> None:
        file = self.base / f"{PYTHON}.ninja"
        self.base.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(self.lines) + "\n")
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else [shutil.which("ninja")]
        if ninja == [None]:
            sys.exit("nnfast is built with Ninja: pip install ninja")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*ninja, "-f", file, *jobs]).returncode:
            sys.exit("nnfast does not compile: see above")


def sources(room: str) -> list[str]:
    return sorted(map(str, Path("csrc", room).glob("*.cpp")))


def plan(base: Path, torches: list[Torch]) -> Plan:
    todo = Plan(base)
    here, beside = "-Wl,-rpath,$ORIGIN", "-Wl,-rpath,$ORIGIN/lib"
    if os.environ.get("NNFAST_WHEEL"):
        todo.everywhere = [todo.compile("kernels", "csrc/glibc.cpp")]
        wrapped = re.findall(r"^OLD\(\w+, (\w+)", Path("csrc/glibc.cpp").read_text(), re.MULTILINE)
        todo.link_flags += ["-Wl,-s", *(f"-Wl,--wrap={function}" for function in wrapped)]
    # The kernels' objects, and whatever includes torch. What the libraries offer one another is in namespace nnfast.
    kernels = [s for s in sources("cpu") if Path(s).name.startswith("avx")]
    objects = [todo.compile("kernels", source, "-fvisibility=hidden") for source in kernels]
    cpu = todo.link("lib/libnnfast_cpu.so", objects, "-Wl,--no-undefined")
    toolkit, cuda_kernels = cuda_toolkit(torches), None
    if toolkit:
        release = cuda.release(toolkit).split(".")[0]
        files = cuda.sources(cuda.archs())
        hopper = "90a" in cuda.archs() and cuda.cutlass() is not None
        if "90a" in cuda.archs() and not hopper:
            say("no CUTLASS, so Linear+GELU on Hopper gets no kernel of its own; "
                f"for it: pip install --no-deps {cuda.CUTLASS}")  # fmt: skip
            files = {source: archs for source, archs in files.items() if "_sm90a" not in source.stem}
        objects = []
        for source, archs in files.items():
            out = base / "temp.cuda" / f"{source.name}.o"
            command = cuda.command(toolkit, source, archs, out, ptx=True)
            objects.append(todo.step("compile", out, [source], [*command, "-MD", "-MF", f"{out}.d"]))
        runtime = next(p for name in ("lib64", "lib") for p in sorted((toolkit / name).glob("libcudart.so*")))
        cuda_kernels = todo.link(f"lib/libnnfast_cuda_{release}.so", objects, runtime)
    exports = Path(__file__).resolve().parent / "csrc/exports.map"
    for torch in torches:
        include = torch.folder / "include"
        headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        # OpenMP's runtime is torch's own, found at load time: linking another would bring a second pool of threads.
        headers += ["-fopenmp", "-fno-semantic-interposition"]
        libraries = [f"-L{torch.folder}/lib", "-lc10", "-ltorch_cpu"]
        room = f"torch-{torch.version}"
        glue = [s for s in sources("cpu") if s not in kernels] + sources("ops")
        objects = [todo.compile(room, source, *headers) for source in glue]
        name = f"lib/libnnfast_torch_{torch.minor}"
        ops = todo.link(f"{name}.so", [*objects, cpu], f"-Wl,--version-script={exports}", *libraries, here)
        module = f"_C_{torch.minor}"
        headers += [f"-I{sysconfig.get_path('include')}", f"-DNNFAST_INIT=PyInit_{module}", "-fvisibility=hidden"]
        objects = [todo.compile(f"{room}-{PYTHON}", source, *headers) for source in sources("gate")]
        todo.link(
            module + sysconfig.get_config_var("EXT_SUFFIX"), [*objects, ops], *libraries, "-ltorch_python", beside
        )
        if toolkit and torch.cuda and torch.cuda.split(".")[0] == release:
            headers += [f"-I{toolkit}/include", *["-DNNFAST_SM90A"] * hopper]
            objects = [todo.compile(room, source, *headers) for source in sources("cuda")]
            libraries += ["-lc10_cuda", runtime]
            whole = "-Wl,--no-undefined"  # what is missing is said here, and not at a user's import
            todo.link(f"{name}_cuda_{release}.so", [*objects, ops, cuda_kernels], whole, *libraries, here)
    return todo


def native() -> dict:
    """The extensions and their build command, or nothing where the user asked for none."""
    if os.environ.get("NNFAST_BUILD") == "torch":
        return {}
    if not sys.platform.startswith("linux"):
        say("native kernels are built on Linux alone; installing without")
        return {}

    class Build(build_ext):
        def run(self):
            compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
            if not shutil.which(compiler):
                sys.exit(
                    f"nnfast needs a C++ compiler and found no '{compiler}': install one (Debian: g++), or {WITHOUT}"
                )
            if not Path(sysconfig.get_path("include"), "Python.h").exists():
                sys.exit(f"nnfast needs Python's headers, Python.h: install them (Debian: python3-dev), or {WITHOUT}")
            todo = plan(Path(self.get_finalized_command("build").build_base), torches())
            todo.run()
            package = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
            self.built = {}
            for out in todo.libraries:
                to = package / out.relative_to(todo.library_folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(out, to.with_suffix(".new"))
                os.replace(to.with_suffix(".new"), to)  # a process that has the old one open keeps it
                self.built[str(to)] = str(to)

        def get_outputs(self):
            return list(self.built)

        def get_output_mapping(self):
            return self.built if self.editable_mode else {}

    return {"ext_modules": [Extension("nnfast._C", [])], "cmdclass": {"build_ext": Build}}


setup(
    packages=["nnfast", "nnfast.nn", "nnfast.nn.utils", "nnfast.optim", "nnfast.kernels", "nnfast.benchmarks"],
    package_dir={"nnfast": "nnfast", "nnfast.kernels": "kernels", "nnfast.benchmarks": "benchmarks"},
    package_data={"nnfast": ["py.typed"]},
    **native(),
)
