# Needs Python >= 3.11 and make, nothing else. Every target sets itself up in .venv; PYTHON=python3.13 chooses the Python.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet
READY := $(VENV)/ready
OLDEST := $(VENV)/oldest
PINS := $(VENV)/constraints.txt
PACKAGE := $(VENV)/package
# whole files to a process: their tests share models
CORES := -n logical --maxprocesses 4 --dist loadfile
# what depends on transformers: attention, masks, caches, its `generate` and its processors
VERSIONED := $(patsubst %,tests/test_%.py,versions models custom_generate sampling loop layer_skip hybrids compilation resume gguf smollm2_download stored_weights)
DEMO := 'methods=[autoregressive,ngram,chain,tree]'

.PHONY: help demo test test-versions test-smollm2 test-package lint docs gpu-smoke gpu engine install clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ' ## ' '/^[a-z-]+:.* ## / {sub(/:.*/, "", $$1); printf "  make %-15s%s\n", $$1, $$2}' Makefile

demo: $(READY) ## the bundled pair of models, methods compared in one table; make demo ARGS=--help lists the settings
	@$(VENV)/bin/python experiments/benchmark.py $(or $(ARGS),$(DEMO))

test: $(READY) ## run the tests; make test ARGS='tests/test_tree.py -x' runs some
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(or $(ARGS),$(CORES))
	@$(if $(ARGS),,for suite in interpret gate; do $(VENV)/bin/python -m pytest kernels/tests/$$suite || exit; done)

test-versions: $(OLDEST)/ready ## run the tests that depend on transformers, with its oldest supported version
	@export PYTHONPATH=$(abspath $(OLDEST)) OMP_NUM_THREADS=1; \
	$(VENV)/bin/python -c 'import transformers as t; print(f"transformers {t.__version__} from {t.__path__[0]}")' && \
	$(VENV)/bin/python -m pytest $(CORES) $(VERSIONED)

test-smollm2: $(READY) ## run the tests on a real model, SmolLM2-135M-Instruct: downloads 93 MB, once
	@$(VENV)/bin/python -c 'import specdec; specdec.demo.smollm2.folder()'
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m smollm2 tests/test_smollm2.py

# Of $(VENV) only the dependencies are found: a folder that a .pth file names is searched, but not for .pth files of its own.
test-package: $(READY) ## build the sdist and from it the wheel, and run the first example with nothing but that wheel
	@rm -rf $(PACKAGE) && $(VENV)/bin/python -m venv $(PACKAGE)
	@$(PACKAGE)/bin/python -m pip --quiet install build
	@$(PACKAGE)/bin/python -m build --outdir $(PACKAGE)/dist . >$(PACKAGE)/build.log 2>&1 || { cat $(PACKAGE)/build.log; exit 1; }
	@$(PACKAGE)/bin/python -m pip --quiet install --no-deps $(PACKAGE)/dist/*.whl
	@where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(VENV)/bin/python -c "$$where" > "$$($(PACKAGE)/bin/python -c "$$where")/dependencies.pth"
	@$(PACKAGE)/bin/python -I tests/installed.py

lint: $(READY) ## ruff and pyright
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright

docs: $(VENV)/docs ## the pages as a site, in build/site; whatever Sphinx warns of is an error
	@$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet -c notebooks . build/site
	@echo build/site/index.html

gpu-smoke: ## the first of three calls for a GPU: every op launched, checked, captured; under nine minutes, installs nothing
	@$(PYTHON) experiments/gpu.py smoke

gpu: ## the second: the kernels tested and timed beside their rivals
	@$(PYTHON) experiments/gpu.py gpu

engine: ## the third: whole steps, a large LM head and stored products timed, beside rivals
	@$(PYTHON) experiments/gpu.py engine

install: $(READY) ## only the set-up: .venv with the tested versions

clean: ## remove .venv, caches and build products (not outputs/)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find specdec kernels experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/docs: $(READY)
	@$(PIP) install --constraint $(PINS) --editable '.[docs]'
	@touch $@

$(OLDEST)/ready: constraints-oldest.txt $(READY)
	@rm -rf $(OLDEST)
	@$(PIP) install --no-deps --target $(OLDEST) --requirement constraints-oldest.txt
	@touch $@

# torch comes first and says which triton: its CUDA builds require the one they were made with, so our pin is dropped;
# its CPU builds require none.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "specdec: '$(PYTHON)' is not on the PATH; \
	install Python >= 3.11, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "specdec: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); \
	Python >= 3.11 is needed. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "specdec: '$(PYTHON)' cannot create virtual environments; \
	install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "specdec: installing torch and the other tested versions into $(VENV), once. This takes minutes: torch alone is"
	@echo "         0.2 GB, on Linux with its CUDA libraries 3 GB."
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@grep -v '^triton==' constraints.txt > $(PINS)
	@$(PIP) install --constraint $(PINS) torch
	@if $(VENV)/bin/python -c 'import sys; from importlib.metadata import requires; \
	sys.exit(any(r.startswith("triton") for r in requires("torch")))'; then cp constraints.txt $(PINS); fi
	@$(PIP) install --constraint $(PINS) --editable '.[experiments,dev]'
	@touch $(READY)
