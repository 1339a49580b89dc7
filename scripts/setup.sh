#!/bin/sh
# Makes a Debian machine that has Rust ready for: build (also enough for tests, examples and benches), check, fuzz,
# guest (build, and what scripts/guest.sh calls).
# Installs what is missing through apt when it may, else prints the command. Changes nothing when nothing is missing.
set -eu

purpose=${1:?usage: scripts/setup.sh build|check|fuzz|guest}

any_exists() {
    for file in "$@"; do [ -e "$file" ] && return 0; done
    return 1
}

# Not libclang-cpp, which other packages bring along and bindgen cannot use.
has_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] ||
        any_exists /usr/lib/llvm-*/lib/libclang.so* /usr/lib/llvm-*/lib/libclang-[0-9]*.so* \
            /usr/lib/*-linux-gnu/libclang.so* /usr/lib/*-linux-gnu/libclang-[0-9]*.so* \
            /usr/lib64/libclang.so* /usr/local/lib/libclang.so*
}

missing_packages() {
    # The crates ring and userfaultfd-sys compile C.
    command -v cc >/dev/null && [ -e /usr/include/stdio.h ] || echo gcc libc6-dev
    # userfaultfd-sys reads the kernel's headers with bindgen, and bindgen loads libclang.
    [ -e /usr/include/linux/userfaultfd.h ] || echo linux-libc-dev
    has_libclang || echo libclang-dev
    # libFuzzer is C++; `check` lints the fuzz targets, which builds it.
    case $purpose in check | fuzz) command -v c++ >/dev/null || echo g++ ;; esac
    [ "$purpose" != guest ] || missing_packages_of_guests
}

# Not the guest's kernel: scripts/guest_kernel.sh unpacks that beside this system, not into it.
missing_packages_of_guests() {
    command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86
    command -v busybox >/dev/null || echo busybox-static
    command -v cpio >/dev/null || echo cpio
    # Modules come compressed with one of these.
    command -v xz >/dev/null || echo xz-utils
    command -v zstd >/dev/null || echo zstd
    # Not on the PATH of users who are not root.
    command -v depmod >/dev/null || any_exists /usr/sbin/depmod /sbin/depmod || echo kmod
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        echo "setup: not a Debian system; install what it calls: $*" >&2
        exit 1
    fi
    install="apt-get install -y --no-install-recommends $*"
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        as_root=sudo
    else
        echo "setup: needs packages and may not install them. Run as root:" >&2
        echo "    apt-get update && $install" >&2
        exit 1
    fi
    echo "setup: $as_root $install"
    $as_root apt-get update -q
    # shellcheck disable=SC2086 # as below
    $as_root env DEBIAN_FRONTEND=noninteractive $install
}

# Without userfaultfd the crate builds and most tests run, so this only warns. What it tries is what a region tries.
warn_without_userfaultfd() {
    (: <>/dev/userfaultfd) 2>/dev/null && return
    case $(uname -m) in
    x86_64) number=323 ;;
    aarch64) number=282 ;;
    *) return ;;
    esac
    # perl is part of every Debian and can make any system call.
    perl -e 'exit(syscall($ARGV[0] + 0, 0) < 0)' "$number" 2>/dev/null && return
    echo "setup: WARNING: this user may not use userfaultfd: regions cannot be opened, and tests that need one skip or fail." >&2
    if [ -e /dev/userfaultfd ]; then
        echo "    Let this user in:  sudo setfacl -m u:$(id -un):rw /dev/userfaultfd  (package acl)" >&2
    fi
    if [ -e /proc/sys/vm/unprivileged_userfaultfd ]; then
        echo "    Or let all users:  sudo sysctl vm.unprivileged_userfaultfd=1" >&2
        echo "    In a container:    start it with --device /dev/userfaultfd" >&2
    else
        echo "    This kernel was built without CONFIG_USERFAULTFD." >&2
    fi
}

cargo_tool() { # subcommand, package
    cargo "$1" --version >/dev/null 2>&1 || (set -x && cargo install "$2" --locked)
}

rustup_component() { # subcommand, component
    cargo "$1" --version >/dev/null 2>&1 && return
    echo "setup: cargo $1 is missing. Run: rustup component add $2" >&2
    exit 1
}

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is not on PATH; install Rust (the version that Cargo.toml names, or newer) from https://rustup.rs" >&2
    exit 1
fi
packages=$(missing_packages | tr '\n' ' ')
# shellcheck disable=SC2086 # one word a package
[ -z "$packages" ] || install_packages $packages

case $purpose in
build) warn_without_userfaultfd ;;
check)
    rustup_component fmt rustfmt
    rustup_component clippy clippy
    cargo_tool deny cargo-deny
    ;;
fuzz) cargo_tool fuzz cargo-fuzz ;;
guest) ;;
*)
    echo "setup: unknown purpose $purpose; one of build, check, fuzz, guest" >&2
    exit 2
    ;;
esac
