# demo: set everything up and compare dense and sparse attention on the bundled model; opens nothing, needs no GPU.
# test: set everything up and run the tests.

PYTHON ?= python3.11
# A CPU build where pip is set up to find one; any torch that is already in .venv is kept.
TORCH ?= torch==2.13.0
PROMPT ?= a large red striped circle moving right over a green checkerboard
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/ready
	$(BIN)/psa-generate --model demo --preset psa-3 --compare --output out "$(PROMPT)"

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch comes first: any package that needs it would otherwise bring in the newest build with all of CUDA.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[test,kernel-test]"
	touch $@
