#!/usr/bin/env bash
# The ratios that this state of the project is judged by, each with its negative control. No reruns until it passes.
#
# As root it lends both arms hugepages for the time (with 4 KiB pages cold copies measure the TLB) and gives them back.
# The lock of a benchmark is the whole machine: stop what else runs, or pairs are discarded for foreign CPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${CARGO_TARGET_DIR:-target}/release
options=()
if [ "$(id -u)" -eq 0 ]; then
    journal=$(mktemp -d)/journal
    trap '"$bin/penstock-hugepages" undo --journal "$journal"' EXIT
    if "$bin/penstock-hugepages" reserve 9GiB --journal "$journal" &&
        { mountpoint -q /dev/hugepages || "$bin/penstock-hugepages" mount --journal "$journal"; }; then
        options=(--hugepages)
    fi
fi
[ ${#options[@]} -gt 0 ] || printf 'bench: no hugepages: figures are lower, and the vhost door cannot be measured\n' >&2
status=0
for ratio in 1 2 3 4 6 7 8 9; do
    timeout 1500 "$bin/penstock-perf" ratio "$ratio" "${options[@]}" || status=1
done
exit $status
