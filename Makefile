# Millrace: every chore is one command. `make demo` and `make test` need nothing but Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An index with CPU builds of torch, where the default one carries CUDA: make install TORCH_INDEX=URL
TORCH_INDEX ?=
TORCH_FLAGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread per process; three processes keep two cores busy, since many tests wait for servers and timers.
WORKERS ?= 3
export OMP_NUM_THREADS = 1
# pip compiles 19,000 files one after another. Of these the ones that models are made and served with are compiled, by
# all processors; what only tests import is compiled, and kept, when they do.
unexport PYTHONDONTWRITEBYTECODE
NOT_COMPILED := /(tests?|testing|mlflow|moto|cfnlint|sympy|networkx|schemathesis|IPython|debugpy|opentelemetry|gevent|pip|$\
	setuptools|onnxscript|mkdocs|material|hypothesis|boto3|botocore|docutils|jedi|nbconvert|lightning|transformers|$\
	torch/(_inductor|_dynamo|distributed|testing))/

.DEFAULT_GOAL := help
.PHONY: help install demo test quick check format bench docs reference lock sizes clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP)  ## .venv with everything

$(STAMP): requirements-dev.lock pyproject.toml
	@echo "Installing into $(VENV): about 150 packages, 500 MB to download, 2.2 GB on disk, 2 to 8 minutes."
	@echo "Where pip takes the CUDA build of torch (the default on Linux x86-64), add about 3 GB;"
	@echo "TORCH_INDEX=URL names an index with CPU builds. Once installed, this step is skipped."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "want Python 3.11 or newer, got `$(PYTHON) -V`: make install PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "Python cannot make environments here: apt-get install python3-venv"; exit 1; }
	$(PIP) install --no-compile --quiet --progress-bar off $(TORCH_FLAGS) $$(grep '^torch==' requirements-dev.lock)
	$(PIP) install --no-compile --quiet --progress-bar off -r requirements-dev.lock
	$(PIP) install --no-compile --quiet --no-deps -e .
	$(BIN)/python -m compileall -q src
	@$(BIN)/python -m compileall -q -j 0 -x '$(NOT_COMPILED)' $(VENV)/lib >/dev/null || true  # some are templates
	@touch $@

demo: install  ## install, then watch real data become a served model
	@$(BIN)/millrace demo

test: install  ## install, then every test
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

quick: install  ## the tests without the slow ones
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not slow and not browser"

check: install  ## lint, format, types, layers, spelling, references
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python scripts/gendocs.py --check

format: install  ## what ruff can repair by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install  ## the figures, into benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py

docs: install reference  ## the documentation site, strict, into site/
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

reference: install  ## docs/reference from the code
	$(BIN)/python scripts/gendocs.py

lock: install  ## requirements-dev.lock from what is installed
	$(BIN)/python scripts/lock.py

sizes: install  ## lines per room
	$(BIN)/python scripts/sizes.py

clean:  ## what make made, but not .venv
	rm -rf site build dist .pytest_cache .ruff_cache .hypothesis
