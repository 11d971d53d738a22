#!/usr/bin/env bash
# Runs the tests of the crates under sys/ that hold `unsafe` under AddressSanitizer: Rust code is instrumented, SPDK is not, but
# every heap allocation of the process goes through the sanitizer's allocator (DPDK's own memory does not).
# The sanitizer's switch is unstable in rustc, hence RUSTC_BOOTSTRAP; nothing that is shipped is built so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="${RUSTFLAGS:-} -Zsanitizer=address"
# Leaks: SPDK keeps what it allocated until the process ends, and a thread that is aborted keeps its stack.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0:abort_on_error=1}
exec cargo test --release --target "$target" --target-dir target/asan -p spdk-rs "$@"
