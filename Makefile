# The doors: make demo | test | check | bench | format | gpu. All but gpu happens in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := build/.installed
SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cmake' \
	-o -name '*.in' -o -name '*.py') CMakeLists.txt setup.py pyproject.toml
FORMATTED_CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu')
FORMATTED_PY := setup.py python tests examples tools

.PHONY: demo bench test test-cpp test-python check lint format gpu gpu-headers clean

demo: $(PACKAGE)
	$(BIN)/python examples/sentiment/demo.py

test: test-cpp test-python

test-cpp: $(PACKAGE)
	tools/system_packages.sh test
	$(BIN)/cmake -S tests/cpp -B build/tests -G Ninja \
		-DCMAKE_PREFIX_PATH=$$($(BIN)/python -m rankwise --cmake-dir) \
		-DRANKWISE_PYTHON=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/tests -j 2
	$(BIN)/ctest --test-dir build/tests --output-on-failure

test-python: $(PACKAGE)
	$(BIN)/python -m pytest

# Static rules: format, imports and includes.
lint: $(VENV)/.ready
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_CPP)
	$(BIN)/ruff format --check $(FORMATTED_PY)
	$(BIN)/ruff check $(FORMATTED_PY)
	$(BIN)/python tools/check_includes.py

# Everything, with compiler warnings as errors.
check: export RANKWISE_WARNINGS_AS_ERRORS := ON
check: lint test

# glibc keeps freed memory: else page faults, up to a tenth of a step, fall on contenders by chance.
bench: export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
bench: $(PACKAGE)
	$(BIN)/python tests/bench/layers.py
	$(BIN)/python tests/bench/allocator.py
	$(BIN)/python tests/bench/adalora_step.py

# On a machine with a GPU, with the python3 that has its torch; no network, no virtual environment.
gpu:
	$(PYTHON) tools/gpu.py

# For a GPU machine without nlohmann-json: build/headers is to be taken there.
gpu-headers: $(VENV)/.ready
	mkdir -p build/headers
	cp -r $$($(BIN)/python -c "import nlohmann_json as j; print(j.__path__[0])")/include/nlohmann build/headers/

format: $(VENV)/.ready
	$(BIN)/clang-format -i $(FORMATTED_CPP)
	$(BIN)/ruff format $(FORMATTED_PY)
	$(BIN)/ruff check --fix $(FORMATTED_PY)

$(VENV)/.ready: requirements.txt tools/system_packages.sh
	tools/system_packages.sh build
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(PACKAGE): $(VENV)/.ready $(SOURCES)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pip install --disable-pip-version-check -q \
		--no-build-isolation --no-deps --force-reinstall .
	mkdir -p build && touch $@

clean:
	rm -rf build $(VENV)
