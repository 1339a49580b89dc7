#!/usr/bin/env bash
# Runs a program in a virtual machine with Debian's kernel, for what the kernel outside may lack. Its exit status is the program's.
# Usage: scripts/guest.sh BINARY [ARGS...]. The guest has busybox, the binary with its libraries, the same current folder, and lo.
#   GUEST_TIMEOUT (600)  seconds after which it fails, the boot included
#   GUEST_MEMORY (2G), GUEST_SMP (2)
#   GUEST_ACCEL (tcg)    kvm is faster, but a Debian kernel may not boot where this is a virtual machine itself
#   GUEST_MODULES        modules to load, with those that they depend on: "nbd sch_netem"
#   GUEST_ENV            names of variables to hand on. REQUIRE_UFFD=1 and RUST_BACKTRACE=1 are always set
#   GUEST_FILES          more files to take along, under the same path; programs with their libraries
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { # lines
    printf 'guest: %s\n' "$@" >&2
    exit 125
}

quote() { # words; prints them as a shell reads them
    local word quoted=()
    for word in "$@"; do quoted+=("'${word//\'/\'\\\'\'}'"); done
    echo "${quoted[*]}"
}

accelerator() { # prints QEMU's options
    case ${GUEST_ACCEL:-tcg} in
    tcg) echo "-accel tcg,thread=multi -cpu max" ;;
    kvm)
        [[ -r /dev/kvm && -w /dev/kvm ]] || fail "GUEST_ACCEL=kvm, but this user cannot open /dev/kvm; GUEST_ACCEL=tcg needs nothing."
        echo "-accel kvm -cpu host"
        ;;
    *) fail "GUEST_ACCEL=$GUEST_ACCEL is neither tcg nor kvm." ;;
    esac
}

take_along() { # file; puts it and the libraries it names into the root, each under its own path
    [[ -r $1 && -f $1 ]] || fail "no readable file: $1"
    local libraries file
    # ldd fails for what is not dynamically linked; that needs none.
    libraries=$(ldd "$1" 2>/dev/null | sed -nE 's/^.*[[:space:]](\/[^ ]+) \(0x.*$/\1/p') || true
    for file in "$1" $libraries; do
        mkdir -p "$root$(dirname "$file")"
        cp -L --update "$file" "$root$file"
    done
}

take_modules() { # names; lists them in the order of loading
    local modules name pattern line file ordered
    modules=$(echo "$kernel"/lib/modules/*)
    mkdir "$root/guest/lib"
    for name in "$@"; do
        pattern="/${name//[-_]/[-_]}\.ko"
        if grep -qE "$pattern\$" "$modules/modules.builtin"; then continue; fi
        line=$(grep -E "^[^:]*$pattern(\.[a-z]+)?:" "$modules/modules.dep") || fail "this kernel has no module $name."
        # "a: b c" says that a needs b, and b perhaps c: the last comes first.
        ordered=
        for file in ${line/:/}; do ordered="$file $ordered"; done
        for file in $ordered; do
            name=$(basename "$file")
            case $file in
            *.xz) name=${name%.xz} && xz -dc "$modules/$file" >"$root/guest/lib/$name" ;;
            *.zst) name=${name%.zst} && zstd -qdc "$modules/$file" >"$root/guest/lib/$name" ;;
            *) cp "$modules/$file" "$root/guest/lib/$name" ;;
            esac
            # Two modules may need the same third.
            grep -qxF "/guest/lib/$name" "$root/guest/modules" || echo "/guest/lib/$name" >>"$root/guest/modules"
        done
    done
}

write_command() { # binary, arguments
    local name
    mkdir -p "$root$PWD"
    {
        echo "cd $(quote "$PWD") || exit 125"
        echo "export REQUIRE_UFFD=1 RUST_BACKTRACE=1"
        for name in ${GUEST_ENV:-}; do
            [[ -v $name ]] || fail "GUEST_ENV names $name, which is not set."
            echo "export $name=$(quote "${!name}")"
        done
        echo "exec $(quote "$@")"
    } >"$root/guest/run"
}

make_root() { # binary, arguments
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,dev,proc,sys,etc,root,guest} "$root/tmp"
    chmod 1777 "$root/tmp"
    echo "127.0.0.1 localhost" >"$root/etc/hosts"
    echo "root:x:0:0:root:/root:/bin/sh" >"$root/etc/passwd"
    take_along "$(command -v busybox)"
    [[ -e $root/bin/busybox ]] || mv "$root$(command -v busybox)" "$root/bin/busybox"
    local file
    for file in "$1" ${GUEST_FILES:-}; do take_along "$file"; done
    : >"$root/guest/modules"
    # shellcheck disable=SC2086 # one word a module
    take_modules ${GUEST_MODULES:-}
    write_command "$@"
    install -m 755 "$scripts/guest_init.sh" "$root/init"
}

# Two serial lines: the kernel's goes to a file, the command's to our output.
start() {
    # shellcheck disable=SC2086 # options are words
    exec timeout --foreground --kill-after=5 "$timeout" qemu-system-x86_64 $accelerator \
        -smp "${GUEST_SMP:-2}" -m "${GUEST_MEMORY:-2G}" -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" -append "console=ttyS0 quiet loglevel=3 panic=-1" \
        -serial "file:$work/console" -serial stdio -debugcon "file:$work/status" </dev/null
}

(($#)) || { sed -n '2,/^set/{/^#/s/^# \?//p}' "${BASH_SOURCE[0]}" >&2 && exit 125; }
for tool in qemu-system-x86_64 busybox cpio; do
    command -v "$tool" >/dev/null || fail "$tool is missing; run: scripts/setup.sh guest"
done
[[ $(uname -m) = x86_64 ]] || fail "guests are x86_64 so far, and take binaries of this machine along, which is $(uname -m)."
binary=$(realpath -s "$1")
shift
timeout=${GUEST_TIMEOUT:-600}
accelerator=$(accelerator)
kernel=$("$scripts/guest_kernel.sh") || exit 125

work=$(mktemp -d)
qemu=
trap 'if [[ $qemu ]]; then kill "$qemu" 2>/dev/null || true; fi; rm -rf "$work"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
root=$work/root
make_root "$binary" "$@"
(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$work/initramfs"
rm -rf "$root"

# In the background, so that a signal to this script is heard at once.
start &
qemu=$!
ended=0
wait "$qemu" || ended=$?
qemu=

if [[ -s $work/status ]]; then
    status=$(od -An -tu1 -N1 "$work/status" | tr -d ' ')
    ((status == 0)) || why="$(basename "$binary") ended with status $status."
elif ((ended == 124 || ended == 137)); then
    status=124 why="not done in $timeout s (GUEST_TIMEOUT); QEMU was killed."
elif ((ended == 0)); then
    status=125 why="the guest ended before the program did: a panic, most likely."
else
    status=125 why="QEMU failed with status $ended. GUEST_ACCEL is ${GUEST_ACCEL:-tcg}; tcg asks nothing of the machine."
fi
if ((status)); then
    echo "guest: $why" >&2
    # The last line of every run is no news.
    said=$(tr -d '\r' <"$work/console" | grep -v 'reboot: Restarting system') || true
    [[ -z $said ]] || printf 'guest: the kernel said:\n%s\n' "$said" >&2
fi
exit "$status"
