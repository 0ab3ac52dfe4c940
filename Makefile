# make demo    the main job: a small GPT trained with torch and with nnfast, side by side
# make test    the tests
# make lint    formatting and lint, as CI checks them; make format mends them
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

.PHONY: demo test lint format clean

demo: $(INSTALLED)
	$(PYTHON) benchmarks/train_gpt.py

test: $(INSTALLED)
	$(PYTHON) -m pytest

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(filter csrc/%,$(SOURCES))

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(filter csrc/%,$(SOURCES))

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
