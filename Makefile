# make demo    the main job: a small GPT trained with torch and with nnfast, side by side
# make test    the tests
# make bench   every benchmark on this CPU, its table, report and pictures; make bench-gpu the same on a GPU
# make fuzz    20,000 random cases an op, against float64; the tests hold a slice of it
# make sanitize  the ops' tests, and a slice of the random cases, under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint    formatting and lint, as CI checks them; make format mends them
# make emulate  the CUDA kernels on this CPU, every thread a fiber, under AddressSanitizer and UndefinedBehaviorSanitizer, and
#               a slice under ThreadSanitizer; make emulate-slice the slice of both; make mutants: what its tests would miss
# make compile-gpu    every CUDA kernel for sm_80, sm_90a and sm_100, with no GPU: registers, spills, instructions
#
# Each makes .venv with torch $(TORCH) where there is none. To use an interpreter of your own, whose torch is then left
# alone: make test PYTHON=/path/to/python

TORCH := 2.13.0
TRITON := 3.6.0
VENV := .venv
PYTHON ?= $(VENV)/bin/python

SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml
INSTALLED := build/installed-$(subst /,-,$(PYTHON))
CLANG_FORMAT = $(PYTHON) -c "import clang_format; clang_format.clang_format()"
PIP = $(PYTHON) -m pip --disable-pip-version-check install --quiet

CPP := $(filter-out %.py,$(filter csrc/%,$(SOURCES))) $(wildcard tests/emulate/*.[ch]* tests/emulate/c10/cuda/*.h)

.PHONY: demo test bench bench-gpu fuzz sanitize lint format compile-gpu emulate emulate-slice mutants clean

demo: $(INSTALLED)
	$(PYTHON) benchmarks/train_gpt.py

test: $(INSTALLED)
	$(PYTHON) -m pytest

bench: $(INSTALLED)
	$(PYTHON) -m pytest benchmarks --benchmark-only -q --compile
	$(PYTHON) benchmarks/train_gpt.py --record
	$(PYTHON) benchmarks/train_gpt.py --record --dtype bfloat16
	$(PYTHON) benchmarks/report.py

GPT = $(PYTHON) benchmarks/train_gpt.py --record --device cuda --dtype bfloat16 --compile
bench-gpu: $(INSTALLED)
	$(PYTHON) -m pytest benchmarks --benchmark-only -q --device cuda --compile
	$(PYTHON) -m pytest benchmarks --benchmark-only -q --device cuda --compile --graph
	$(GPT) --layers 12 --width 768 --batch 128
	$(GPT) --layers 24 --width 1024 --batch 64
	$(GPT) --layers 36 --width 1280 --batch 32
	$(PYTHON) benchmarks/report.py

fuzz: $(INSTALLED)
	$(PYTHON) -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz

# The sanitized build is a package of its own, which goes before the installed one on Python's path.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED := build/sanitize
sanitize: $(INSTALLED)
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(PYTHON) setup.py --quiet build --build-base $(SANITIZED) \
		--build-lib $(SANITIZED)/lib
	for capability in avx2 avx512; do \
		ATEN_CPU_CAPABILITY=$$capability ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(PYTHON) -c "import sys; sys.path[0] = '$(SANITIZED)/lib'; import nnfast, pytest; \
			assert '$(SANITIZED)' in nnfast.__file__; sys.exit(pytest.main(sys.argv[1:]))" -q \
			tests/test_layer_norm.py tests/test_linear_gelu.py tests/test_adamw.py tests/test_fuzz.py || exit 1; \
	done

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

compile-gpu: $(INSTALLED)
	$(PYTHON) csrc/cuda/compile.py

emulate: $(INSTALLED)
	$(PYTHON) tests/emulate/run.py asan
	NNFAST_EMULATE=slice $(PYTHON) tests/emulate/run.py tsan

emulate-slice: $(INSTALLED)
	NNFAST_EMULATE=slice $(PYTHON) tests/emulate/run.py asan

mutants: $(INSTALLED)
	$(PYTHON) tests/emulate/mutants.py

clean:
	rm -rf build *.egg-info nnfast/_C.*.so nnfast/_built_for.txt benchmarks/out

# The constraints keep every other package from bringing another torch along, and the Triton that is there.
$(INSTALLED): $(SOURCES) | $(if $(filter $(VENV)/%,$(PYTHON)),$(PYTHON))
	mkdir -p build
	$(PYTHON) -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > build/constraints.txt
	$(PYTHON) -c "import importlib.metadata as m; print('triton==' + m.version('triton'))" >> build/constraints.txt 2> /dev/null \
		|| echo "triton==$(TRITON)" >> build/constraints.txt
	$(PIP) -c build/constraints.txt "setuptools>=77" wheel ninja numpy
	$(PIP) -c build/constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/bin/python:
	python3 -m venv $(VENV)
	$@ -m pip --disable-pip-version-check install --quiet torch==$(TORCH)
