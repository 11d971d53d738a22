# What the demos share, sourced by them: the folder, steps shown, waits, and the end, which stops what `load`, `control` and `daemon` (one pid, or
# one a node) name. After failures everything is kept, with the daemons' last words shown.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${CARGO_TARGET_DIR:-target}/release

dir=${PENSTOCK_DEMO_DIR:-$(mktemp -d "${TMPDIR:-/var/tmp}/penstock-demo.XXXXXX")}
mkdir -p "$dir"
control= load=

bold() { if [ -t 1 ]; then printf '\033[1m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi; }
step() { printf '\n'; bold "▸ $*"; }
end() {
    local status=$?
    [ "$status" -eq 0 ] || penstock replica ls >&2 || true
    for pid in $load $control ${daemon[@]}; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in $load $control ${daemon[@]}; do wait "$pid" 2>/dev/null || true; done
    if [ "$status" -ne 0 ]; then
        printf '\ndemo failed; the last words of the daemons:\n' >&2
        tail -n 15 "$dir"/*.log >&2 || true
        printf 'everything is kept in %s\n' "$dir" >&2
    elif [ -z "${PENSTOCK_DEMO_KEEP:-}" ]; then
        rm -rf "$dir"
    fi
    exit "$status"
}
trap end EXIT

now_ms() { date +%s%3N; }
# until_true SECONDS COMMAND...: tries until it works.
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { printf 'gave up waiting for: %s\n' "$*" >&2; return 1; }
        sleep 0.05
    done
}
penstock() { "$bin/penstock" "$@"; }
