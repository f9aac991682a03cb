# Two commands do everything, set-up included: `make demo` and `make test`.

PYTHON ?= python3
# A uv on the PATH serves if it runs and is new enough for this project; else a private one is installed. Into a
# folder of its own, which no system refuses and for which pip alone is enough.
UV := $(shell uv tree --frozen --universal --depth 0 >/dev/null 2>&1 && echo uv || echo .tools/bin/uv)
# Removed with the environment; newer than the lock file when the environment matches it.
SYNCED := .venv/.synced

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check sanitize format clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(SYNCED)  ## Install everything the lock file names into .venv

demo: $(SYNCED)  ## Run the main job over the shipped tickets with the embedded model
	.venv/bin/rayskip run configs/quickstart.yaml

test: $(SYNCED)  ## Run the tests
	.venv/bin/pytest -n 2 --dist worksteal

soak: $(SYNCED)  ## Run the tests that are too slow for each change
	.venv/bin/pytest -m soak

check: $(SYNCED)  ## Check format, lint, types and import contracts
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports

# A library with sanitizers needs theirs loaded first. Leaks: Python has its own.
sanitize: $(SYNCED)  ## Run the C kernels' tests with GCC's sanitizers of addresses and undefined behaviour
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	CC="gcc -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	ASAN_OPTIONS=detect_leaks=0 .venv/bin/pytest tests/backends/test_cpu.py

format: $(SYNCED)  ## Format, and fix what lint can fix
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:  ## Remove the environment, the private uv and all output
	rm -rf .venv .tools out

$(SYNCED): pyproject.toml uv.lock $(filter .tools/bin/uv,$(UV))
	$(UV) sync --frozen --compile-bytecode
	touch $@

.tools/bin/uv:
	$(PYTHON) -m pip install --quiet --target .tools uv
