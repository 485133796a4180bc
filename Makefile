# make demo and make test need only a Rust toolchain, Python >= 3.10 and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export VIRTUAL_ENV := $(abspath $(VENV))
export PIP_QUIET := 1
# One profile for everything: each dependency is compiled once for running and once for checking.
CARGO_FLAGS := --release
NEXTEST := $(shell command -v cargo-nextest >/dev/null 2>&1 && echo yes)

.PHONY: all setup build test test-rust test-python test-asan lint bench demo wheel check-cuda clean
all: build

setup: $(BIN)/.ready

$(BIN)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed: make PYTHON=/path/to/python3 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" "maturin>=1.9,<2"
	@touch $@

# The package, editable, with what it needs to run.
build: setup
	$(BIN)/maturin develop $(CARGO_FLAGS) --quiet

# What the tests need: PyTorch, transformers and lm-eval among it.
$(BIN)/.ready-test: $(BIN)/.ready
	$(BIN)/maturin develop $(CARGO_FLAGS) --quiet --extras test
	@touch $@

test: test-rust test-python

test-rust:
ifeq ($(NEXTEST),yes)
	cargo nextest run $(CARGO_FLAGS) --workspace --no-fail-fast
else
	cargo test $(CARGO_FLAGS) --workspace --lib --bins --tests --no-fail-fast
endif
	cargo test $(CARGO_FLAGS) --workspace --doc

# The kernels under address sanitizer, on every instruction set that this processor has. RUSTC_BOOTSTRAP: a nightly option.
test-asan:
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test $(CARGO_FLAGS) -p mqadapt-kernels --lib \
	  --target $(shell rustc -vV | sed -n 's/host: //p') --target-dir target/asan

test-python: $(BIN)/.ready-test build
	$(BIN)/python -m pytest -n 2

lint: build
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --workspace --no-deps --quiet
	@command -v cargo-deny >/dev/null 2>&1 || cargo install --locked --quiet cargo-deny
	cargo deny --log-level error check bans licenses sources
	$(BIN)/python -m pip install --quiet --group lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest mqadapt_rs._core --mypy-config-file pyproject.toml

bench: build
	cargo bench --workspace

demo: build
	$(BIN)/mqadapt demo

# A wheel in dist/ for Linux with glibc 2.17 or newer on this architecture and Python 3.10 or newer; installing it needs no Rust. Zig, from
# PyPI, links against the old glibc. Compiles everything once more, for that target: about 15 minutes on two cores.
wheel: setup
	$(BIN)/python -m pip install --quiet --group wheel
	rm -f dist/mqadapt_rs-*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build $(CARGO_FLAGS) --strip --zig --compatibility manylinux_2_17 --out dist
	$(BIN)/python .ci/check-wheel dist/mqadapt_rs-*.whl $(MODEL)

# Compiles with CUDA, without a GPU: nvcc comes from PyPI. Ten minutes and more the first time.
check-cuda:
	.ci/check-cuda

clean:
	rm -rf $(VENV) dist demo
	cargo clean
