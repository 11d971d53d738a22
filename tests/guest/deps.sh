#!/bin/sh
# Gets what the guest tests need and the build does not: QEMU, a guest kernel, and the programs that go into the guest.
# Idempotent; says what it did and what it went without. Nothing is installed into /boot: the kernel is unpacked from its
# package into ${PENSTOCK_CACHE:-$HOME/.cache/penstock}/guest-kernel/<release>, outside the checkout.
#
#   tests/guest/deps.sh           install what is missing (packages need root; the kernel does not)
#   tests/guest/deps.sh --check   install nothing; exit 1 and say what is missing
set -eu

cache=${PENSTOCK_CACHE:-$HOME/.cache/penstock}
kernels=$cache/guest-kernel
check_only=false
[ "${1:-}" = --check ] && check_only=true

say() { echo "guest deps: $*"; }
fail() { echo "guest deps: $*" >&2; exit 1; }

# program -> Debian package
missing_packages() {
    command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86
    command -v busybox >/dev/null && busybox --list 2>/dev/null | grep -qx insmod || echo busybox-static
    command -v fio >/dev/null || echo fio
    PATH=$PATH:/sbin:/usr/sbin command -v mkfs.ext4 >/dev/null || echo e2fsprogs
    command -v dpkg-deb >/dev/null || echo dpkg
}

kernel_present() {
    for dir in "$kernels"/*/; do
        [ -f "$dir/vmlinuz" ] && [ -d "$dir/modules" ] && return 0
    done
    return 1
}

wanted=$(missing_packages | tr '\n' ' ')
if $check_only; then
    [ -z "$wanted" ] || fail "missing packages: $wanted"
    kernel_present || fail "no guest kernel under $kernels; run tests/guest/deps.sh"
    say "all present"
    exit 0
fi

if [ -n "$wanted" ]; then
    [ "$(id -u)" = 0 ] || fail "missing packages: $wanted. Install them as root, then run this again"
    say "installing $wanted"
    [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -mmin -1440 2>/dev/null | head -1)" ] ||
        apt-get -qq -o DPkg::Lock::Timeout=300 update
    # shellcheck disable=SC2086  # a list of words on purpose
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends $wanted >/dev/null
fi

if [ -n "${PENSTOCK_GUEST_KERNEL:-}" ]; then
    say "using the kernel in $PENSTOCK_GUEST_KERNEL"
elif kernel_present; then
    say "kernel present under $kernels"
else
    command -v apt-get >/dev/null ||
        fail "no apt here: unpack a kernel with its modules and set PENSTOCK_GUEST_KERNEL to a directory holding vmlinuz and modules/"
    # The metapackage names today's kernel; a version written down here would vanish from the archive at its next update.
    package=$(apt-cache depends --important linux-image-cloud-amd64 | sed -n 's/^ *|\{0,1\}Depends: *\(linux-image-[0-9][^ ]*\)$/\1/p' | head -1)
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64; set PENSTOCK_GUEST_KERNEL to a directory holding vmlinuz and modules/"
    mkdir -p "$kernels"
    work=$(mktemp -d "$kernels/.unpack.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    say "fetching $package"
    (cd "$work" && apt-get -qq download "$package" 2>/dev/null) || fail "could not download $package"
    dpkg-deb -x "$work"/linux-image-*.deb "$work/tree"
    release=${package#linux-image-}
    mkdir "$work/ready"
    mv "$work/tree/boot/vmlinuz-$release" "$work/ready/vmlinuz"
    # merged-/usr packages moved modules below usr/
    for lib in "$work/tree/lib/modules/$release" "$work/tree/usr/lib/modules/$release"; do
        [ -d "$lib" ] && mv "$lib" "$work/ready/modules" && break
    done
    [ -d "$work/ready/modules" ] || fail "$package holds no modules where they were expected"
    mv "$work/ready" "$kernels/$release" 2>/dev/null || [ -d "$kernels/$release" ]
    say "kernel $release unpacked into $kernels/$release"
fi
