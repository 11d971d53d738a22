#!/usr/bin/env bash
# Three real nodes, or more, under faults for MINUTES, each in a network namespace of its own, so that links between them can be cut one way too.
#
#   scripts/chaos.sh [MINUTES]        default 10; PENSTOCK_SEED repeats what a run drew;
#                                     PENSTOCK_CHAOS_ONLY=SIGSTOP,partition strikes with those alone;
#                                     PENSTOCK_CHAOS_OPLOG_MIB=768 gives drives an oplog in which nobody falls behind (default 16: rebuilds are met)
#                                     PENSTOCK_CHAOS_NODES=5 makes it five nodes: kills in pairs leave a majority then
#
# Wants root for the namespaces; without, the faults of the network are left out, and that is said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=${1:-10}
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || { printf 'chaos: "%s" is not a number of minutes; write for example: make chaos MINUTES=10\n' "$minutes" >&2; exit 2; }
export PENSTOCK_CHAOS_NODES=${PENSTOCK_CHAOS_NODES:-3}
nodes=$PENSTOCK_CHAOS_NODES
[[ $nodes =~ ^[35]$ ]] || { printf 'chaos: PENSTOCK_CHAOS_NODES=%s; 3 or 5 nodes can be had\n' "$nodes" >&2; exit 2; }
prefix=penstock-$$

# Built outside of the namespaces, which reach nothing.
cargo test --release --quiet -p penstock --test chaos --no-run
test=(cargo test --release --quiet --offline -p penstock --test chaos -- --include-ignored --nocapture)
limit=$(awk "BEGIN { print int($minutes * 60 + 600) }")

made=()
cleanup() { for space in "${made[@]}"; do ip netns del "$space" 2>/dev/null || true; done; }
trap cleanup EXIT
space() { ip netns add "$1" && made+=("$1") && ip -n "$1" link set lo up; }

export PENSTOCK_CHAOS_MINUTES=$minutes
if ! space "$prefix-host" 2>/dev/null; then
    printf 'chaos: no network namespaces here (they want root): partitions are left out\n' >&2
    timeout --kill-after=10 "$limit" "${test[@]}"
    exit
fi
# The hosts' namespace has the bridge.
ip -n "$prefix-host" link add bridge0 type bridge
ip -n "$prefix-host" addr add 10.77.0.100/24 dev bridge0
ip -n "$prefix-host" link set bridge0 up
for ((node = 1; node <= nodes; node++)); do
    space "$prefix-$node"
    ip -n "$prefix-$node" link add eth0 type veth peer name "node$node" netns "$prefix-host"
    ip -n "$prefix-$node" addr add "10.77.0.$node/24" dev eth0
    ip -n "$prefix-$node" link set eth0 up
    ip -n "$prefix-host" link set "node$node" master bridge0 up
done
export PENSTOCK_CHAOS_NAMESPACES=$prefix
timeout --kill-after=10 "$limit" ip netns exec "$prefix-host" "${test[@]}"
