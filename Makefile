# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-quick lint bench gpu parity wheel fuzz sanitize clean setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/build.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/statewise demo

# One thread a worker: two workers share two cores, and results do not depend on how threads split a sum.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

test-quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -m 'not long'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Live beside other projects' packages, in an environment of its own.
parity: $(READY)
	test -x build/parity/bin/python || $(PYTHON) -m venv build/parity
	build/parity/bin/pip install --quiet -c constraints.txt -c benchmarks/constraints-peers.txt --editable '.[dev,parity]'
	build/parity/bin/pytest tests/parity

bench: $(READY)
	$(BIN)/python -m benchmarks.ops

# On a machine with a GPU, whose own torch has CUDA: tests of the kernels, memory checks, measurements. See docs/gpu.md.
# E.g. make gpu STAGES="tests ops" MINUTES=8 RWKV_LM=../RWKV-LM RESULTS=out
gpu:
	$(PYTHON) -m benchmarks.gpu_machine $(if $(STAGES),--stages "$(STAGES)") $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(RESULTS),--results $(RESULTS)) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(RWKV_LM),--rwkv-lm $(RWKV_LM)) $(if $(VISION_RWKV),--vision-rwkv $(VISION_RWKV)) $(GPU_OPTIONS)

# A wheel with the compiled kernels, installed and tested in an environment of its own.
wheel: $(READY)
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/pip install --quiet --constraint constraints.txt build/wheel/*.whl
	cd build/wheel && env/bin/statewise backends && env/bin/statewise verify rwkv7

# Examples that `make test` does not know, then ten thousand random small cases of every compiled kernel against the
# reference.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --hypothesis-profile explore $$(grep -rl 'import.*given' tests)
	OMP_NUM_THREADS=2 $(BIN)/python -m tests.fuzz_kernels --cases 10000

# Leaks are Python's own at exit; odr and the rest stay on.
sanitize: $(READY)
	$(BIN)/python csrc/build.py build/sanitized --sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		OMP_NUM_THREADS=2 $(BIN)/python -m tests.fuzz_kernels --cases 2000 --libraries build/sanitized

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
