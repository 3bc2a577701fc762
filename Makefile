# `make demo` and `make test` set everything up on a machine that has only Python 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-oldest test-torchao browser lint docs bench benchmark weights clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first: a requirement on torch, resolved with the rest, may bring gigabytes of CUDA packages
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The oldest versions that pyproject.toml allows, except torch: before 2.13 its package for x86_64 brings 5 GB of CUDA.
.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.13.0
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[video,audio]" pytest pytest-xdist
	touch $@

demo: .venv/installed
	$(BIN)/trl-diffusion-pref demo --output_dir demo

# Two processes with one thread each: most tests are small, and two threads help them little.
PARALLEL := --numprocesses 2

# Without the cases marked `slow`, whose facts others hold too.
test: .venv/installed
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL)

# For the tests of the comparison page, which are skipped where there is no browser.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		|| { apt-get update -qq && apt-get install -qq -y chromium chromium-driver >/dev/null; } \
		|| echo "No Chromium, and it could not be installed: the tests of pages are skipped."

# What runs on constraints-oldest.txt: options, noise, losses, every family against its pipeline, the three trainers,
# saving and resuming. Left out: recorded numbers, tests marked `newest`, and the slowest trainings.
OLDEST := tests/diffusion tests/export tests/test_import.py tests/contracts/test_families.py \
	tests/algorithms/test_*_loss.py tests/algorithms/test_*_trainer.py tests/training/test_configs.py \
	tests/training/test_saving.py tests/training/test_model_setup.py tests/training/test_pipelines.py \
	tests/training/test_peft_format.py tests/training/test_checkpoints.py
OLDEST_LEFT_OUT := every_loss_lowers or killed or precomputed or does_not_change_training or pool_s_latents

# Older diffusers loads a LoRA from a folder only where the Hub may be asked; no test asks it.
test-oldest: .venv-oldest/installed
	HF_HUB_OFFLINE=0 .venv-oldest/bin/python -m pytest -m "not newest and not slow" $(PARALLEL) $(OLDEST) -k "not ($(OLDEST_LEFT_OUT))"

# Beside the packages of the other tests, because diffusers imports it wherever it is installed, which takes a second.
.venv/torchao: .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ torchao==0.18.0

test-torchao: .venv/torchao
	PYTHONPATH=.venv/torchao $(BIN)/python -m pytest tests/training/test_torchao.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is made from tables in the code, then the site in docs/_build/html; a warning fails.
docs: .venv/installed
	$(BIN)/python -c "from trl_diffusion_pref.training.recommended import hyperparameters_page as page; print(page(), end='')" \
		> docs/hyperparameters.md
	$(BIN)/python docs/_models_page.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c docs -d docs/_build/doctrees . docs/_build/html

# Step times beside the bare step and the released recipes; fails where a bound is missed by more than the noise.
bench: .venv/installed
	@missed=0; for script in step_time self_npo_step_time start_time; do \
		$(BIN)/python benchmarks/$$script.py --check || missed=1; done; exit $$missed

# The tables in benchmarks/results; not part of CI.
benchmark: .venv/installed
	$(BIN)/python benchmarks/reference_mismatch.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/step_options.py
	$(BIN)/python benchmarks/start_time.py
	$(BIN)/python benchmarks/accuracy_spread.py
	$(BIN)/python benchmarks/reference_draws.py
	$(BIN)/python benchmarks/self_npo.py
	$(BIN)/python benchmarks/self_npo_step_time.py
	$(BIN)/python benchmarks/diffusion_npo.py
	$(BIN)/python benchmarks/sdxl_memory.py
	$(BIN)/python benchmarks/memory_recipes.py
	$(BIN)/python benchmarks/healthy_runs.py
	$(BIN)/python benchmarks/encoding_costs.py
	$(BIN)/python benchmarks/encoding_memory.py
	$(BIN)/python benchmarks/encoding_processes.py
	$(BIN)/python benchmarks/cache_dtype.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/clean_in_style.py
	$(BIN)/python benchmarks/rounds.py
	$(BIN)/python benchmarks/rounds.py --variant irepo
	$(BIN)/python benchmarks/rank_dpo.py
	$(BIN)/python benchmarks/diffusion_nft.py
	$(BIN)/python benchmarks/edits.py
	$(BIN)/python benchmarks/reward_guidance.py
	$(BIN)/python benchmarks/comparison_of_equals.py

# Trains the embedded pipelines again, about an hour on two cores.
weights: .venv/installed
	$(BIN)/python -m trl_diffusion_pref.shapes.train --output trl_diffusion_pref/shapes/weights

clean:
	rm -rf .venv .venv-oldest demo build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache
