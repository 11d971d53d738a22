#!/usr/bin/env bash
# The main job, live: three nodes, a volume with a replica on each, verified random writes over NVMe/TCP, the node that leads killed -9 in
# mid-write. Another leads, the load goes on, the node comes back and catches up, and every acknowledged block is verified on all three
# replicas. Then what a host feels of a lost leader, as a median of ten. Everything is on loopback and in a temporary folder, and is gone afterwards.
#
#   PENSTOCK_DEMO_DIR      where the pools' files go (default: a temporary folder; wants 4 GiB and O_DIRECT)
#   PENSTOCK_DEMO_KEEP     set to keep the folder
#   PENSTOCK_DEMO_SECONDS  how long the load runs (default: 20)
#   PENSTOCK_DEMO_RATE     writes a second (default: 5000)
#   PENSTOCK_DEMO_STRIKES  how often the leader is killed, stopped and cut off at the end, each (default: 10; 3 to 10, 0: not at all)
source "$(dirname "${BASH_SOURCE[0]}")/demo-lib.sh"
seconds=${PENSTOCK_DEMO_SECONDS:-20}
rate=${PENSTOCK_DEMO_RATE:-5000}
strikes=${PENSTOCK_DEMO_STRIKES:-10}
base=$((20000 + RANDOM % 20000))
export PENSTOCK_API=unix:$dir/control.sock
declare -A daemon=([n1]= [n2]= [n3]=)

door() { printf '127.0.0.1:%d' $((base + ${1#n})); }
peer() { printf '127.0.0.1:%d' $((base + 10 * ${1#n})); }
start_node() {
    "$bin/penstockd" --run-dir "$dir/$1/run" --state-dir "$dir/$1/state" --cores $(((${1#n} - 1) % $(nproc))) --no-huge --mem-mib 512 \
        --poll adaptive --peer-listen "$(peer "$1")" --cluster-key-file "$dir/cluster.key" >>"$dir/$1.log" 2>&1 &
    daemon[$1]=$!
}
leader() { penstock replica ls demo | awk '$4 == "leader" {print $3}'; }
# caught_up NODE ENTRIES: it follows, and is at most so far behind.
caught_up() { penstock replica ls demo | awk -v node="$1" -v most="$2" '$3 == node && $7 ~ /^[0-9]+$/ && $7 <= most {found = 1} END {exit !found}'; }
led_by_another() { local now; now=$(leader) && [ -n "$now" ] && [ "$now" != "$1" ]; }

step 'Three nodes: a penstockd (data plane) each, and one penstock-control (metadata), without hugepages'
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$dir/cluster.key")
flags=()
for node in n1 n2 n3; do
    mkdir -p "$dir/$node"
    start_node $node
    flags+=(--node "$node=$dir/$node/run/penstockd.sock,peer=$(peer $node),nvmf=$(door $node)")
done
"$bin/penstock-control" --state-dir "$dir/control" "${flags[@]}" --listen "$PENSTOCK_API" --period-ms 100 >>"$dir/control.log" 2>&1 &
control=$!
nodes_are_there() { local shown; shown=$(penstock node ls) && [[ $shown != *away* ]]; }
until_true 30 nodes_are_there

step 'A pool on a file of each node, a volume with three replicas, its NVMe/TCP export'
# The oplogs hold more than a node misses while it is away: it catches up from the others' logs. The volume is small enough that
# the load writes nearly all of it: of a file with a hole between any two blocks, ext4 took 22 s for the removal alone.
for node in n1 n2 n3; do penstock pool add "file:$dir/$node.img?size=1GiB" --oplog 384MiB --node $node; done
penstock volume create demo --size 128MiB --replicas 3
penstock volume export demo --nvmf
until_true 30 led_by_another nobody
penstock node ls
penstock volume show demo
nqn=nqn.2026-11.io.penstock:demo

step "Verified random writes, 4 KiB, $rate a second on schedule, over all three paths; every acknowledgement goes into a journal"
"$bin/penstock-perf" run --target "nvmf:tcp:$(door n1):$nqn" --path "$(door n2)" --path "$(door n3)" --mix write --depth 16 --rate $rate \
    --duration "${seconds}s" --initial zero --journal "$dir/journal" --no-final-pass --hgrm "$dir/demo.hgrm" --json "$dir/demo.json" &
load=$!
sleep $((seconds / 4))

dead=$(leader)
step "kill -9 penstockd of $dead (${daemon[$dead]}), which leads, in mid-write"
kill -9 "${daemon[$dead]}"
killed=$(now_ms)
wait "${daemon[$dead]}" 2>/dev/null || true
daemon[$dead]=
until_true 30 led_by_another "$dead"
printf '%s leads now, seen %d ms after the kill\n' "$(leader)" $(($(now_ms) - killed))
sleep $((seconds / 4))

step "Start $dead again, under load: it finds its drive, redoes its log, and hears from the others what it missed"
started=$(now_ms)
start_node "$dead"
until_true 60 caught_up "$dead" 1000
caught=$(now_ms)
printf '%s is with the others again %d ms after its start\n' "$dead" $((caught - started))
wait "$load"
load=
for node in n1 n2 n3; do until_true 60 caught_up $node 0; done
penstock replica ls demo

for node in n1 n2 n3; do
    step "Every acknowledged block, read from the replica on $node and compared"
    penstock volume transfer demo --to $node
    "$bin/penstock-perf" verify --target "nvmf:tcp:$(door $node):$nqn" --path "$(door $node)" --journal "$dir/journal" --quiet
done

if [ "$strikes" -gt 0 ]; then
    step "Three more nodes, default settings: how long a host waits when the leader is killed, stopped, cut off without a word; $strikes times each"
    "$bin/penstock-perf" ratio 9 --pairs "$strikes" --no-control
fi

step 'Done'
gap=$(sed -n 's/.*"longest_gap_ms": \([0-9.]*\).*/\1/p' "$dir/demo.json")
printf 'longest gap in acknowledgements, with the kill in it: %.0f ms\n' "$gap"
printf 'time to catch up, from start to with the others: %d ms\n' $((caught - started))
printf 'acknowledged writes lost: 0, on each of three replicas\n'
