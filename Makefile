# Every target does its own set-up: Python 3.10 or newer with venv, make and a C++17 compiler are all it needs.
#   make demo    scan a real model over real text, print the most telling heads, write the report
#   make test    run the tests
#   make lint    ruff, mypy, clang-format
#   make sanitize   the kernel tests under the address, undefined-behaviour and thread sanitizers
#   make sanitize-memory   the part of it that takes no other compiler, and that .ci/run takes in
#   make bench      time attncap against torch's attention and the eager map
#   make gate       compile the GPU kernels without a GPU and hold their machine code to its budgets; half an hour
#   make qualify    prove the GPU kernels exact on the GPU of this machine and time them; PARTS=exact,speed picks parts,
#                   IMPL=triton or IMPL=cuda one implementation
#   make clean   remove what was built (the virtual environment stays)
# PYTHON names the interpreter the environment is made with, VENV the folder it is made in.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

NATIVE := $(wildcard building/*.py) $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \))

# Two test processes share the cores; each takes one thread unless a test asks for more.
TEST_JOBS ?= 2
TEST_THREADS ?= 1

.PHONY: demo test lint sanitize sanitize-memory sanitize-lanes sanitize-threads bench gate qualify clean
.DELETE_ON_ERROR:

demo: $(VENV)/.attncap-demo
	$(RUN)/attncap demo

test: $(VENV)/.attncap-test
	OMP_NUM_THREADS=$(TEST_THREADS) $(RUN)/python -m pytest -n $(TEST_JOBS)

lint: $(VENV)/.attncap-dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(RUN)/clang-format --dry-run -Werror

SANITIZE := $(CURDIR)/build/sanitize
sanitize: sanitize-memory sanitize-lanes sanitize-threads

# Python itself is not instrumented: the sanitizers' libraries are loaded before it, and its own leaks are not looked for.
# The reference's own test and Triton's are left out, for no kernel that is sanitized runs in them.
sanitize-memory: $(VENV)/.attncap-test
	ATTNCAP_SANITIZE=address,undefined $(RUN)/python setup.py -q build --build-base $(SANITIZE)/base --build-lib $(SANITIZE)/lib
	OMP_NUM_THREADS=$(TEST_THREADS) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		PYTHONPATH=$(SANITIZE)/lib PYTHONSAFEPATH=1 \
		$(RUN)/python -m pytest -n $(TEST_JOBS) --import-mode=append -q -s tests/test_attention.py tests/test_backward_cpu.py \
		tests/test_accumulate.py tests/test_sanitized.py \
		--deselect tests/test_attention.py::test_the_reference_is_the_formula -k "not triton"

sanitize-lanes: $(VENV)/.attncap-test
	ATTNCAP_SANITIZE=address,undefined $(RUN)/python -m pytest -q tests/test_lanes.py tests/test_cta_model.py

# A program of its own rather than Python: torch brings a second OpenMP library, which the thread sanitizer cannot follow.
sanitize-threads: $(VENV)/.attncap-test
	$(RUN)/python scripts/sanitize_threads.py $(SANITIZE)/threads

bench: $(VENV)/.attncap-bench
	$(RUN)/python -m pytest -o addopts= -q benchmarks
	$(RUN)/python -m benchmarks.compare_cpu
	$(RUN)/python -m benchmarks.backward_cpu
	$(RUN)/python -m benchmarks.scan_cpu

gate: $(VENV)/.attncap-test
	PYTHONPATH=kernels $(RUN)/python -m benchmarks.gate_cuda
	PYTHONPATH=kernels $(RUN)/python -m benchmarks.gate

# With the Python that has a torch for the GPU, which this project does not install. Only the CUDA kernels are built.
qualify:
	PYTHONPATH=".:kernels$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.qualify \
		$(if $(IMPL),--impl $(IMPL)) $(if $(PARTS),--parts $(PARTS))

clean:
	rm -rf build dist demo *.egg-info attncap/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/.attncap-*
	find attncap benchmarks kernels scripts tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# One stamp for the build and one per extra. The build tools are installed first and pinned like everything
# else, so that the extension is built in this environment: an isolated one would fetch its own, unpinned.
$(VENV)/.attncap-%: $(VENV)/.attncap-built
	$(RUN)/python -m pip install --quiet -c constraints.txt "attncap[$*]"
	touch $@

$(VENV)/.attncap-built: setup.py pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet -c constraints.txt setuptools pybind11
	@# Headers for nvcc, where there is one. The rest of that package, and what it depends on, is not needed.
	for package in $$($(RUN)/python -m building.nvcc); do \
		$(RUN)/python -m pip install --quiet -c constraints.txt --no-deps $$package \
			|| echo "$$package cannot be installed: going on without CUDA kernels"; done
	$(RUN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
