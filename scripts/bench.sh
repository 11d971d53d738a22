#!/usr/bin/env bash
# The ratios that this state of the project is judged by, each with its negative control. No reruns until it passes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
status=0
for ratio in 4 6 7 8; do
    timeout 1500 "${CARGO_TARGET_DIR:-target}/release/penstock-perf" ratio "$ratio" || status=1
done
exit $status
