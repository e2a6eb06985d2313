# Two commands: `make demo` shows the paper's point on real digits in three minutes, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check golden docs clean

# One thread: for images this small a second gives little, and beside other programs it takes much.
demo: $(VENV)/installed-digits,report
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(BIN)/resnet-train -m experiment=demo
	$(BIN)/resnet-report runs/demo out=runs/demo/report
	@sed -n '/^After/,/^!/{/^!/d;p;}' runs/demo/report/report.md

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m ""

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/python scripts/docs.py keys
	$(BIN)/python scripts/docs.py rooms
	$(BIN)/python scripts/docs.py site build/site

golden: $(VENV)/installed-dev
	$(BIN)/python scripts/golden.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/installed-%: pyproject.toml $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[$*]'
	@touch $@
