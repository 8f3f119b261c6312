# Each target makes the virtual environment that it needs, and installs what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := -m pytest -n 2 --dist loadfile

.PHONY: demo check test parity newest clean

demo: $(VENV)/installed  ## Train a model with a planted answer, find it, and write the report.
	$(BIN)/python -m launch.demo --out=out/demo

check: $(VENV)/installed-check  ## Format, lint, types, and the one direction of imports.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python --threads 2

test: $(VENV)/installed-test  ## All tests but those that need torch or every family.
	$(BIN)/python $(TESTS) -m "not parity"

parity: $(VENV)/installed-parity  ## Comparisons with torch models and tools; every family.
	$(BIN)/python $(TESTS) -m parity

newest: $(VENV)-newest/installed  ## The tests nearest to JAX, with the newest JAX, Flax, transformers.
	$(VENV)-newest/bin/python $(TESTS) -m "not parity" \
	    tests/models/test_decoder.py tests/jaxmed/engine tests/jaxmed/store

clean:
	rm -rf $(VENV) $(VENV)-newest build *.egg-info

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-check: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[check]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# torch comes first, by its exact version, before anything could pull another build of it.
$(VENV)/installed-parity: $(VENV)/created setup.cfg pyproject.toml
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,parity]'
	touch $@

# Newest versions need a newer Python: 3.12 from the path or from pyenv, or else what there is.
$(VENV)-newest/installed: setup.cfg pyproject.toml
	for python in python3.12 "$$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12" "$(PYTHON)"; do \
	    "$$python" -c "" 2>/dev/null && break; done; \
	"$$python" -c "import sys; print('Newest versions for Python', sys.version)"; \
	"$$python" -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(VENV)-newest/bin/pip list | grep -iE "^(jax|jaxlib|flax|transformers) "
	touch $@
