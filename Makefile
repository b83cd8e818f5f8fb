PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small builds of torch for the tests; set PIP_ARGS for an index or cache of your own.
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)
WORKDIR ?= runs/quickstart

.PHONY: run test test-slow lint clean

# The quickstart: every method, two seeds, on the base that the package ships.
run: $(VENV)/run.stamp
	$(BIN)/python -m experiments.run --config configs/quickstart.py --workdir $(WORKDIR)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# These train for long, so their machine code is optimised.
test-slow: $(VENV)/test.stamp
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -m slow -n 2

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

$(VENV)/run.stamp: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/test.stamp: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs
