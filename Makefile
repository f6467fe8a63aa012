# Two commands are the whole set-up: `make demo` and `make test`. Each builds .venv if it is needed.

PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
NOTEBOOK_VENV := .venv-notebook
BIN := $(VENV)/bin
# The CPU build of torch, where the machine offers one; otherwise pip would fetch gigabytes of CUDA.
TORCH ?= torch==2.13.0

.PHONY: demo test test-all check bench format docs notebook clean

demo: $(VENV)/.installed
	$(BIN)/sparkir distill demo

# A process for each core, of one thread each. Each takes half of the files, in order, so tests that
# share an export stay together; who is done first takes half of what the other has left.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

# With those that install packages, train for minutes or run published networks over whole sets.
test-all: $(VENV)/.installed
	$(PYTEST)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Minutes on one core; best on a machine that does nothing else.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/train_step.py --json records/training-speed/result.json

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/; a broken link or reference is an error.
docs: $(VENV)/.installed $(DOCS_VENV)/.installed
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# Executes docs/notebook.ipynb again, in place: Jupyter from one environment, sparkir from the other.
notebook: $(VENV)/.installed $(NOTEBOOK_VENV)/.installed
	PYTHONPATH=$$(echo $(CURDIR)/$(NOTEBOOK_VENV)/lib/python3*/site-packages) \
		$(BIN)/python docs/notebook.py

# requirements-dev.lock pins everything that the tests and the checks were last seen green with.
$(VENV)/.installed: pyproject.toml requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(DOCS_VENV)/.installed: docs/requirements.txt
$(NOTEBOOK_VENV)/.installed: docs/requirements-notebook.txt
$(DOCS_VENV)/.installed $(NOTEBOOK_VENV)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(NOTEBOOK_VENV) site build dist .pytest_cache .mypy_cache .ruff_cache
