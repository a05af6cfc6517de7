# make setup   .venv with a pinned torch, the build tools, and the wheel (built from source and installed)
# make demo    train a small Llama on 4 processes and check it against one; ARGS="--steps 200 --dp 2 --cp 2" changes it
# make test    GoogleTest for the planner core, then pytest against the installed wheel
# make test-gpu, bench-gpu    on a Hopper GPU, against the package installed for PYTHON (.ci/gpu has the pieces)
# make lint    style and types         make bench    CPU benchmark tables         make clean    remove what was built

TORCH  ?= torch==2.13.0
PYTHON ?= python3
ARGS   ?=

VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check install -q
SOURCES := pyproject.toml README.md $(shell find cmake csrc src -type f -not -path '*/__pycache__/*')
READY   := $(VENV)/wheel.stamp
# A new pin makes a new environment: it is in the stamp's name.
TOOLS   := $(VENV)/$(firstword $(TORCH)).stamp

.PHONY: setup demo test cpp-test python-test test-gpu lint bench bench-gpu clean

setup: $(READY)

$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python >= 3.10 is needed, $$($(PYTHON) -V) was found: make PYTHON=/path/to/python3"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile $(TORCH) 'scikit-build-core>=0.10' 'cmake>=3.24' ninja
	@touch $@

$(READY): $(TOOLS) $(SOURCES)
	$(PIP) --no-build-isolation '.[demo,test]'
	@touch $@

demo: setup
	$(PY) examples/train.py $(ARGS)

test: cpp-test python-test

CONFIGURE = $(VENV)/bin/cmake -S cmake -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DMAGI_CPP_TESTS=ON

cpp-test: $(TOOLS)
	@mkdir -p build
	@$(CONFIGURE) > build/cpp.log 2>&1 || grep -q GTest build/cpp.log || { cat build/cpp.log; exit 1; }
	@! grep -q 'provided by "GTest"\|Could NOT find GTest' build/cpp.log || { $(INSTALL_GTEST); $(CONFIGURE); }
	$(VENV)/bin/cmake --build build/cpp
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure --no-tests=error

# As root or where sudo asks for no password; otherwise the message.
define INSTALL_GTEST
sudo=$$(test $$(id -u) = 0 || echo sudo -n); \
{ command -v apt-get > /dev/null && $$sudo apt-get update -qq && $$sudo apt-get install -y -qq libgtest-dev; } \
|| { echo "GoogleTest was not found and could not be installed: apt-get install libgtest-dev (Fedora: gtest-devel)"; exit 1; }
endef

python-test: setup
	@$(PY) -c 'import magi_attention as m, sys; sys.exit(0 if m.__file__.startswith(sys.prefix) else f"tests the wrong package: {m.__file__}")'
	$(PY) -m pytest

test-gpu:
	PYTHON=$(PYTHON) bash .ci/gpu test
	PYTHON=$(PYTHON) bash .ci/gpu sanitize

$(VENV)/lint.stamp: $(READY)
	$(PIP) --no-build-isolation '.[dev]'
	@touch $@

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

bench: setup
	$(PY) benchmarks/ffa_cpu.py
	$(PY) benchmarks/plan.py

bench-gpu:
	PYTHON=$(PYTHON) bash .ci/gpu bench out
	$(PYTHON) benchmarks/report.py out

clean:
	rm -rf $(VENV) build dist out
