# `make demo` and `make test` set up all they need in .venv; they need Python >= 3.11, make and the package registry.
PYTHON ?= python3
VENV := .venv
OLD_VENV := .venv-4.57
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or newer, as the pinned " \
	"versions need, got " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")
BIN := $(VENV)/bin
# Tests are many small models: two processes of one thread each.
PYTEST := -m pytest -n 2 --dist loadfile
# The README, the examples (tests/training), graphs, compilation and transformers' own suite are of the newest releases.
NEWEST_TESTS := readme common_suite compile export wrappers_table
NOT_ON_4_57 := --ignore=tests/training $(NEWEST_TESTS:%=--ignore=tests/test_%.py)
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' requirements.txt)
COMMON_SUITE := $(VENV)/transformers-tests/$(TRANSFORMERS)

.PHONY: demo test test-all test-4.57 style format bench clean

demo: $(VENV)/ready
	$(BIN)/python examples/search_pictures.py

test: $(VENV)/ready $(COMMON_SUITE)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not heavy" tests

test-all: $(VENV)/ready $(COMMON_SUITE)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests

test-4.57: $(OLD_VENV)/ready $(VENV)/ready
	OMP_NUM_THREADS=1 VIT_EMBED_OTHER_PYTHON=$(abspath $(BIN)/python) $(OLD_VENV)/bin/python $(PYTEST) -m "not heavy" \
		$(NOT_ON_4_57) tests

style: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench_clip.py

$(VENV)/ready: requirements.txt requirements-references.txt setup.cfg pyproject.toml
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-references.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# transformers' tests of its own models, which its source distribution has.
$(COMMON_SUITE): $(VENV)/ready
	rm -rf $(VENV)/sdist && mkdir -p $@
	$(BIN)/pip download --quiet --no-deps --no-binary transformers -d $(VENV)/sdist transformers==$(TRANSFORMERS)
	tar -xzf $(VENV)/sdist/transformers-$(TRANSFORMERS).tar.gz -C $@ --strip-components=2 transformers-$(TRANSFORMERS)/tests

$(OLD_VENV)/ready: requirements-4.57.txt requirements-references.txt setup.cfg pyproject.toml
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/pip install --quiet -r requirements-4.57.txt
	$(OLD_VENV)/bin/pip install --quiet --no-deps -r requirements-references.txt
	$(OLD_VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OLD_VENV) build *.egg-info demo_output
