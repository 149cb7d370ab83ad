# `make` alone prints what there is.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
KVPRESS := experiments/peers/kvpress
DECODE_CPU := experiments/benchmarks/decode_cpu
ARGS ?=
THREADS ?= 2
export OMP_NUM_THREADS ?= $(THREADS)

.PHONY: help setup demo test test-all slurm-test check kvpress bench bench-compare bench-cpu gpu-check notebooks clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## build .venv with the tested versions of everything

$(STAMP): pyproject.toml conf/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c conf/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[eval,slurm,optuna,notebooks,dev]" -c conf/constraints.txt
	touch $(STAMP)

demo: $(STAMP)  ## retrofit the embedded model, compare it with its rivals: a table and a figure
	$(BIN)/python -m dms_lab.demo $(ARGS)

test: $(STAMP)  ## run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not slurm" -n $(THREADS) --dist loadfile $(ARGS)

test-all: $(STAMP)  ## run every test, the slow ones too
	$(BIN)/python -m pytest $(ARGS)

slurm-test: $(STAMP)  ## disturb sweeps on a real Slurm, started here by root: 15 minutes, see tests/slurm
	tests/slurm/install.sh
	DMS_LAB_REQUIRE_SLURM=1 $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

check: $(STAMP)  ## lint and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

kvpress: $(KVPRESS)/.venv/.installed  ## build the environment of the kvpress presses, see experiments/peers/kvpress

$(KVPRESS)/.venv/.installed: $(KVPRESS)/requirements.txt
	test -x $(KVPRESS)/.venv/bin/python || $(PYTHON) -m venv $(KVPRESS)/.venv
	$(KVPRESS)/.venv/bin/python -m pip install --quiet --disable-pip-version-check torch -c $(KVPRESS)/requirements.txt
	$(KVPRESS)/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r $(KVPRESS)/requirements.txt
	touch $(KVPRESS)/.venv/.installed

bench: $(STAMP)  ## every benchmark in its short form: experiments/benchmarks/<name>/results.json
	$(BIN)/python -m experiments.benchmarks.run $(ARGS)

bench-compare: $(STAMP)  ## the same into runs/benchmarks, held against what is committed, as ratios to the dense path
	$(BIN)/python -m experiments.benchmarks.run --folder runs/benchmarks $(ARGS)
	$(BIN)/python -m experiments.benchmarks.compare runs/benchmarks

gpu-check: $(STAMP)  ## with a GPU: kernels against the references first, then every table, see experiments/benchmarks
	$(BIN)/python -m experiments.benchmarks.gpu_check $(ARGS)

bench-cpu: $(STAMP)  ## speed and memory of the compact cache on this CPU, an hour: see experiments/benchmarks/decode_cpu
	set -e; for part in decode memory prefill peak; do $(BIN)/python $(DECODE_CPU)/bench.py $$part $(ARGS); done
	$(BIN)/python $(DECODE_CPU)/table.py

notebooks: $(STAMP)  ## run the notebooks and write their outputs
	$(BIN)/python notebooks/execute.py $(ARGS)

clean:  ## remove what the targets made, the environment included
	rm -rf .venv $(KVPRESS)/.venv runs outputs .pytest_cache .ruff_cache .hypothesis dist
