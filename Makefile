# The doors: make demo | test | peft-tests | check | fuzz | sanitize | coverage | mutate | proofs | supply |
# bench | gpu | format.
# All but gpu happens in .venv; see docs/architecture.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := build/.installed
SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cmake' \
	-o -name '*.in' -o -name '*.py') CMakeLists.txt setup.py pyproject.toml
FORMATTED_CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu')
FORMATTED_PY := setup.py python tests examples tools

.PHONY: demo bench test test-cpp test-python peft-tests check lint fuzz sanitize sanitize-memory \
	sanitize-threads coverage mutate proofs soak kills processes supply format gpu \
	gpu-build gpu-test gpu-measure gpu-headers clean

demo: $(PACKAGE)
	$(BIN)/python examples/sentiment/demo.py

test: test-cpp test-python

test-cpp: $(PACKAGE)
	tools/system_packages.sh test
	$(BIN)/cmake -S tests/cpp -B build/tests -G Ninja \
		-DCMAKE_PREFIX_PATH=$$($(BIN)/python -m rankwise --cmake-dir) \
		-DRANKWISE_PYTHON=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/tests -j 2
	$(BIN)/ctest --test-dir build/tests --output-on-failure -j 2

PYTEST := -m pytest -n 2 --dist loadfile
test-python: $(PACKAGE)
	$(BIN)/python $(PYTEST)

# PEFT's own tests on our layers, beside stock PEFT; some minutes. Report: build/peft/all.json.
peft-tests: $(PACKAGE)
	$(BIN)/python tools/peft_tests.py

# Static rules: format, imports and includes.
lint: $(VENV)/.ready
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_CPP)
	$(BIN)/ruff format --check $(FORMATTED_PY)
	$(BIN)/ruff check $(FORMATTED_PY)
	$(BIN)/python tools/check_includes.py

# Everything, with compiler warnings as errors.
check: export RANKWISE_WARNINGS_AS_ERRORS := ON
check: lint test

# The readers of csrc/io and allocators' states under libFuzzer: 20 s of each target, or FUZZ_RUNS
# executions.
FUZZ_LIMIT = $(if $(FUZZ_RUNS),-runs=$(FUZZ_RUNS),-max_total_time=20)
fuzz: $(VENV)/.ready
	tools/system_packages.sh fuzz
	$(BIN)/cmake -S tests/fuzz -B build/fuzz -G Ninja -DCMAKE_CXX_COMPILER=clang++ \
		-DRANKWISE_PYTHON=$(CURDIR)/$(BIN)/python -DLibTorch_ROOT=$(TORCH)
	$(BIN)/cmake --build build/fuzz -j 2
	for target in adapter_config safetensors save_journal allocator_state; do \
		mkdir -p build/fuzz/corpus/$$target build/fuzz/found && \
		build/fuzz/$${target}_fuzz $(FUZZ_LIMIT) -max_len=4096 -timeout=5 -rss_limit_mb=2048 \
			-artifact_prefix=build/fuzz/found/$$target- -print_final_stats=1 \
			build/fuzz/corpus/$$target tests/fuzz/corpus/$$target || exit 1; \
	done

# The library and its C++ tests, built anew; torch itself is not instrumented.
sanitize: sanitize-memory sanitize-threads

# g++ takes torch's optional arguments for uninitialised when it instruments them.
SANITIZE := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	-fno-omit-frame-pointer -Wno-maybe-uninitialized
SANITIZE_BUILD := -G Ninja -DCMAKE_BUILD_TYPE=Debug -DRANKWISE_PYTHON=$(CURDIR)/$(BIN)/python
TORCH = $$($(BIN)/python -c "import torch; print(torch.__path__[0])")

# adapter_memory_test measures memory, which the sanitizer itself takes.
sanitize-memory: $(VENV)/.ready
	tools/system_packages.sh test
	$(BIN)/cmake -S . -B build/sanitize/rankwise $(SANITIZE_BUILD) -DLibTorch_ROOT=$(TORCH) \
		-DCMAKE_CXX_FLAGS_DEBUG="$(SANITIZE)" -DRANKWISE_WITH_CUDA=off \
		-DCMAKE_INSTALL_PREFIX=$(CURDIR)/build/sanitize/installed
	$(BIN)/cmake --build build/sanitize/rankwise -j 2
	$(BIN)/cmake --install build/sanitize/rankwise
	$(BIN)/cmake -S tests/cpp -B build/sanitize/tests $(SANITIZE_BUILD) -DLibTorch_ROOT=$(TORCH) \
		-DCMAKE_CXX_FLAGS_DEBUG="$(SANITIZE)" -DCMAKE_PREFIX_PATH=$(CURDIR)/build/sanitize/installed
	$(BIN)/cmake --build build/sanitize/tests -j 2
	$(BIN)/ctest --test-dir build/sanitize/tests --output-on-failure -E adapter_memory_test

# setarch: ThreadSanitizer does not know all the address layouts of newer kernels. The last line
# wants a failure: a race that is there must be seen.
sanitize-threads: export TSAN_OPTIONS := ignore_noninstrumented_modules=1
sanitize-threads: $(VENV)/.ready
	tools/system_packages.sh test
	$(BIN)/cmake -S tests/threads -B build/sanitize/threads $(SANITIZE_BUILD) -DLibTorch_ROOT=$(TORCH)
	$(BIN)/cmake --build build/sanitize/threads -j 2
	setarch -R build/sanitize/threads/allocator_threads_test
	setarch -R build/sanitize/threads/training_threads_test
	! setarch -R build/sanitize/threads/allocator_threads_test --gtest_also_run_disabled_tests \
		--gtest_filter='*ARaceIsReported'

# What the tests run of csrc and python/rankwise; fails under the goals. Without CUDA: host code alone.
# Counts are kept in files that processes map (%c), so that what is killed has counted too.
COVERAGE := $(CURDIR)/build/coverage
COUNTED := -O1 -fcoverage-mapping -fprofile-instr-generate=$(COVERAGE)/counts/%m%c.profraw \
	-mllvm -runtime-counter-relocation
COVERAGE_BUILD := -G Ninja -DCMAKE_BUILD_TYPE=Debug -DRANKWISE_PYTHON=$(CURDIR)/$(BIN)/python \
	-DCMAKE_CXX_COMPILER=clang++-16 -DCMAKE_CXX_FLAGS_DEBUG="$(COUNTED)"
coverage: $(VENV)/.ready
	tools/system_packages.sh test
	tools/system_packages.sh coverage
	rm -rf $(COVERAGE)/python && mkdir -p $(COVERAGE)/python
	cd python && cp --parents $$(git ls-files -co --exclude-standard rankwise) $(COVERAGE)/python
	$(BIN)/cmake -S . -B $(COVERAGE)/rankwise $(COVERAGE_BUILD) -DLibTorch_ROOT=$(TORCH) \
		-DRANKWISE_WITH_CUDA=off -DRANKWISE_WITH_PYTHON=ON \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_INSTALL_PREFIX=$(COVERAGE)/python/rankwise
	$(BIN)/cmake --build $(COVERAGE)/rankwise -j 2
	$(BIN)/cmake --install $(COVERAGE)/rankwise
	$(BIN)/cmake -S tests/cpp -B $(COVERAGE)/tests $(COVERAGE_BUILD) -DLibTorch_ROOT=$(TORCH) \
		-DCMAKE_PREFIX_PATH=$(COVERAGE)/python/rankwise -Dcuda_headers=OFF
	$(BIN)/cmake --build $(COVERAGE)/tests -j 2
	rm -rf $(COVERAGE)/counts && $(BIN)/python -m coverage erase
	$(BIN)/ctest --test-dir $(COVERAGE)/tests --output-on-failure -j 2
	LibTorch_ROOT=$(TORCH) PYTHONPATH=$(COVERAGE)/python $(BIN)/python -m coverage run $(PYTEST)
	llvm-profdata-16 merge -o $(COVERAGE)/cpp.profdata $(COVERAGE)/counts/*.profraw
	llvm-cov-16 export -summary-only -instr-profile $(COVERAGE)/cpp.profdata \
		$$(find $(COVERAGE)/python/rankwise $(COVERAGE)/tests -name CMakeFiles -prune -o \
			-type f \( -name '*.so' -o -executable \) -printf '-object %p ') > $(COVERAGE)/cpp.json
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage json -q -o $(COVERAGE)/python.json
	$(BIN)/python tools/coverage_table.py $(COVERAGE)/cpp.json $(COVERAGE)/python.json $(CURDIR)

# Small faults in the sources, of which the tests must notice 90 %: a sample, some hours. MUTATE has
# options: --sample 0 for all, --part reader, --language cpp, --seed 1.
mutate: $(PACKAGE)
	tools/system_packages.sh test
	$(BIN)/python tools/mutate.py $(MUTATE)

# What takes too long for the tests; docs/proofs.md has what each shows, and what was found.
proofs: soak kills processes

soak: $(PACKAGE)
	OMP_NUM_THREADS=1 $(BIN)/python tests/proofs/soak.py

kills: $(PACKAGE)
	OMP_NUM_THREADS=1 $(BIN)/python tests/proofs/kills.py

processes: $(PACKAGE)
	OMP_NUM_THREADS=1 $(BIN)/python tests/proofs/many_processes.py

# Other Pythons, torches and compilers, which must be there: python3.10, clang++-16, ...
supply: $(VENV)/.ready
	$(BIN)/python tools/supply.py

BENCH = cd tests && $(CURDIR)/$(BIN)/python -m bench

# glibc keeps freed memory: else page faults, up to a tenth of a step, fall on contenders by chance.
bench: export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
bench: $(PACKAGE)
	$(BENCH) layers
	$(BENCH) group
	$(BENCH) growth
	$(BENCH) tree
	$(BENCH) allocator
	$(BENCH) step
	$(BENCH) latency
	$(BENCH) footprint
	$(BENCH) overhead
	tools/system_packages.sh bench
	$(BENCH) host

# On a machine with a GPU, with the python3 that has its torch; no network, no virtual environment.
# The three parts of gpu alone: gpu-build, gpu-test and gpu-measure. ARCHITECTURE=90 builds for a
# machine to which build/gpu/site is then taken.
GPU = cd tools && $(PYTHON) -m gpu

gpu:
	$(GPU) all

gpu-build:
	$(GPU) build $(if $(ARCHITECTURE),--architecture $(ARCHITECTURE))

gpu-test:
	$(GPU) test

gpu-measure:
	$(GPU) measure

# For a GPU machine without nlohmann-json: build/headers is to be taken there.
gpu-headers: $(VENV)/.ready
	mkdir -p build/headers
	cp -r $$($(BIN)/python -c "import nlohmann_json as j; print(j.__path__[0])")/include/nlohmann build/headers/

format: $(VENV)/.ready
	$(BIN)/clang-format -i $(FORMATTED_CPP)
	$(BIN)/ruff format $(FORMATTED_PY)
	$(BIN)/ruff check --fix $(FORMATTED_PY)

$(VENV)/.ready: requirements.txt requirements-alone.txt tools/system_packages.sh
	tools/system_packages.sh build
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-alone.txt
	touch $@

$(PACKAGE): $(VENV)/.ready $(SOURCES)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pip install --disable-pip-version-check -q \
		--no-build-isolation --no-deps --force-reinstall .
	mkdir -p build && touch $@

clean:
	rm -rf build $(VENV)
