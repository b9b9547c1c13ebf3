# make quickstart   distil a small model from start to finish on this machine
# make cross-scale  the same with the teacher on a process of its own
# make sglang-cpu   the same with rollouts and teacher behind SGLang servers (no NVIDIA GPU)
# make test         lint, format, types and tests
# make .venv-sglang/.installed
#                   SGLang on a Linux machine without an NVIDIA GPU (tools/sglang_cpu/README.md)
# make .venv-trl/.installed
#                   TRL, for python -m tools.bench.end_to_end
#
# The first four make the environments they need first. Variables:
#   PYTHON       the Python (3.11 or 3.12) that they are made with
#   MEGATRON_OPD_SGLANG  the interpreter of an environment that has SGLang, for the tests; where it is set, or where there
#                is an NVIDIA GPU, `make test` makes none of its own
#   TORCH_INDEX  a pip index URL for torch on a machine without an NVIDIA GPU, such as PyTorch's own index of
#                CPU builds (see the installation page of pytorch.org). Empty: pip's default index.

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0

SGLANG := .venv-sglang
OWN_SGLANG := $(if $(MEGATRON_OPD_SGLANG)$(shell command -v nvidia-smi),,$(SGLANG)/.installed)
SGLANG_PIP := $(SGLANG)/bin/python -m pip --disable-pip-version-check

TRL := .venv-trl

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart cross-scale sglang-cpu test test-full lint format clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/python -m tools.quickstart

cross-scale: $(VENV)/.installed-quickstart
	$(BIN)/python -m tools.quickstart examples/cross_scale/config.yaml

sglang-cpu: $(VENV)/.installed-quickstart $(SGLANG)/.installed
	$(BIN)/python -m tools.quickstart examples/sglang-cpu/config.yaml

test: lint $(OWN_SGLANG)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-full: export MEGATRON_OPD_FULL := 1
test-full: test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(SGLANG) $(TRL) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find megatron_opd tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv with the package, editable, and the extra named by the stamp. Without an NVIDIA GPU torch comes first, so that
# TORCH_INDEX holds for torch alone.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi > /dev/null || $(PIP) install $(TORCH)
	$(PIP) install --editable '.[$*]'
	touch $@

# --no-deps: SGLang's own requirements would bring CUDA; requirements.txt has what it needs without.
$(SGLANG)/.installed: $(wildcard $(addprefix tools/sglang_cpu/,*.py *.toml *.txt sgl_kernel/*.py))
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG_PIP) install $(TORCH)
	$(SGLANG_PIP) install --no-deps sglang==0.5.23 torchvision==0.28.0
	$(SGLANG_PIP) install --constraint tools/sglang_cpu/constraints.txt --requirement tools/sglang_cpu/requirements.txt
	$(SGLANG_PIP) install --no-deps --force-reinstall ./tools/sglang_cpu
	rm -rf tools/sglang_cpu/build tools/sglang_cpu/*.egg-info
	touch $@

# Naming torch again keeps TRL's requirements from bringing another one.
$(TRL)/.installed:
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip --disable-pip-version-check install $(TORCH)
	$(TRL)/bin/python -m pip --disable-pip-version-check install torch==2.13.0 trl==1.16.0 transformers==5.23.0
	touch $@
