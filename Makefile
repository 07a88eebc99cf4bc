PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# a file's tests share what they set up; in the order of the files, so that short unit tests fill up the end
TWO = -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-slow reproduce check benchmark clean

run: $(VENV)/.installed
	$(BIN)/cpet-bench run matrix.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TWO)

# those that take minutes: thirty kills, full disks, libraries that hang
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TWO) -m "slow and not gpu"

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
