#!/usr/bin/env bash
# One node alone, live: one node on a file-backed pool, a volume over NVMe/TCP, verified random writes, kill -9 in mid-write,
# recovery, every acknowledged block verified. Everything is on loopback and in a temporary folder, and is gone afterwards.
#
#   PENSTOCK_DEMO_DIR   where the pool's file goes (default: a temporary folder; wants 5 GiB and O_DIRECT)
#   PENSTOCK_DEMO_KEEP  set to keep the folder
source "$(dirname "${BASH_SOURCE[0]}")/demo-lib.sh"
run=$dir/run
port=$((20000 + RANDOM % 20000))
export PENSTOCK_API=unix:$run/control.sock
daemon=

start_daemon() {
    "$bin/penstockd" --run-dir "$run" --state-dir "$dir/state" --cores 0 --no-huge --mem-mib 768 --poll adaptive \
        --nvmf-listen "127.0.0.1:$port" >>"$dir/penstockd.log" 2>&1 &
    daemon=$!
}

step 'A node: penstockd (data plane) and penstock-control (metadata), without hugepages'
start_daemon
"$bin/penstock-control" --state-dir "$dir/control" --node-socket "$run/penstockd.sock" --listen "unix:$run/control.sock" >>"$dir/control.log" 2>&1 &
control=$!
node_is_there() { local shown; shown=$(penstock node show) && [[ $shown != *away* ]]; }
until_true 20 node_is_there
penstock node show

step 'A pool on a file, a volume on the pool, an NVMe/TCP export of the volume'
penstock pool add "file:$dir/drive.img?size=4GiB"
penstock volume create demo 1GiB
penstock volume export demo --nvmf=127.0.0.1:$port
penstock volume show demo
target=nvmf:tcp:127.0.0.1:$port:nqn.2026-11.io.penstock:demo

step 'Verified random writes, 4 KiB, 16 at a time; every acknowledgement goes into a journal'
"$bin/penstock-perf" run --target "$target" --mix write --depth 16 --duration 60s --initial zero --journal "$dir/journal" \
    --no-final-pass --hgrm "$dir/demo.hgrm" --json "$dir/demo.json" --core 1 --dead-after 1s &
load=$!
sleep 8

step "kill -9 penstockd ($daemon), in mid-write"
kill -9 "$daemon"
wait "$daemon" 2>/dev/null || true
killed=$(now_ms)
wait "$load" || true
load=

step 'Start it again: it finds its drive, redoes its log, serves the same door'
started=$(now_ms)
start_daemon
until_true 60 bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"
until_true 60 bash -c "$bin/penstock volume show demo -o json | grep -q '\"serving\"'"
recovered=$(now_ms)
penstock pool ls

step 'Every acknowledged block, read back and compared'
"$bin/penstock-perf" verify --target "$target" --journal "$dir/journal" --core 1

step 'Done'
printf 'time to recover, from start to serving: %d ms (%d ms after the kill)\n' $((recovered - started)) $((recovered - killed))
