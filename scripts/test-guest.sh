#!/usr/bin/env bash
# Guests a, b and c in full: the ignored tests of the guest files, one file at a time (two cores).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec timeout 3000 cargo test --release -p penstock --test guest_nvmf --test guest_vhost --test guest_nvme -- --include-ignored --nocapture --test-threads 1
