#!/usr/bin/env bash
# Installs what building, testing and benchmarking need from Debian's packages. Idempotent; says what it went without.
#
#   scripts/setup.sh            install what is missing (root), or list it (not root)
#   scripts/setup.sh --list     the packages, one a line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Beyond what SPDK's build needs: perf counters, and what the harness calls. Guests install their own (tests/guest/deps.sh).
readonly tools=(linux-perf iproute2 python3)

needed() {
    sys/spdk.sh --needs
    printf '%s\n' "${tools[@]}"
}

if [ "${1:-}" = --list ]; then
    needed | sort -u
    exit 0
fi

missing=()
while read -r package; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
done < <(needed | sort -u)

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
        printf 'setup: these packages are missing, and only root can install them:\n  apt-get install -y %s\n' "${missing[*]}" >&2
        printf 'setup: going on without; what needs them will say so.\n' >&2
    else
        log=$(mktemp)
        printf 'setup: installing %d packages (log: %s)\n' "${#missing[@]}" "$log" >&2
        apt=(apt-get -o DPkg::Lock::Timeout=300)
        if ! { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            printf 'setup: apt-get failed; fix what it says and run make setup again\n' >&2
            exit 1
        fi
        rm -f "$log"
    fi
fi

command -v cargo >/dev/null || { printf 'setup: no cargo on PATH; install Rust 1.95 or newer (https://rustup.rs)\n' >&2; exit 1; }

if [ "$(awk '/HugePages_Free/ {print $2}' /proc/meminfo)" -eq 0 ]; then
    printf 'setup: no free hugepages: programs run with --no-huge (no PCIe drives; see docs/operations.md)\n' >&2
fi

# QEMU, a kernel and what goes into guests. Without root it says what is missing, and the guest tests say so again.
tests/guest/deps.sh >&2 || printf 'setup: going on without guests; tests/guest/deps.sh says what they need\n' >&2
