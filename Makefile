# Two commands do everything on a fresh machine: `make demo` and `make test`.
# They need Python 3.11 or newer, make and a package registry.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OUT ?= noisekit-runs/demo
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo replica test soak lint docs bench data clean

help: ## Show what each target does.
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "noisekit needs Python 3.11 or newer, got $$($(PYTHON) --version); use make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing noisekit and what it needs into $(VENV) (once; PyTorch is large) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools that tests, linters and docs need ..."
	$(PIP) --editable '.[dev,docs]'
	@touch $@

$(VENV)/.installed-compare: $(VENV)/.installed-dev
	@echo "Installing the packages that benchmarks compare with ..."
	$(PIP) --editable '.[compare]'
	@touch $@

setup: $(VENV)/.installed ## Make the virtual environment and install noisekit.

demo: $(VENV)/.installed ## Run the main job on real data and write the report.
	$(BIN)/noisekit demo --out $(OUT)

replica: $(VENV)/.installed data ## Re-run Keskar's experiment on Fashion-MNIST (under an hour).
	$(BIN)/noisekit run small_vs_large_batch --profile standard --out noisekit-runs/standard

test: $(VENV)/.installed-dev ## Run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -q

soak: $(VENV)/.installed-dev ## Run the batteries at full size (an hour or more).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests/soak

lint: $(VENV)/.installed-dev ## Check style, types, layers and spelling.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell noisekit analyses experiments tests docs README.md CHANGELOG.md

docs: $(VENV)/.installed-dev ## Build the documentation into docs/_build/html.
	$(BIN)/python -m sphinx -n -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed-compare ## Time noisekit against the other packages, in one run.
	$(BIN)/python tests/benchmarks/bench_curvature.py
	$(BIN)/python tests/benchmarks/bench_products.py
	$(BIN)/python tests/benchmarks/bench_probe.py
	$(BIN)/python tests/benchmarks/bench_epsilon.py
	$(BIN)/python -m tests.benchmarks.bench_updates

data: ## Get Fashion-MNIST from the Debian package, where it is not there yet.
	@if [ -f /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ] || [ -n "$$NOISEKIT_DATA" ]; then \
	  echo "Fashion-MNIST is there."; \
	elif command -v apt-get >/dev/null; then \
	  run=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$run apt-get update -q && $$run apt-get install -y -q dataset-fashion-mnist; \
	else \
	  echo "No apt-get here: put the four Fashion-MNIST files into a folder and set NOISEKIT_DATA to it."; exit 2; \
	fi

clean: ## Remove caches and builds; runs and the environment stay.
	rm -rf build dist docs/_build docs/gallery .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
