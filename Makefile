# One command each, on a fresh machine with only Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# The main job on what the package embeds: score, report, and the pairs least at risk as a data set.
demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/ches score --out runs/demo/scores
	$(BIN)/ches report runs/demo/scores
	$(BIN)/ches select --scores runs/demo/scores --by ln_ches --keep lowest:0.25 --out runs/demo/selected

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -m "not slow"

# The heavy checks; they may use ../shared and take long.
slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
