# Everything runs inside .venv; `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo plugins test lint clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

venv: .venv/installed ## create .venv with all that the demo and the tests need

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed, found " + sys.version.split()[0] + ": make venv PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check 'torch>=2.11,<=2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cpu,dev]'
	@touch $@

demo: venv ## train, export, build and compare a small model, in minutes
	$(BIN)/python -m train.joint
	$(BIN)/python -m dsa_export.onnx --model ckpt/
	$(BIN)/python -m engines.build
	$(BIN)/python bench/compare.py
	@echo "The demo's model has seen texts of 512 tokens: beyond, the times are real, and what it says is not."

plugins: venv ## build/plugins/: the operators as TensorRT plugins and as CPU kernels; needs g++, no GPU
	$(BIN)/python -m plugins.embed
	$(BIN)/python -m plugins.cpu

lint: venv ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv lint ## everything that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

clean: ## remove what the commands wrote
	rm -rf ckpt out build
