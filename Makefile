PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test test-slow reproduce check benchmark clean

run: $(VENV)/.installed
	$(BIN)/cpet-bench run matrix.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# those that take minutes: thirty kills, full disks, libraries that hang
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu"

# one published cell, from nothing: fetches the model, prunes it, scores it; two minutes
reproduce: $(VENV)/.installed
	$(BIN)/cpet-bench reproduce results/default --cell smollm2--wanda24--none--none--movie_reviews--s0

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .

benchmark: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/sharing.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	-$(BIN)/python -m pip install -c constraints.txt -e '.[gptq]'  # built from source; without it its tests are skipped
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
