# One command each, on a fresh machine with only Python 3.11 or newer: make demo, make check, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What is tested by arithmetic alone: no model is run.
PURE := tests/losses tests/data tests/report tests/displacement tests/theory/statements tests/test_layering.py \
  tests/test_stats.py tests/test_table_of_tests.py
# As many workers as processors, a file of tests to one worker: its fixtures are made once.
PARALLEL := -n auto --dist loadfile
# Each worker is one thread; what it compiles is kept in .pytest_cache/xla.
PYTEST := $(BIN)/python -m pytest

# The Python files that differ from the main branch.
MAIN := $$(git merge-base HEAD origin/main 2>/dev/null || git merge-base HEAD main 2>/dev/null || echo HEAD)
TOUCHED = { git diff --name-only --diff-filter=d $(MAIN) -- '*.py'; git ls-files --others --exclude-standard -- '*.py'; }

.PHONY: demo check test timings slow mutants lint types touched pure docs notebooks release hooks clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# The main job on what ships with the package: score, report, and the pairs least at risk as a data set.
demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/ches score --by head_score --out runs/demo/scores
	$(BIN)/ches report runs/demo/scores
	$(BIN)/ches select --scores runs/demo/scores --by head_score --keep lowest:0.25 --out runs/demo/selected

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/installed-test
	$(BIN)/pyright

# The types of what differs from main alone: reading every file takes longer than all of the pure tests.
touched: $(VENV)/installed-test
	$(TOUCHED) | sort -u | xargs -r $(BIN)/pyright

pure: $(VENV)/installed-test
	$(PYTEST) -m "not slow" -q $(PARALLEL) $(PURE)

# Lint, types of what differs from main, and the pure tests, side by side.
check: $(VENV)/installed-test
	$(MAKE) --jobs 3 --output-sync=target lint touched pure

# All but the heavy checks. The types of every file take as long as a third of it: .ci/run reads them first.
test: lint
	$(PYTEST) -m "not slow" $(PARALLEL)

# What each file of tests costs: CPU seconds and programs compiled. A fast test owes its seconds (see CONTRIBUTING.md).
timings: $(VENV)/installed-test
	$(PYTEST) -m "not slow" $(PARALLEL) --timings

# The heavy checks; they may use ../shared and take long.
slow: $(VENV)/installed-test
	$(PYTEST) -m slow

# Small plausible mistakes against the tests of their area; survivors are printed. Minutes: each starts from the test
# that caught it before.
mutants: $(VENV)/installed-test
	$(BIN)/python tools/mutants.py --again

# The site, into build/site; a warning is an error. Nothing is fetched.
docs: $(VENV)/installed-docs
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Every notebook, run anew: what it prints is committed.
notebooks: $(VENV)/installed-docs
	$(BIN)/python tools/notebooks.py

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Wheel and sdist, checked, and tried in an environment that has nothing else.
release: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[release]'
	tools/release.sh $(BIN)/python

# Lint and layering before every commit.
hooks: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet pre-commit
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
