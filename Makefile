# Everything a newcomer needs: make demo, make test. Needs make and Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

.PHONY: setup demo test test-real check readme clean

setup: $(STAMP)

# torch comes first and alone, at the exact version that the exporter is validated with: pip then takes the CPU build where the
# configured index offers one, and nothing installed later can pull in another build (and gigabytes of CUDA packages) by accident.
# No index is named here; on Linux, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can point pip at a CPU build.
# The stamp is written last, so an interrupted set-up is done again.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("hfaccel needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet -e '.[compile,plot,dev]'
	touch $@

# The second run finds the cached stages and the artifact up to date.
demo: $(STAMP)
	$(BIN)/python tests/real/checkpoints.py demo minilm-l6-v2 lee
	$(BIN)/hfaccel compile demo/checkpoints/minilm-l6-v2 -o demo/minilm \
	    --data demo/data/lee-pairs.csv --calibration demo/data/lee-background.txt
	$(BIN)/hfaccel run demo/minilm "A man is eating pasta." "Someone is having a meal."

# The fast lane: no network, no real weights.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/real/checkpoints.py
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n logical --dist loadscope -m 'not real'

# The real-weight lane: fetches packages once into demo/, skips with the reason where that fails.
test-real: $(STAMP)
	$(BIN)/python -m pytest -m real -rs

check: test test-real

# The tables of README.md that follow from the code; a test says when they are out of date.
readme: $(STAMP)
	$(BIN)/python tests/readme_tables.py

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
