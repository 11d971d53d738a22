#!/usr/bin/env bash
# Obtains, verifies, patches, builds and caches the one SPDK release Penstock binds to.
#
#   sys/spdk.sh            do what is still missing, then print where the tree is
#   sys/spdk.sh --where    print the tree's path if it is ready, else fail
#   sys/spdk.sh --needs    list the Debian packages the build needs, one a line
#
# Environment: SPDK_DIR         use this tree (checked, never changed)
#              PENSTOCK_CACHE   cache directory, default ~/.cache/penstock
#              PENSTOCK_SPDK_ORIGIN=upstream|debian   try that source only
#
# The tree lives outside the checkout at $cache/spdk-v26.01-<key>, the key being a digest of everything that
# shapes the build; $cache/spdk always points at the tree in use, and build.rs looks there. Each stage
# leaves a stamp, so an interrupted run goes on where it stopped. /etc/apt is read, never changed.
set -euo pipefail

readonly version=26.01
readonly version_file=26.01.0                    # what the tree's VERSION file says
readonly upstream_url=https://github.com/spdk/spdk.git
readonly upstream_commit=2ef883ef96e79c3cc16da02f667a7a58c2453f2f
readonly debian_orig=ceph_20.2.4+ds.orig.tar.xz  # Debian's ceph source carries SPDK with its submodules
readonly debian_orig_sha256=190b4ca726717069b1d85b613aab99f9976a488129352a66a5ff41ada5d06730
readonly debian_subdir=src/nvmeof/gateway/spdk
readonly debian_suites=(sid forky)
# x86-64-v3: a native build dies of an illegal instruction under QEMU's TCG and on older hosts.
readonly configure_options=(--target-arch=x86-64-v3 --disable-unit-tests --disable-tests
    --with-uring --with-vfio-user --with-ublk --without-crypto)
readonly build_packages=(build-essential meson ninja-build nasm cmake automake autoconf libtool pkg-config patchelf
    clang libclang-dev libaio-dev libssl-dev libnuma-dev uuid-dev libfuse3-dev liburing-dev libncurses-dev
    libjson-c-dev libcmocka-dev libkeyutils-dev python3 python3-venv patch xz-utils git ca-certificates)
# What SPDK's and DPDK's build scripts import; pinned so that two machines build alike.
readonly python_modules=(pyelftools==0.32 jinja2==3.1.6 tabulate==0.9.0)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${PENSTOCK_CACHE:-$HOME/.cache/penstock}
jobs=${PENSTOCK_JOBS:-$(nproc)}
log=
start=$SECONDS

say() { printf 'spdk: %s\n' "$*" >&2; }
die() { printf 'spdk: error: %s\n' "$*" >&2; exit 1; }

key() {
    {
        printf '%s\n' "$version" "${configure_options[@]}"
        local patch
        for patch in "$here"/patches/*.patch; do
            [ -e "$patch" ] || continue
            basename "$patch"
            sha256sum <"$patch"
        done
    } | sha256sum | cut -c1-12
}

# run WHAT COMMAND...: quiet, with its output in the log, a line that moves on a terminal, and the tail on failure.
run() {
    local what=$1 began=$SECONDS status=0 pid
    shift
    printf '\n== %s: %s\n' "$what" "$*" >>"$log"
    setsid "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    # A background job ignores the terminal's interrupt; without this it would go on alone, and hold the lock. setsid made it
    # the leader of a group of its own, so that this reaches what it started as well.
    # shellcheck disable=SC2064
    trap "kill -- -$pid 2>/dev/null || true" EXIT
    if [ -t 2 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\rspdk: %s … %d s, %d log lines ' "$what" $((SECONDS - began)) "$(wc -l <"$log")" >&2
            sleep 1
        done
        printf '\r\033[K' >&2
    else
        say "$what …"
    fi
    wait "$pid" || status=$?
    trap - EXIT
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$log" >&2
        die "$what failed with exit status $status; the whole log is $log"
    fi
    say "$what: done in $((SECONDS - began)) s"
}

# --- build packages -------------------------------------------------------------------------------------------

missing_packages() {
    local package
    for package in "${build_packages[@]}"; do
        dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || printf '%s\n' "$package"
    done
}

install_packages() {
    if ! command -v dpkg-query >/dev/null; then
        say "this is not a Debian system; make sure these are installed (Debian's names): ${build_packages[*]}"
        return
    fi
    local missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        die "these build packages are missing: ${missing[*]}
    as root: apt-get install --no-install-recommends ${missing[*]}"
    fi
    run "reading package lists" timeout 300 apt-get update
    run "installing ${#missing[@]} build packages" \
        timeout 900 env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}

# The build runs the first python3 on PATH; a venv put first decides which one that is and what it can import.
prepare_python() {
    local venv=$cache/venv
    if ! "$venv/bin/python3" -c 'import elftools, jinja2, tabulate' 2>/dev/null; then
        rm -rf "$venv"
        run "creating a Python environment" python3 -m venv "$venv"
        run "installing ${python_modules[*]}" timeout 300 "$venv/bin/pip" install --quiet "${python_modules[@]}"
    fi
    PATH=$venv/bin:$PATH
    export PATH
}

# --- sources --------------------------------------------------------------------------------------------------

# upstream DIR: the tag with its submodules, if upstream answers within seconds. Returns 1 if it does not.
upstream() {
    local dir=$1 found
    found=$(GIT_TERMINAL_PROMPT=0 timeout 5 git ls-remote "$upstream_url" "refs/tags/v$version" "refs/tags/v$version^{}" \
        2>>"$log" | tail -n 1 | cut -f1) || return 1
    [ -n "$found" ] || return 1
    if [ "$found" != "$upstream_commit" ]; then
        die "upstream's tag v$version is commit $found, but $upstream_commit is expected; not using it.
    Set PENSTOCK_SPDK_ORIGIN=debian to take Debian's source package instead."
    fi
    run "fetching upstream v$version" timeout 900 git clone --quiet --depth 1 --branch "v$version" \
        --recurse-submodules --shallow-submodules "$upstream_url" "$dir"
    [ "$(git -C "$dir" rev-parse HEAD)" = "$upstream_commit" ] || die "the clone is not commit $upstream_commit"
    echo upstream >"$dir/.penstock-origin"
}

# The machine's own Debian mirror and keyring, as apt itself understands its configuration.
debian_mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' 'Label: Debian' | sort -u | head -n 1
}

# debian DIR: SPDK out of the ceph source package. The archive's signature covers its index, the index the
# tarball's digest, and the digest is pinned here as well.
debian() {
    local dir=$1 apt=$cache/apt download=$cache/download mirror suite package_version='' keyring= options
    local tarball=$download/$debian_orig
    mkdir -p "$download"
    if ! echo "$debian_orig_sha256  $tarball" | sha256sum --check --status 2>/dev/null; then
        command -v apt-get >/dev/null || die "no apt-get here, and upstream does not answer; set SPDK_DIR to a built SPDK v$version"
        mirror=$(debian_mirror)
        [ -n "$mirror" ] || die "apt knows no Debian mirror here (try apt-get update); or set SPDK_DIR to a built SPDK v$version"
        [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ] || keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        for suite in "${debian_suites[@]}"; do
            mkdir -p "$apt/$suite/lists/partial" "$apt/$suite/archives/partial" "$apt/$suite/empty"
            {
                printf 'Types: deb-src\nURIs: %s\nSuites: %s\nComponents: main\n' "$mirror" "$suite"
                [ -z "$keyring" ] || printf 'Signed-By: %s\n' "$keyring"
            } >"$apt/$suite/mirror.sources"
            options=(-o "Dir::Etc::SourceList=$apt/$suite/mirror.sources" -o "Dir::Etc::SourceParts=$apt/$suite/empty"
                -o "Dir::State::Lists=$apt/$suite/lists" -o "Dir::Cache=$apt/$suite" -o APT::Sandbox::User="$(id -un)")
            run "reading Debian $suite's source index" timeout 300 apt-get "${options[@]}" update
            # Any revision will do whose original tarball is the pinned one.
            package_version=$(apt-cache "${options[@]}" showsrc ceph 2>>"$log" | awk -v want="$debian_orig_sha256" '
                /^Version:/ { version = $2 } $1 == want { print version; exit }')
            [ -z "$package_version" ] || break
        done
        [ -n "$package_version" ] || die "Debian (${debian_suites[*]}) no longer carries $debian_orig (sha256 $debian_orig_sha256);
    set SPDK_DIR to a built SPDK v$version, or use a machine where $upstream_url answers"
        # --tar-only: the packaging around it is not needed. apt resumes a partial download.
        (cd "$download" && run "downloading $debian_orig (245 MB)" timeout 1800 \
            apt-get "${options[@]}" source --download-only --tar-only "ceph=$package_version")
        echo "$debian_orig_sha256  $tarball" | sha256sum --check --status ||
            die "$tarball is not the expected file: sha256 $(sha256sum "$tarball" | cut -d' ' -f1), expected $debian_orig_sha256"
    fi
    mkdir -p "$dir"
    run "extracting SPDK" tar -xJf "$tarball" -C "$dir" --no-same-owner --strip-components=5 --wildcards "*/$debian_subdir/*"
    echo debian >"$dir/.penstock-origin"
}

fetch() {
    local tree=$1 parts=$1.part
    rm -rf "$parts"
    case ${PENSTOCK_SPDK_ORIGIN:-any} in
    upstream) upstream "$parts" || die "upstream did not answer within 5 s ($upstream_url)" ;;
    debian) debian "$parts" ;;
    any)
        if ! upstream "$parts"; then
            say "upstream did not answer within 5 s; taking Debian's source package"
            rm -rf "$parts"
            debian "$parts"
        fi
        ;;
    *) die "PENSTOCK_SPDK_ORIGIN is '$PENSTOCK_SPDK_ORIGIN'; it can be upstream or debian" ;;
    esac
    check_version "$parts"
    local patch
    for patch in "$here"/patches/*.patch; do
        [ -e "$patch" ] || continue
        # A patch that names an origin in its file name is for that tree alone.
        case $(basename "$patch") in
        debian-*) [ "$(cat "$parts/.penstock-origin")" = debian ] || continue ;;
        upstream-*) [ "$(cat "$parts/.penstock-origin")" = upstream ] || continue ;;
        esac
        run "applying $(basename "$patch")" patch --directory "$parts" --strip 1 --forward --fuzz 2 --input "$patch"
        basename "$patch" >>"$parts/.penstock-patches"
    done
    mv "$parts" "$tree"
}

# --- build ----------------------------------------------------------------------------------------------------

check_version() {
    local tree=$1 found
    [ -r "$tree/VERSION" ] || die "$tree holds no SPDK: it has no VERSION file; SPDK $version_file is needed"
    found=$(cat "$tree/VERSION")
    [ "$found" = "$version_file" ] || die "$tree is SPDK $found; Penstock binds to SPDK $version_file and no other"
}

build() {
    local tree=$1
    if [ ! -e "$tree/.penstock-configured" ]; then
        run "configuring" env --chdir="$tree" ./configure "${configure_options[@]}"
        touch "$tree/.penstock-configured"
    fi
    run "building with $jobs jobs (about 3 minutes on 2 cores)" make -C "$tree" -j"$jobs"
    touch "$tree/.penstock-built"
}

# A link that always names the tree in use, replaced in one step.
point_at() {
    ln -sfn "$1" "$cache/.spdk.$$"
    mv -T "$cache/.spdk.$$" "$cache/spdk"
}

report() {
    local tree=$1 origin=given
    [ ! -r "$tree/.penstock-origin" ] || origin=$(cat "$tree/.penstock-origin")
    case $origin in
    debian) origin="Debian's tree (Ceph's fork)" ;;
    upstream) origin="upstream's tree" ;;
    given) origin="the tree in SPDK_DIR" ;;
    esac
    say "SPDK $version_file is ready: $tree, $origin, took $((SECONDS - start)) s"
}

main() {
    local tree
    case ${1:-} in
    --needs) printf '%s\n' "${build_packages[@]}"; return ;;
    --where | '') ;;
    *) die "unknown argument '$1'; known are --where and --needs" ;;
    esac

    if [ -n "${SPDK_DIR:-}" ]; then
        check_version "$SPDK_DIR"
        [ -e "$SPDK_DIR/build/lib/libspdk_bdev.a" ] ||
            die "SPDK_DIR=$SPDK_DIR is not built; in it run: ./configure ${configure_options[*]} && make -j$jobs"
        local patch
        for patch in "$here"/patches/*.patch; do
            [ -e "$patch" ] || continue
            case $(basename "$patch") in debian-* | upstream-*) continue ;; esac
            patch --directory "$SPDK_DIR" --strip 1 --reverse --dry-run --force --quiet --input "$patch" >/dev/null 2>&1 ||
                die "SPDK_DIR=$SPDK_DIR lacks $(basename "$patch"); apply it and build again:
    patch -d $SPDK_DIR -p1 -i $patch && make -C $SPDK_DIR -j$jobs"
        done
        [ "${1:-}" != --where ] || { echo "$SPDK_DIR"; return; }
        report "$SPDK_DIR"
        return
    fi

    tree=$cache/spdk-v$version-$(key)
    if [ "${1:-}" = --where ]; then
        [ -e "$tree/.penstock-built" ] || die "SPDK $version_file is not built; run: make spdk"
        echo "$tree"
        return
    fi
    mkdir -p "$cache/log"
    exec 9>"$cache/lock"
    if ! flock --nonblock 9; then
        say "another build holds $cache/lock; waiting for it"
        flock --timeout 1800 9 || die "gave up after 30 minutes waiting for $cache/lock"
    fi
    log=$cache/log/spdk-$(key).log
    if [ ! -e "$tree/.penstock-built" ]; then
        : >"$log"
        install_packages
        prepare_python
        [ -d "$tree" ] || fetch "$tree"
        check_version "$tree"
        build "$tree"
    fi
    point_at "$tree"
    report "$tree"
}

main "$@"
