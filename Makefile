# `make demo` and `make test` set everything up on a machine that has only Python 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs benchmark weights clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first: a requirement on torch, resolved with the rest, may bring gigabytes of CUDA packages
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/python examples/mapo_shapes.py --output_dir demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The page that is made from a table in the code.
docs: .venv/installed
	$(BIN)/python -c "from trl_diffusion_pref.trainer.published import hyperparameters_page as page; print(page(), end='')" \
		> docs/hyperparameters.md

# The tables in benchmarks/results; not part of CI.
benchmark: .venv/installed
	$(BIN)/python benchmarks/reference_mismatch.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/accuracy_spread.py
	$(BIN)/python benchmarks/reference_draws.py
	$(BIN)/python benchmarks/self_npo.py
	$(BIN)/python benchmarks/self_npo_step_time.py
	$(BIN)/python benchmarks/diffusion_npo.py

# Trains the embedded pipelines anew, about three quarters of an hour on two cores.
weights: .venv/installed
	$(BIN)/python -m trl_diffusion_pref.shapes.train --output trl_diffusion_pref/shapes/weights

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache
