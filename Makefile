# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A test that takes 15 minutes hangs: every thread's stack is printed and its process ended, which names the test.
STUCK := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true --max-worker-restart 0

.PHONY: demo app test lint coverage test-slow test-gpu bench gpu-day mutants nano nano-table clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/bagel-compress demo

app: $(READY)
	$(BIN)/bagel-compress app bagel_compress/data/BAGEL-nano $(APP)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile $(STUCK)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(READY)
	$(BIN)/python -m pytest --cov=bagel --cov=bagel_compress --cov-report=term --cov-report=html:out/coverage

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

gpu-day: $(READY)  # make gpu-day ARGS="kernels decoders"; ARGS=--dry-run without a GPU
	$(BIN)/python benchmarks/gpu_day.py $(ARGS)

mutants: $(READY)  # make mutants MODULE=bagel/settings.py TESTS=tests/bagel/test_settings.py
	$(BIN)/python benchmarks/mutants.py $(MODULE) --tests $(TESTS)

nano: $(READY)
	$(BIN)/bagel-compress train-nano --out out/BAGEL-nano

nano-table: $(READY)
	$(BIN)/python benchmarks/nano_table.py

clean:
	rm -rf out
