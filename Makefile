# make demo    watch a small model continue Python source, plain and token-parallel, side by side
# make test    lint and every fast test
# Both make .venv, install torch and ramify into it on the first run, and start in seconds afterwards.
# Also: test-slow, lint, format, bench, docs, zoo, clean.

PYTHON        ?= python3
TORCH_VERSION ?= 2.13.0
# More arguments for pip where torch is installed, e.g. TORCH_PIP="--index-url <the CPU index of pytorch's install page>".
TORCH_PIP     ?=
VENV          ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
RESULTS := benchmarks/results
BUILD_TAKES := $(if $(and $(filter-out off,$(or $(RAMIFY_CUDA),auto)),$(shell command -v nvcc)),about six minutes: with CUDA kernels as nvcc is here,a minute or two)
CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: demo test test-slow lint format bench docs zoo clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	@$(BIN)/python -m ramify.cli.demo

test: lint
	$(BIN)/pytest -q

test-slow: $(VENV)/.built $(VENV)/.test build/triton36/.made
	$(BIN)/pytest -q -m slow

lint: $(VENV)/.built $(VENV)/.test
	@mkdir -p build/lint && ln -sfn ../../pyext build/lint/ramify
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/.built $(VENV)/.bench
	$(BIN)/python -m benchmarks.end_to_end --json $(RESULTS)/end_to_end.json --plot $(RESULTS)/end_to_end.png
	$(BIN)/python -m benchmarks.linear --json $(RESULTS)/linear.json --plot $(RESULTS)/linear.png
	$(BIN)/python -m benchmarks.step --json $(RESULTS)/step.json --plot $(RESULTS)/step.png
	$(BIN)/python -m benchmarks.tree_attention --json $(RESULTS)/tree_attention.json --plot $(RESULTS)/tree_attention.png
	$(BIN)/python -m benchmarks.accuracy --json $(RESULTS)/accuracy.json --plot $(RESULTS)/accuracy.png

docs: $(VENV)/.built
	$(BIN)/python -m ramify.docs README.md benchmarks/results/README.md

zoo: $(VENV)/.built $(VENV)/.zoo
	$(BIN)/python -m ramify.zoo.train --out pyext/zoo/weights

clean:
	rm -rf build dist *.egg-info pyext/*.so

# ---- what the targets above stand on; each stamp is older than what it was made from only when something changed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "make: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "make: $(PYTHON) cannot make one; install its venv module (apt install python3-venv on Debian)"; exit 1; }

$(VENV)/.torch-$(TORCH_VERSION): | $(BIN)/python
	@echo "make: torch $(TORCH_VERSION), the long part of the first run"
	@$(PIP) torch==$(TORCH_VERSION) $(TORCH_PIP)
	@$(PIP) "setuptools>=77" wheel "pybind11>=2.13" "ninja>=1.11"
	@touch $@

$(VENV)/.ramify: $(VENV)/.torch-$(TORCH_VERSION) pyproject.toml setup.py
	@echo "make: ramify, its kernels compiled for every instruction set level ($(BUILD_TAKES))"
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.built: $(VENV)/.ramify $(CSRC)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.test: $(VENV)/.ramify
	@echo "make: the tools of the tests"
	@$(PIP) --no-build-isolation -e '.[test,lint]'
	@touch $@

# the oldest Triton that the kernels must compile on, beside the environment's own; nothing where there is no such wheel
build/triton36/.made: | $(BIN)/python
	@echo "make: triton 3.6, for its gate alone"
	@mkdir -p $(@D)
	@$(PIP) --no-deps --upgrade --target $(@D) "triton==3.6.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
	@touch $@

$(VENV)/.%: $(VENV)/.ramify
	@$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@
