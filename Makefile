# Everything runs in .venv, which is made when it is not there. Needs Python >= 3.11, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AOT := .venv-aot
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test test-slow test-aot test-device lint bench lock clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

demo: $(VENV)/run.stamp  ## Train a small OLMo 2 on 36 plays, end to end, in under ten minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

test: lint  ## Lint, type check, and every test but the slow ones
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/test.stamp  ## The tests that take longer
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile

test-aot: $(AOT)/stamp  ## Compile for TPUs and GPUs that are not there, and look at the programs
	$(AOT)/bin/python -m pytest -m aot tests/aot

test-device: $(VENV)/device.stamp  ## On a machine with a GPU: what its kernels compute, training, decoding
	JAX_PLATFORMS= XLA_FLAGS= $(BIN)/python -m pytest -m device tests/device

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp  ## Measure against transformers, side by side, in one run
	$(BIN)/python -m benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making a virtual environment in $(VENV) …"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing olmo_jax and what it runs on (about a minute, 0.8 GB, no torch) …"
	@# The second line is what the demo's recipe needs of the extra `curate`: 10 MB of its 200.
	@$(PIP) --editable . \
	  msgspec rbloom regex rensa
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing olmo_jax with its tests and the peers it is compared with (torch, transformers) …"
	@$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/run.stamp

$(VENV)/device.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing olmo_jax with CUDA …"
	@$(PIP) --editable '.[cuda]' pytest
	@touch $@

$(VENV)/bench.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing olmo_jax with the peers it is measured against (torch, transformers) …"
	@$(PIP) --editable '.[bench]'
	@touch $@

# An environment of its own: beside these compilers a plain jax would look for their devices, and
# print errors, at every start on a machine that has none.
$(AOT)/stamp: pyproject.toml constraints.txt
	@echo "Installing the compilers for TPU and CUDA in $(AOT) (no device needed) …"
	@$(PYTHON) -m venv $(AOT)
	@$(AOT)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt --editable '.[aot]' pytest
	@touch $@

lock: $(VENV)/test.stamp $(AOT)/stamp  ## Pin what is installed now
	{ $(BIN)/python -m pip freeze --exclude-editable; \
	  $(AOT)/bin/python -m pip freeze --exclude-editable; } | \
	  sed -E 's/\+cpu//; /^olmo-jax/d; / @ /d' | sort -fu > constraints.txt

clean:  ## Remove the virtual environment and the demo's files
	rm -rf $(VENV) $(AOT) runs/demo data/demo
