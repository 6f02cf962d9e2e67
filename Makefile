# Every command that we run. `make demo` and `make test` start from a bare Debian or Ubuntu.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard fastkv_ext/*.p* fastkv_ext/cpp/*)
CPP := $(wildcard fastkv_ext/cpp/*.cpp)
CXX ?= g++
WARNINGS := -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -Wno-missing-field-initializers

.PHONY: help demo bench bench-short bench-lmcache bench-vllm conformance test check lint test-cpp test-python faults soak asan tsan \
	fuzz clang dev format clean
help:
	@echo 'make demo    a KV cache through fastkv and redis-py, side by side'
	@echo 'make bench   beside its peers and the raw ceiling, half an hour; bench-short: three minutes'
	@echo 'make bench-lmcache  beside LMCache'"'"'s own clients, measured by LMCache'
	@echo 'make bench-vllm  vLLM and LMCache with fastkv on the CPU, end to end; quarter of an hour'
	@echo 'make test    lint, types, C++ tests, Python tests'
	@echo 'make conformance  redis-py'"'"'s own tests with our classes, all of them, half an hour'
	@echo 'make faults  networks, servers and callers that misbehave, the long form; make soak: ten minutes of it'
	@echo 'make asan    C++ and Python tests under AddressSanitizer, LeakSanitizer and UBSan; make tsan: C++ tests under ThreadSanitizer'
	@echo 'make fuzz    bytes from a hostile server for the codec and the session; FUZZ_SECONDS=60 each'
	@echo 'make dev     editable build with assertions on'
	@echo 'make format  what the formatters do'

demo: $(BIN)/.demo
	$(BIN)/fastkv demo

# All sizes, transports, servers and peers; report, plots and tables land in build/bench.
bench: $(BIN)/.bench
	$(BIN)/python -m bench.run

bench-short: $(BIN)/.bench
	$(BIN)/python -m bench.run --short

# Beside LMCache's own clients, measured by LMCache; ten minutes.
bench-lmcache: $(BIN)/.bench $(BIN)/.lmcache
	PYTHONHASHSEED=0 $(BIN)/python -m bench.lmcache_bench

# In an environment of its own, build/vllm.
bench-vllm:
	PYTHON=$(PYTHON) bench/vllm_cpu/run.sh

test check: lint test-cpp test-python

# What pip cannot install: a compiler, the headers of Python and OpenSSL, venv.
$(BIN)/python:
	PYTHON=$(PYTHON) .ci/system-packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(BIN)/.demo: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[demo]'
	@touch $@

# LMCache as it runs without a GPU: pip would bring CUDA, and what talks to it.
$(BIN)/.lmcache: $(BIN)/python bench/lmcache-requirements.txt
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q --no-deps lmcache==0.5.6
	$(BIN)/python -m pip install -q -r bench/lmcache-requirements.txt
	@touch $@

# LMCache's client needs torch, and nothing else of what LMCache asks for.
$(BIN)/.bench: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q --no-deps lmcache==0.5.6
	@touch $@

$(BIN)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[cli,test]' --group dev
	@touch $@

dev: $(BIN)/.test
	FASTKV_DEBUG=1 $(BIN)/python -m pip install -q -e .

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fastkv._core
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint fastkv_ext/*.pyx fastkv_ext/*.pxd
	$(BIN)/clang-format --dry-run -Werror fastkv_ext/cpp/* tests/cpp/* tests/fuzz/*.cpp bench/*.cpp
	@printf '%s\n' $(CPP) | xargs -P "$$(nproc)" -I{} $(BIN)/clang-tidy --quiet {} -- -std=c++20 -Ifastkv_ext/cpp
	$(BIN)/codespell

# Programs over check.hpp, linked with all of cpp/. Each of their tests has a process of its own, and
# waits more than it works; and what the fuzzer has found worth keeping is replayed.
# SANITIZE=address,undefined or thread, as the compiler names them.
SANITIZE :=
BUILD := build/cpp$(SANITIZE:%=-%)
CPP_TESTS := $(patsubst tests/cpp/%.cpp,$(BUILD)/%,$(wildcard tests/cpp/test_*.cpp))
FUZZED := resp session
OBJECTS := $(patsubst fastkv_ext/cpp/%.cpp,$(BUILD)/%.o,$(filter-out %/tls_missing.cpp,$(CPP)))
# Or make would take them for intermediate files, and delete them.
.SECONDARY: $(OBJECTS)
HEADERS := $(wildcard fastkv_ext/cpp/*.hpp tests/cpp/*.hpp)
INCLUDE := -Ifastkv_ext/cpp -Itests/cpp
COMPILE = $(CXX) -std=c++20 -O1 -g -pthread -D_GLIBCXX_ASSERTIONS $(WARNINGS) $(INCLUDE) \
	$(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer)

$(BUILD)/%.o: fastkv_ext/cpp/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(COMPILE) -c $< -o $@

$(BUILD)/test_%: tests/cpp/test_%.cpp $(OBJECTS) $(HEADERS)
	$(COMPILE) $< $(OBJECTS) -lssl -lcrypto -o $@

$(BUILD)/replay_%: tests/fuzz/fuzz_%.cpp tests/fuzz/replay.cpp $(OBJECTS) $(HEADERS)
	$(COMPILE) $(filter %.cpp,$^) $(OBJECTS) -lssl -lcrypto -o $@

test-cpp: $(BIN)/python
	@$(MAKE) -s -j "$$(nproc)" $(CPP_TESTS) $(FUZZED:%=$(BUILD)/replay_%)
	@for program in $(CPP_TESTS); do \
	  names=$$($$program --list) || exit 1; printf "$$program %s\n" $$names; \
	done > $(BUILD)/tests
	@xargs -a $(BUILD)/tests -n 2 -P "$$(( $(if $(SANITIZE),1,3) * $$(nproc) ))" sh -c \
	  'said=$$($$0 $$1 2>&1) || { echo "$$0 $$1: $$said"; exit 1; }'
	@echo "$$(wc -l < $(BUILD)/tests) C++ tests passed"
	@for target in $(FUZZED); do echo $(BUILD)/replay_$$target; \
	  $(BUILD)/replay_$$target tests/fuzz/corpus/$$target || exit 1; done

# The extension is built beside the usual one, and its runtime must come before all others. Left out
# are tests that measure memory or time, those without memory or descriptors, which the sanitizer
# needs, too, and those of benchmarks: it would find leaks in the compiler that they call. A child
# of a fork hangs if another thread was in GCC 12's sanitizer then: hundreds of forks are too many.
# In a child of a fork that Python was not told of, LeakSanitizer looks for the parent's threads.
ASAN_TESTS := not memory_is_flat and not takes_milliseconds and not out_of_descriptors and not no_descriptors and not each_allocation and not at_any_line_of_a_fork and not forks_at_any_line and not nobody_was_told_of
asan: $(BIN)/.test
	@$(MAKE) test-cpp SANITIZE=address,undefined
	FASTKV_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	LSAN_OPTIONS=suppressions=$(CURDIR)/tests/python.supp:print_suppressions=0 ASAN_OPTIONS=malloc_context_size=2 \
	PYTHONMALLOC=malloc PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/asan/lib:$(CURDIR) \
	  $(BIN)/python -m pytest --import-mode=append -k '$(ASAN_TESTS)' \
	  --ignore tests/integration/test_bench.py $(TESTS)

tsan: $(BIN)/python
	@$(MAKE) test-cpp SANITIZE=thread

# New inputs go to build/fuzz; what crashes is written there, too. FUZZ_SANITIZE= finds no stray
# access but what the targets look for, and is ten times as fast: for breadth, and what it finds can
# be replayed under the sanitizers.
FUZZ_SECONDS ?= 60
FUZZ_SANITIZE ?= address,undefined
CLANG ?= clang++
FUZZ_BUILD := build/fuzz/$(or $(FUZZ_SANITIZE),fast)
FUZZ_OBJECTS := $(patsubst %,$(FUZZ_BUILD)/%.o,resp session session_ranges ranged_value)
FUZZ_COMPILE = $(CLANG) -std=c++20 -O2 -g $(INCLUDE) \
	$(if $(FUZZ_SANITIZE),-fsanitize=$(FUZZ_SANITIZE) -fno-sanitize-recover=all)
fuzz: $(FUZZED:%=fuzz-%)

clang:
	@CLANG=$(CLANG) .ci/system-packages fuzz
	@mkdir -p $(FUZZ_BUILD)

$(FUZZ_BUILD)/%.o: fastkv_ext/cpp/%.cpp $(HEADERS) | clang
	$(FUZZ_COMPILE) -fsanitize=fuzzer-no-link -c $< -o $@

# The target itself is not what is to be covered.
$(FUZZED:%=fuzz-%): fuzz-%: tests/fuzz/fuzz_%.cpp $(FUZZ_OBJECTS)
	@mkdir -p build/fuzz/$*
	$(FUZZ_COMPILE) -c $< -o $(FUZZ_BUILD)/fuzz_$*.o
	$(FUZZ_COMPILE) -fsanitize=fuzzer $(FUZZ_BUILD)/fuzz_$*.o $(FUZZ_OBJECTS) -o $(FUZZ_BUILD)/fuzz_$*
	ASAN_OPTIONS=quarantine_size_mb=8 $(FUZZ_BUILD)/fuzz_$* build/fuzz/$* tests/fuzz/corpus/$* -dict=tests/fuzz/resp.dict \
	  -max_len=200 -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -artifact_prefix=build/fuzz/

test-python: $(BIN)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile

# What `make test` does in a short form.
faults: $(BIN)/.test
	FASTKV_FAULTS=long $(BIN)/python -m pytest -n auto --dist load tests/faults

# SOAK_SECONDS of mixed load with faults; plot and report land in build/soak.
SOAK_SECONDS ?= 600
soak: $(BIN)/.test
	$(BIN)/python -m tests.faults.soak --seconds $(SOAK_SECONDS)

# redis-py's own tests, with redis-py and with our classes in its place; then once more with our
# threads alive in every client.
conformance: $(BIN)/.test
	$(BIN)/python -m tests.conformance
	$(BIN)/python -m tests.conformance --started

format: $(BIN)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i fastkv_ext/cpp/* tests/cpp/* tests/fuzz/*.cpp bench/*.cpp

clean:
	rm -rf build dist $(VENV) fastkv/*.so *.egg-info
