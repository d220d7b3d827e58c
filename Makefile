# make bench: install, run the quick suite. make test: install, lint, types, tests.
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() or 1))")
OUT ?= results/quick
# --multi_gpu is what makes accelerate start several processes, on a CPU too; it refuses it for one.
LAUNCH = $(if $(filter-out 1,$(PROCESSES)),--multi_gpu) --num_processes $(PROCESSES) --num_machines 1 \
  --mixed_precision no --dynamo_backend no
BIN = $(VENV)/bin

export HF_HUB_OFFLINE = 1

bench: $(VENV)/installed
	$(BIN)/accelerate launch $(LAUNCH) -m benchmarks --suite quick --out $(OUT)

test: export OMP_NUM_THREADS = 1
test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# nanogcg declares an older transformers than the tested one, so it is installed beside it, without its dependencies.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements.lock
	$(BIN)/pip install --no-deps nanogcg==0.3.0
	$(BIN)/pip install --no-deps -e .
	touch $@

.PHONY: bench test lint
