# Two commands: `make demo` runs the main job on a real network and real photos, `make test` lints, checks types and runs
# the tests. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# torch from a plain index brings gigabytes of CUDA; the pinned CPU build is taken first so that nothing replaces it.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup browser demo test lint types clean

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep -i '^torch==' constraints.txt)"
	$(INSTALL) -e '.[test,demo,openvino]'
	@touch $@

browser:
	@sh tools/browser.sh

demo: setup
	$(BIN)/python demo/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

test: setup browser lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
