# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
PY := .venv/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-all bench leaderboard lint clean

# torch first: a plain `torch` on a CPU-only machine would pull gigabytes of CUDA.
.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(PY) -m tempflow.cli train demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

# Many tests start processes of their own; bytecode is there for them even where Python is told to write none.
test: .venv/ready
	$(PY) -m compileall -q src
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow and not gpu"

test-all: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

bench: .venv/ready
	$(PY) benchmarks/floor.py
	$(PY) benchmarks/verifier.py

leaderboard: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.leaderboard

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

clean:
	rm -rf .venv runs build dist
