# Two commands do everything from nothing: `make demo` and `make test`.
# BACKEND chooses what libllama computes on: auto, cpu, cuda, metal, vulkan, hip.

PYTHON ?= python3
VENV := .venv
# What was chosen before stays chosen.
BACKEND ?= $(or $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*))),auto)
BIN := $(VENV)/bin
TREE := build/tree
# What, when changed, makes an installation stale. Python sources are used in place.
INSTALL_INPUTS := pyproject.toml setup.py scripts/build_llama.sh scripts/unmasked_cells.h llama_ffi/build.py llama_ffi/shim.h llama_ffi/shim.cpp llama_ffi/graph_check.h llama_ffi/graph_check.cpp

# What it is, for the reader; the extra.
define install
@prefix=$$(PYTHON="$(PYTHON)" scripts/build_llama.sh --backend $(BACKEND)) && \
echo "setup: installing $(1)" && \
ERLLAMA_LLAMA_PREFIX="$$prefix" $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(2)]'
endef

.PHONY: setup demo demo-model test lint format docs fuzz stress bench bench-quick profile wheel clean

setup: $(VENV)/.installed-$(BACKEND)

$(VENV)/.installed-$(BACKEND): $(INSTALL_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "erllama needs Python 3.11 or newer; set PYTHON" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setup: virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	$(call install,erllama and its development tools,dev)
	@rm -f $(VENV)/.installed-* && touch $@

demo: setup
	@$(BIN)/python -m erllama demo

# Trains anew the model that `demo` uses: half an hour or so on two cores; interrupted, it goes on where it was.
demo-model: setup
	$(call install,what training needs,train)
	$(BIN)/python -m scripts.demo_model $(DEMO_MODEL)

# WORKERS=2 runs two tests at a time.
test: setup
	$(BIN)/python -m pytest $(if $(WORKERS),-n $(WORKERS) --dist worksteal)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TREE) && mkdir -p $(TREE)/erllama && ln -s $(addprefix $(CURDIR)/,$(wildcard erllama/*) engine cache llama_ffi) $(TREE)/erllama/
	@ln -s $(CURDIR)/scripts $(TREE)/scripts
	cd $(TREE) && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p erllama -p scripts.demo_model
	cd $(TREE) && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site; what mkdocs says of its own future is no warning about the pages.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The long form of the suite's fuzzing of models, adapters and archives: headers, then of types, shapes and hyperparameters.
fuzz: setup
	ERLLAMA_FUZZ_N=$(or $(N),20000) $(BIN)/python -m pytest --timeout 7200 tests/models/test_bad_files.py -k flipped_bytes_in_a_header
	ERLLAMA_FUZZ_N=$(or $(N),20000) $(BIN)/python -m pytest --timeout 7200 tests/models/test_adapters_refused.py -k flipped_bytes
	ERLLAMA_FUZZ_N=$(or $(N),20000) $(BIN)/python -m pytest --timeout 7200 tests/storage/test_archives.py -k flipped_bytes
	ERLLAMA_FUZZ_N=$(or $(N),10000) $(BIN)/python -m pytest --timeout 14400 tests/models/test_mutated_models.py -k no_mutant

# The long forms of what the suite does briefly: kills, signals, faults, mutations, processes, state machines.
stress: setup
	ERLLAMA_KILLS=200 ERLLAMA_MUTATIONS=10000 ERLLAMA_SHARING_SECONDS=60 ERLLAMA_LOCK_SECONDS=10 \
	ERLLAMA_SOAK=10000 ERLLAMA_SIGNALS=10000 ERLLAMA_GRAMMARS=500 ERLLAMA_TOOL_VALUES=2000 ERLLAMA_SPECULATION=200 ERLLAMA_ADAPTERS=3000 ERLLAMA_HARNESS_EXAMPLES=$(or $(N),500) $(BIN)/python -m pytest --timeout 3600 --durations=25 \
	tests/storage/test_crashes.py tests/storage/test_storage_faults.py tests/storage/test_mutations.py tests/storage/test_sharing.py tests/harness/test_harness.py tests/serving/test_soak.py \
	tests/structured/test_constrained.py tests/structured/test_schema_numbers.py tests/exactness/test_speculation.py tests/exactness/test_adapters_cached.py tests/structured/test_tool_values.py tests/process/test_signals.py

# Side by side with llama.cpp's own tools, which are built first: half an hour, on a machine that does nothing else.
# BENCH holds more, as BENCH="--shape 1.1b --runs 3 one agents".
bench: setup
	$(BIN)/python -m benchmarks $(BENCH)

bench-quick: setup
	$(BIN)/python -m benchmarks --quick $(BENCH)

profile: setup
	@mkdir -p build
	$(BIN)/python -m benchmarks.ticks $(PROFILE)

wheel: setup
	rm -rf build/lib.* build/bdist.* && $(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	rm -f llama_ffi/*.so llama_ffi/*.so.* llama_ffi/*.dylib llama_ffi/build.json llama_ffi/LICENSE.llama.cpp
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
