# Two commands do all the set-up on a fresh Debian 12 with a Rust toolchain:
#   make demo   builds noblink and shows it at work
#   make test   passes the tests
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo

.PHONY: demo build test lint setup setup-tests soak fuzz

demo: build
	target/release/noblink demo $(ARGS)

build: setup
	$(CARGO) build --release --locked

test: setup-tests lint
	$(CARGO) test --locked

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then \
	  $(CARGO) deny --offline check bans licenses sources; \
	else \
	  echo "NOT CHECKED: licences and bans of the dependencies (no cargo-deny: cargo install cargo-deny)"; \
	fi

setup:
	@scripts/setup

setup-tests:
	@scripts/setup --tests

# Twelve minutes; SOAK_SECONDS=60 for a look.
soak: setup-tests
	$(CARGO) test --locked --test soak -- --nocapture --test-threads 1

# Ten minutes for each target; FUZZ_SECONDS=60 for a look, TARGETS="onnx address" for some.
fuzz: setup
	@scripts/fuzz $(TARGETS)
