# Each target makes its own virtual environment, .venv, and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test parity clean

demo: $(VENV)/installed  ## Train a model with a planted answer, find it, and write the report.
	$(BIN)/python -m launch.demo --out=out/demo

test: $(VENV)/installed-test  ## All tests but those that need torch.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not parity"

parity: $(VENV)/installed-parity  ## The tests against torch models and tools, and costly ones for all families.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m parity

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# torch comes first, by its exact version, before anything could pull another build of it.
$(VENV)/installed-parity: $(VENV)/created setup.cfg pyproject.toml
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,parity]'
	touch $@
