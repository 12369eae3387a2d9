# Two commands do everything: `make demo` and `make test`.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO_ARGS ?=
FAULTS_ARGS ?=
TEST_WORKERS ?= 2

# The process keeps freed memory instead of returning it at every step. This is a fifth faster on the CPU (glibc; no effect elsewhere).
export MALLOC_MMAP_THRESHOLD_ := 4294967295
export MALLOC_TRIM_THRESHOLD_ := 4294967295

.PHONY: help setup demo test test-slow soak faults lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## make .venv with everything that demo and test need (a few minutes, some GB)

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	# With bytecode, because a start that has to compile all libraries takes three times as long. Python itself keeps none where PYTHONDONTWRITEBYTECODE is set.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup  ## distil the bundled tiny Stable Diffusion 3 to 4 steps and show the result (minutes, CPU)
	$(BIN)/python -m cdm_lightning.train experiment=tiny_sd3_cdm $(DEMO_ARGS)

test: setup  ## run all tests that a 2-core CPU can run (under 15 minutes)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-slow: setup  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

soak: setup  ## kill runs at random moments and count what is lost (SOAK_SEED=n chooses other moments)
	$(BIN)/python -m pytest -m slow tests/test_faults.py tests/test_resume_spread.py

faults: setup  ## 500 bad inputs, 50 kills and full disks; the table is outputs/faults/faults.md (FAULTS_ARGS="--publish")
	PYTHONPATH=$(CURDIR)/tests:$(CURDIR) $(BIN)/python -m faults $(FAULTS_ARGS)

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

lock: setup  ## resolve the dependencies again into requirements.lock
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --extra log --extra data --extra lowbit --universal --python-version 3.11 --upgrade -o requirements.lock

clean:  ## delete outputs and caches, but not the environment
	rm -rf outputs runs .pytest_cache .ruff_cache dist
