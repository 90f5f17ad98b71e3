# make install  set up .venv with everything          make demo   the whole walk on real data, CPU is enough
# make test     all tests (fair cover of matrices)    make lint   style, types, import rules
# make test-full  the exhaustive matrices as well

PYTHON ?= python3
BIN := .venv/bin
# One thread per process: tests and the demo start several processes on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-unit test-processes test-full lint

install: .venv/.installed

.venv/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[train,lsun,eval,demo,app,dev,mpi,remote]'
	touch $@

demo: install
	$(BIN)/python tools/demo/run.py --output runs/demo

# Two at a time: tests of one process leave a core idle, and those of several wait for each other.
test: install
	$(MAKE) --no-print-directory -j2 test-unit test-processes

test-unit: install
	$(BIN)/python -m pytest tests/unit

test-processes: install
	$(BIN)/python -m pytest tests/distributed tests/end_to_end tests/slurm tests/gpu

test-full: install
	rm -rf build/tables && mkdir -p build/tables
	$(BIN)/python -m pytest tests --full --tables build/tables
	mv build/tables/*.jsonl benchmarks/results/

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
