# demo: set everything up and compare dense and sparse attention on the bundled model; opens nothing, needs no GPU.
# test: set everything up and run the tests.
# test-beside: run the tests that `test` skips because they need packages of other projects.
# site: build the web site in site/; open site/index.html.

PYTHON ?= python3.11
# A CPU build where pip is set up to find one; any torch that is already in .venv is kept.
TORCH ?= torch==2.13.0
PROMPT ?= a large red striped circle moving right over a green checkerboard
BESIDE ?= torchao==0.18.0 bitsandbytes==0.50.2 gguf==0.19.0 cache-dit==1.5.3
VENV := .venv
BIN := $(VENV)/bin
# Where this is set, every process compiles the modules that it imports anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-beside lint site

demo: $(VENV)/ready
	$(BIN)/psa-generate --model demo --preset psa-3 --compare --output out "$(PROMPT)"

# One process a core, each with one thread: tiny models gain nothing from threads. Each has a share of the files, so that
# what the tests of a file have in common is made once, and takes tests from another when it has none left.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Where one of them is missing or cannot be imported, its tests would be skipped: this fails before any test.
test-beside: $(VENV)/beside/ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/beside $(BIN)/python -c \
		"import sys, torchao, bitsandbytes, gguf, cache_dit, pytest; sys.exit(pytest.main())" \
		tests/patch/test_beside_others.py tests/patch/test_beside_caches.py -k "quantised or cache_dit"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a link that leads nowhere fails it. Tables that are not what their JSON files say fail it too.
site: $(VENV)/docs/ready
	$(BIN)/python scripts/figures.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch comes first: any package that needs it would otherwise bring in the newest build with all of CUDA.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[test,kernel-test]"
	touch $@

# A folder of their own: diffusers imports these wherever it finds them, and some warn then. Their own needs are met.
$(VENV)/beside/ready: $(VENV)/ready
	$(BIN)/pip install --no-deps --upgrade --target $(@D) $(BESIDE)
	touch $@

$(VENV)/docs/ready: $(VENV)/ready
	$(BIN)/pip install -e ".[docs]"
	mkdir -p $(@D)
	touch $@
