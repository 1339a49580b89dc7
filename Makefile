# Each target sets up what it needs first (scripts/setup.sh: quick when nothing is missing).
# `.ci/run` calls these same targets, so what passes here passes there.

FUZZ_SECONDS ?= 60
BENCH_ARGS   ?=
GUEST_TESTS  ?= tracking
SOAK_MOVES   ?= 10000
SOAK_SEED    ?= 1
GUEST_ARGS   ?= --test-threads=1
BENCHES      := $(sort $(notdir $(patsubst %/main.rs,%,$(patsubst %.rs,%,$(wildcard benches/*.rs benches/*/main.rs)))))

.PHONY: help demo test test-guest soak check bench bench-report fuzz

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: ## Move a running program from one process to another, live
	@scripts/setup.sh build
	cargo run --release --example live_migration

test: ## Run all tests: unit, integration and documentation
	@scripts/setup.sh build
	cargo test

# For what the kernel outside may lack: soft-dirty, and later modules. scripts/guest.sh says what else can be set.
test-guest: ## Run the tests of GUEST_TESTS (tracking) in a virtual machine with Debian's kernel 6.12
	@scripts/setup.sh guest
	scripts/test_guest.sh $(GUEST_TESTS) -- $(GUEST_ARGS)

soak: ## Move programs SOAK_MOVES (10000) times among killed processes and broken paths; SOAK_SEED (1) says which
	@scripts/setup.sh build
	CHAOS_MOVES=$(SOAK_MOVES) CHAOS_SEED=$(SOAK_SEED) cargo test --test chaos -- --nocapture moves_lose_nothing_whatever_happens

check: ## Format, lints, documentation, licences and advisories; runs no test
	@scripts/setup.sh check
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --manifest-path fuzz/Cargo.toml --target-dir $(or $(CARGO_TARGET_DIR),target) -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items
	cargo deny check bans licenses sources
	@if why=$$(cargo deny fetch db 2>&1); then set -x; cargo deny check advisories; else \
	  printf '%s\n' "$$why" "WARNING: known vulnerabilities were NOT checked: the advisory database cannot be fetched." >&2; fi

bench: ## Run every bench into bench-results/: JSON, plots, a summary (BENCH_ARGS=--quick: under a minute each)
	@scripts/setup.sh build
	@mkdir -p bench-results
	@set -e; for bench in $(or $(BENCHES),$(error benches/ holds no bench)); do set -x; \
	  cargo bench --bench $$bench -- $(BENCH_ARGS) --json $(CURDIR)/bench-results/$$bench.json; { set +x; } 2>/dev/null; done
	cargo bench --bench report -- $(CURDIR)/bench-results

# Apart from `bench`, so that a look at some figures leaves the committed page alone.
bench-report: ## Write docs/benchmarks.md and its pictures from what `make bench` measured last
	@scripts/setup.sh build
	cargo bench --bench report -- $(CURDIR)/bench-results --docs $(CURDIR)/docs

# `--sanitizer none` is what a stable compiler can do, and enough: the targets reach no unsafe code, and overflow checks stay on.
# New inputs go to the first folder; fuzz/corpus holds the committed seeds only.
fuzz: ## Fuzz each target for FUZZ_SECONDS (60)
	@scripts/setup.sh fuzz
	@set -e; for target in $$(cargo fuzz list); do mkdir -p fuzz/found/$$target fuzz/corpus/$$target; set -x; \
	  cargo fuzz run --sanitizer none $$target fuzz/found/$$target fuzz/corpus/$$target -- \
	    -max_total_time=$(FUZZ_SECONDS); { set +x; } 2>/dev/null; done
