# Every command that the README names. Two do all the set-up: `make setup`, then `make`.
#
# What is fetched or built outside the checkout lies in $PENSTOCK_CACHE (default ~/.cache/penstock).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
SEEDS ?= 500
SECONDS ?= 60
MINUTES ?= 10

# The parts of the workspace that need SPDK are built with it; `build` makes every program.
PROGRAMS := -p penstock-node -p penstock-control -p penstock-cli -p penstock-hugepages -p penstock-perf

.PHONY: all setup spdk build demo demo-one test test-unit test-process test-guest sim bench chaos fuzz sanitize lint fmt help

all: build

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | column -t -s "$$(printf '\t')"

setup: ## install system packages (root: apt; else says what is missing) and build SPDK
	@scripts/setup.sh
	@$(MAKE) --no-print-directory spdk

spdk: ## obtain, patch and build SPDK v26.01, cached outside the checkout
	@sys/spdk.sh

build: spdk ## build every program (target/release)
	@$(CARGO) build --release $(PROGRAMS)

demo: setup ## three nodes, verified writes, the leader killed -9 in mid-write, back and caught up, every acknowledged block verified on all replicas
	@$(MAKE) --no-print-directory build
	@scripts/demo.sh

demo-one: setup ## one node, verified writes over NVMe/TCP, kill -9 in mid-write, every acknowledged block verified
	@$(MAKE) --no-print-directory build
	@scripts/demo-one.sh

test: setup ## unit, property, simulator (>= 500 seeds), process, tidy tests, guest smoke; ends with totals
	@$(MAKE) --no-print-directory build
	@scripts/test.sh

test-guest: setup ## Linux guests under QEMU in full: NVMe/TCP, multipath over three nodes whose leaders die, vhost-user-blk, and penstockd inside over a recorded drive
	@$(MAKE) --no-print-directory build
	@scripts/test-guest.sh

sim: ## simulate one node, groups and fleets, and prove that seeded bugs are caught: make sim SEEDS=2000
	@$(CARGO) build --release -q -p penstock-sim
	@target/release/penstock-sim --all --seeds $(SEEDS) --canaries

bench: setup ## ratios 1, 2, 3, 4, 6, 7, 8, 9 against SPDK, with intervals and negative controls
	@$(MAKE) --no-print-directory build
	@scripts/bench.sh

chaos: setup ## three real nodes under faults and a verifier: make chaos MINUTES=10
	@$(MAKE) --no-print-directory build
	@scripts/chaos.sh $(MINUTES)

fuzz: ## fuzz every parser of bytes that others write: make fuzz SECONDS=60
	@scripts/fuzz.sh $(SECONDS)

sanitize: spdk ## AddressSanitizer over the tests of sys/ (own target folder)
	@RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address $(CARGO) test --release --target x86_64-unknown-linux-gnu --target-dir target/asan -p penstock-uring -p spdk-rs

lint: ## rustfmt and clippy, warnings are errors
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@$(CARGO) fmt --manifest-path tests/fuzz/Cargo.toml --check
	@$(CARGO) clippy --release --target-dir target --manifest-path tests/fuzz/Cargo.toml -- -D warnings

fmt:
	@$(CARGO) fmt --all
