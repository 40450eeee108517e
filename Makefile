# `make demo` and `make test` set up all they need in .venv; they need Python >= 3.11, make and the package registry.
#
#   PYTHON=python3.12   another interpreter
#   ENV=path            an environment that has what requirements*.txt name: nothing is installed
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   torch without CUDA, where the registry's own has it
PYTHON ?= python3
ENV ?=
TORCH_INDEX ?=
VENV := .venv
OLD_VENV := .venv-4.57
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or newer, as the pinned " \
	"versions need, got " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")
PIP_OPTIONS := --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
ifdef ENV
BIN := $(ENV)/bin
else
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/demo-ready
READY := $(VENV)/ready
endif
# Tests are many small models: two processes of one thread each.
PYTEST := -m pytest -n 2 --dist loadfile
# What breaks first when a line changes.
FAST_TESTS := tests/model/test_models.py tests/model/test_configuration.py tests/model/test_embeddings.py \
	tests/model/test_heads.py tests/model/test_losses.py tests/model/test_inputs.py tests/model/test_clip_equality.py \
	tests/model/test_projection.py tests/conversion/test_convert.py
# Recipes and pages are written for the newest releases; graphs, compilation and transformers' own suite are of them.
NOT_ON_4_57 := tests/training tests/docs tests/model/test_common_suite.py tests/model/test_compile.py \
	tests/model/test_export.py tests/model/test_wrappers_table.py tests/hub/test_sentence_transformers.py
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' requirements-demo.txt)
COMMON_SUITE := $(VENV)/transformers-tests/$(TRANSFORMERS)
ECOSYSTEM := $(VENV)/ecosystem

.PHONY: demo test test-fast test-all test-4.57 test-matrix style format bench clean

demo: $(DEMO_READY)
	$(BIN)/python embed_images.py examples/pictures --output demo_output/pictures.parquet
	$(BIN)/python search.py demo_output/pictures.parquet --query "red fruit" --sheet demo_output/search.png
	@echo "In the browser: $(BIN)/pip install gradio && $(BIN)/python app.py demo_output/pictures.parquet"

test: $(READY) $(COMMON_SUITE)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not heavy" tests

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -q -m "not heavy" $(FAST_TESTS)

test-all: $(READY) $(COMMON_SUITE) $(ECOSYSTEM)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests

test-4.57: $(OLD_VENV)/ready $(READY)
	OMP_NUM_THREADS=1 VIT_EMBED_OTHER_PYTHON=$(abspath $(BIN)/python) $(OLD_VENV)/bin/python $(PYTEST) -m "not heavy" \
		$(NOT_ON_4_57:%=--ignore=%) tests

# The model's tests on each version of transformers and torch that we name, in environments of their own.
test-matrix: $(READY)
	$(BIN)/python tests/matrix.py

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typed && ln -sfn $(abspath .) build/typed/vit_embed
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) vit_embed/*_vit_embed.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Draws the charts of docs/ from the measurements in benchmarks/; each page names the command that measures again.
bench: $(DEMO_READY)
	$(BIN)/python benchmarks/charts.py

$(VENV)/demo-ready: requirements-demo.txt setup.cfg pyproject.toml
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	@echo "Installing into $(VENV): 50 packages, 1.3 GB on disk with torch for CPUs, in a minute or two."
	@echo "Where the registry's torch comes with CUDA it is several GB; TORCH_INDEX (see the Makefile) gives one without."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_OPTIONS) -r requirements-demo.txt
	$(BIN)/pip install $(PIP_OPTIONS) --quiet --no-deps --editable .
	touch $@

$(VENV)/ready: $(VENV)/demo-ready requirements.txt requirements-references.txt requirements-page.txt
	@echo "Installing what the tests need into $(VENV): 80 packages more, 1.6 GB on disk, in two or three minutes."
	$(BIN)/pip install $(PIP_OPTIONS) -r requirements.txt
	$(BIN)/pip install $(PIP_OPTIONS) --no-deps -r requirements-references.txt -r requirements-page.txt
	touch $@

# transformers' tests of its own models, which its source distribution has.
$(COMMON_SUITE): $(READY)
	rm -rf $@.aside $(VENV)/sdist && mkdir -p $@.aside
	$(BIN)/pip download --quiet --no-deps --no-binary transformers -d $(VENV)/sdist transformers==$(TRANSFORMERS)
	tar -xzf $(VENV)/sdist/transformers-$(TRANSFORMERS).tar.gz -C $@.aside --strip-components=2 \
		transformers-$(TRANSFORMERS)/tests
	rm -rf $@ $(VENV)/sdist && mv $@.aside $@

# Beside the environment, as transformers imports torchao, which takes a second, wherever it is installed.
$(ECOSYSTEM): $(READY) requirements-ecosystem.txt
	rm -rf $@.aside
	$(BIN)/pip install $(PIP_OPTIONS) --quiet --no-deps --target $@.aside -r requirements-ecosystem.txt
	rm -rf $@ && mv $@.aside $@

$(OLD_VENV)/ready: requirements-4.57.txt requirements-references.txt setup.cfg pyproject.toml
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/pip install $(PIP_OPTIONS) --quiet -r requirements-4.57.txt
	$(OLD_VENV)/bin/pip install $(PIP_OPTIONS) --quiet --no-deps -r requirements-references.txt
	$(OLD_VENV)/bin/pip install $(PIP_OPTIONS) --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OLD_VENV) .venv-matrix build *.egg-info demo_output
