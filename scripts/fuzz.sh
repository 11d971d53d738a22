#!/usr/bin/env bash
# Fuzzes every parser of bytes that others write, coverage-guided (libFuzzer), for SECONDS in all.
#
#   scripts/fuzz.sh [SECONDS]             all targets; the time is shared out by weight, one target a core at a time
#   scripts/fuzz.sh [SECONDS] TARGET...   these alone
#
# Builds on stable Rust without cargo-fuzz: what it would pass is below. The corpus grows from run to run in
# $PENSTOCK_CACHE/corpus (default ~/.cache/penstock). Ends with a table; exit 1 on a crash, saying how to replay it.
# That finds are found: PENSTOCK_FUZZ_CANARY=SkipReadVerify scripts/fuzz.sh 20 store (a seeded bug of the engine) must fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { printf 'fuzz: "%s" is not a number of seconds; write for example: make fuzz SECONDS=60\n' "$seconds" >&2; exit 2; }
shift || true
# Share of the time: a whole store takes milliseconds a run, a record microseconds.
declare -A weight=([records]=2 [peer]=2 [store]=4 [api]=2 [config]=1)
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(store records peer api config)
for target in "${targets[@]}"; do
    [ -n "${weight[$target]:-}" ] || { printf 'fuzz: no target "%s"; there are: %s\n' "$target" "${!weight[*]}" >&2; exit 2; }
done

cache=${PENSTOCK_CACHE:-$HOME/.cache/penstock}
corpus=$cache/corpus
host=$(rustc -vV | sed -n 's/^host: //p')
mkdir -p "$corpus"

# Counters for each edge and traced comparisons, inlined; nothing here is unstable. Functions that abort on a find keep their names.
flags=(
    --cfg fuzzing
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    -Cllvm-args=-simplifycfg-branch-fold-threshold=0
    -Ccodegen-units=1
    -Cforce-frame-pointers
)
printf 'fuzz: building the targets\n' >&2
# --target keeps the flags away from build scripts; the encoded form keeps them whole.
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f'; printf '%s' "${flags[*]}") \
CARGO_TARGET_DIR=$cache/fuzz-target \
    cargo build --release --quiet --target "$host" --manifest-path tests/fuzz/Cargo.toml --bins
bin=$cache/fuzz-target/$host/release
for target in "${targets[@]}"; do
    mkdir -p "$corpus/seeds/$target"
    PENSTOCK_FUZZ_SEEDS=$corpus/seeds/$target timeout 60 "$bin/$target" 2>/dev/null || { printf 'fuzz: the target "%s" cannot make its seeds: run it with PENSTOCK_FUZZ_SEEDS=/tmp/seeds %s\n' "$target" "$bin/$target" >&2; exit 1; }
done

work=$(mktemp -d)
running=()
cleanup() {
    [ ${#running[@]} -eq 0 ] || kill "${running[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

total=0
for target in "${targets[@]}"; do total=$((total + weight[$target])); done
lanes=$(nproc)
[ "$lanes" -le ${#targets[@]} ] || lanes=${#targets[@]}

# fuzz_one TARGET SECONDS: finds lie in $corpus/crashes/TARGET and stay there.
fuzz_one() {
    local target=$1 time=$2 status=0
    mkdir -p "$corpus/$target" "$corpus/crashes/$target"
    local lengths=(-max_len=4200 -len_control=20)
    [ "$target" = store ] && lengths=(-max_len=256)
    # The limits are finds too: a unit that takes 10 s hangs a core that serves hosts, one that takes 2 GiB kills the node.
    timeout --kill-after=10 $((time + 60)) "$bin/$target" "$corpus/$target" "$corpus/seeds/$target" \
        -max_total_time="$time" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 "${lengths[@]}" \
        -artifact_prefix="$corpus/crashes/$target/" >"$work/$target.log" 2>&1 || status=$?
    printf '%s' "$status" >"$work/$target.status"
}

# Longest first, each to the lane that has the least to do.
declare -a load plan
for ((lane = 0; lane < lanes; lane++)); do load[lane]=0 plan[lane]=; done
while read -r target; do
    least=0
    for ((lane = 1; lane < lanes; lane++)); do
        if [ "${load[lane]}" -lt "${load[least]}" ]; then least=$lane; fi
    done
    time=$((seconds * lanes * weight[$target] / total))
    [ "$time" -gt 0 ] || time=1
    [ "$time" -le "$seconds" ] || time=$seconds
    load[least]=$((load[least] + time))
    plan[least]+="$target:$time "
done < <(for target in "${targets[@]}"; do printf '%s %s\n' "${weight[$target]}" "$target"; done | sort -rn | cut -d' ' -f2)

for ((lane = 0; lane < lanes; lane++)); do
    (for job in ${plan[lane]}; do fuzz_one "${job%:*}" "${job#*:}"; done) &
    running+=($!)
done
began=$SECONDS
while [ -n "$(jobs -rp)" ]; do
    sleep 1
    line=
    for target in "${targets[@]}"; do
        [ -f "$work/$target.log" ] || continue
        count=$({ grep -oE '^#[0-9]+' "$work/$target.log" || true; } | tail -n 1)
        line+="$target ${count:-#0}  "
    done
    [ -t 2 ] && printf '\r\033[Kfuzz: %3d s  %s' $((SECONDS - began)) "$line" >&2
done
[ -t 2 ] && printf '\r\033[K' >&2
wait
running=()

found=0
printf '%-10s %8s %12s %10s %10s %8s %8s\n' target seconds executions per_second edges corpus crashes
for target in "${targets[@]}"; do
    log=$work/$target.log
    stat() { sed -n "s/^stat::$1: *//p" "$log" | tail -n 1; }
    ran=$(stat number_of_executed_units)
    rate=$(stat average_exec_per_sec)
    edges=$({ grep -oE 'cov: [0-9]+' "$log" || true; } | tail -n 1 | cut -d' ' -f2)
    took=$({ grep -oE 'Done [0-9]+ runs in [0-9]+' "$log" || true; } | grep -oE '[0-9]+$' || true)
    status=$(cat "$work/$target.status" 2>/dev/null || echo 1)
    crashes=0
    if [ "$status" -ne 0 ] || [ "${ran:-0}" -eq 0 ]; then crashes=1 found=1; fi
    size=$(find "$corpus/$target" -type f | wc -l)
    printf '%-10s %8s %12s %10s %10s %8s %8s\n' "$target" "${took:--}" "${ran:-0}" "${rate:-0}" "${edges:-0}" "$size" "$crashes"
done
for target in "${targets[@]}"; do
    status=$(cat "$work/$target.status" 2>/dev/null || echo 1)
    [ "$status" -eq 0 ] && continue
    printf '\n%s ended with status %s:\n' "$target" "$status"
    grep -vE '^(#[0-9]+|stat::|INFO:)' "$work/$target.log" | tail -n 25 || true
    unit=$({ grep -oE 'Test unit written to .*' "$work/$target.log" || true; } | tail -n 1 | sed 's/Test unit written to //')
    [ -z "$unit" ] || printf 'replay: RUST_BACKTRACE=1 %s %s\n' "$bin/$target" "$unit"
done
exit "$found"
