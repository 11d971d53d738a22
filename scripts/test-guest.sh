#!/usr/bin/env bash
# Guests a, b and c in full, a over several paths too: the ignored tests of the guest files, one at a time (two cores).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
# The build with seeded bugs: one counts writes before the drive's barrier, which a guest must notice; one makes a store fall, which
# the others must survive. Kept apart from the real daemon.
cargo build --release -p penstock-node --features canary --target-dir "$target/canary"
PENSTOCK_CANARY_PENSTOCKD=$(realpath "$target/canary/release/penstockd")
export PENSTOCK_CANARY_PENSTOCKD
# About 15 minutes on two quiet cores and as long as the multipath guests take; several times that on busy ones.
exec timeout --kill-after=10 5400 cargo test --release -p penstock --no-fail-fast --test guest_boot --test guest_nvmf --test guest_multipath --test guest_vhost --test guest_nvme \
    --test process_quarantine \
    -- --include-ignored --nocapture --test-threads 1
