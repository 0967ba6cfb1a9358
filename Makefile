# make study   install into .venv-study, then run the Hessian-norm study on MNIST-1D
# make test    install into .venv-test, then lint, sanitizers and tests: all that CI runs
# make bench   install as for test, then run the benchmark suite
# make format  rewrite the sources as the formatters want them
# make clean   remove builds, caches and both environments
#
# TORCH is what pip installs first, before anything that depends on torch; PYTHON makes the
# environments:  make test PYTHON=python3.12 TORCH=torch==2.6.0
# TRITON, for make test: the compiler whose figures of the kernels the tests look at.
# TORCH pins a CPU build, beside which the CUDA engine cannot run: it is left out, unless
# HVPFAST_CUDA=on|auto says otherwise.

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
HVPFAST_CUDA ?= off
export HVPFAST_CUDA

STUDY := .venv-study
TEST := .venv-test
BIN := $(TEST)/bin
STAMP := torch-$(shell echo '$(PYTHON) $(TORCH) $(TRITON)' | cksum | cut -d ' ' -f 1)

BUILD_SOURCES := pyproject.toml setup.py MANIFEST.in CMakeLists.txt $(shell find csrc -type f)
PACKAGE := $(shell find hvpfast -name '*.py' -o -name '*.md' -o -name '*.pyi' -o -name '*.jinja' -o -name py.typed)
CPP = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: study test bench lint format sanitizers sanitize pytest clean

study: $(STUDY)/installed
	$(STUDY)/bin/hvpfast study hessian-norm --preset default

# The cheapest finding comes first, pytest's summary last. The sanitizers' build needs nothing of the
# installation but CMake and Ninja: it runs beside the downloads and the linters, and what it built
# beside pytest. The output of each target of the first step is printed when it ends, where make can
# keep it apart.
APART := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
test:
	$(MAKE) --jobs 2 $(APART) lint sanitizers
	$(MAKE) --jobs 2 sanitize pytest

bench: $(TEST)/installed
	$(BIN)/hvpfast bench

lint: $(TEST)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict hvpfast
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(TEST)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The kernels without Python, under AddressSanitizer and UndefinedBehaviorSanitizer;
# SANITIZE=thread looks for races instead.
SANITIZE ?= address,undefined
sanitizers: $(TEST)/environment-$(STAMP)
	$(BIN)/cmake -G Ninja -S . -B build/sanitize -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DHVPFAST_PYTHON=OFF -DHVPFAST_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/sanitize --target sanitize

sanitize: sanitizers
	build/sanitize/sanitize

# A file's tests stay on one worker: they share what they build. In order: some long ones come early.
# A worker takes about 1 GB.
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
    --durations 25 --durations-min 1
pytest: $(TEST)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# --no-compile: Python compiles a module when it is imported, and most of them never are.
# The stamp's name holds PYTHON and TORCH: when one changes, the environment is made anew.
$(STUDY)/environment-$(STAMP) $(TEST)/environment-$(STAMP):
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(if $(filter $(TEST),$(@D)),$(@D)/bin/pip install --no-compile cmake ninja)
	touch $@

$(STUDY)/$(STAMP) $(TEST)/$(STAMP): %/$(STAMP): %/environment-$(STAMP)
	$(@D)/bin/pip install --no-compile '$(TORCH)'
	touch $@

$(STUDY)/installed: $(STUDY)/$(STAMP) $(BUILD_SOURCES) $(PACKAGE)
	$(STUDY)/bin/pip install --no-compile '.[studies]'
	touch $@

$(TEST)/installed: $(TEST)/$(STAMP) $(BUILD_SOURCES)
	$(BIN)/pip install --no-compile '$(TORCH)' '$(TRITON)' -e '.[dev,studies,bench,compat,triton]'
	touch $@

clean:
	rm -rf build dist *.egg-info $(STUDY) $(TEST) .mypy_cache .pytest_cache .ruff_cache
	find hvpfast tests -name __pycache__ -prune -exec rm -rf {} +
	find hvpfast -name '*.so' -delete
