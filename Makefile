# Two commands do all the set-up on a fresh Debian 12 with a Rust toolchain:
#   make demo   builds noblink and shows it at work
#   make test   passes the tests
# and `make test-page` those that need a browser.
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo

.PHONY: bench bench-swap deb demo build test test-monitoring test-page lint setup setup-tests soak fuzz

demo: build
	target/release/noblink demo $(ARGS)

build: setup
	$(CARGO) build --release --locked

# The Debian package, into target/debian.
deb: build
	scripts/package

test: setup-tests lint
	$(CARGO) test --locked

# Our metrics, alert rules and Grafana board against a real Prometheus, of Debian, in lib/prometheus.
test-monitoring: setup-tests
	@scripts/setup --monitoring
	$(CARGO) test --locked --test it -- --ignored house::prometheus --nocapture

# The page in a headless Chromium, and its API under schemathesis, of a real box. What the page
# looked like is in target/page.
test-page:
	@scripts/setup --page
	$(CARGO) build --locked --bin noblink --example camera
	node tests/page/api.mjs
	cd tests/page && node_modules/.bin/playwright test

# cargo-deny reads the manifests of other platforms' crates too, which a build does not fetch.
lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then \
	  $(CARGO) fetch --locked --quiet && $(CARGO) deny --offline check bans licenses sources; \
	else \
	  echo "NOT CHECKED: licences and bans of the dependencies (no cargo-deny: cargo install cargo-deny)"; \
	fi

setup:
	@scripts/setup

setup-tests:
	@scripts/setup --tests

# noblink beside what a user would otherwise run, and beside bare runs and decoding: in turns of two
# seconds, on one clip, some ten minutes. PYTHON names an interpreter with
# benches/peers/requirements.txt; MODEL, INT8 (the same network) and CLIP other files.
# ARGS="--rounds 1 --turns 2" for a look; ARGS=--docs writes the result into docs/.
bench: build
	$(or $(PYTHON),python3) benches/peers/compare.py $(MODEL:%=--model %) $(INT8:%=--int8 %) $(CLIP:%=--clip %) $(ARGS)

# 500 swaps with what they do to the results, half an hour; SWAPS=50 for a look. Beside it the usual
# Python way, if PYTHON names an interpreter that has ultralytics.
SWAPS ?= 500
CLIPS := models/clips/line-a.mp4 models/clips/line-a.mp4
bench-swap: build
	target/release/noblink bench swap $(CLIPS:%=--clip %) --swaps $(SWAPS) --updates 20
	@if [ -n "$(PYTHON)" ]; then \
	  echo; echo "Ultralytics, the same cameras and models:"; \
	  $(PYTHON) benches/peers/ultralytics_swap.py --clip $(CLIPS); \
	else \
	  echo "NOT MEASURED: the usual Python way (PYTHON=… make bench-swap, with ultralytics installed)"; \
	fi

# An hour and a half; SOAK_SECONDS=180 SOAK_KILLS=10 for a look.
soak: setup-tests
	$(CARGO) test --locked --test soak -- --nocapture --test-threads 1

# Ten minutes for each target; FUZZ_SECONDS=60 for a look, TARGETS="onnx address" for some.
fuzz: setup
	@scripts/fuzz $(TARGETS)
