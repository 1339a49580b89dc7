#!/usr/bin/env bash
# Prints the folder that holds Debian's kernel for guests: `vmlinuz` and `lib/modules`. Gets it through apt when there is no such folder.
# Usage: scripts/guest_kernel.sh. GUEST_KERNEL names another package.
set -euo pipefail
export LC_ALL=C            # apt's words are read here
PATH=$PATH:/usr/sbin:/sbin # depmod, for users who are not root
oldest=6.12                # has all that the tests ask of a kernel, soft-dirty too
cache=${XDG_CACHE_HOME:-$HOME/.cache}/pageferry-guest

candidate() { # package; prints the version that apt would get, or nothing
    apt-cache policy "$1" | sed -nE 's/^ *Candidate: ([^(].*)/\1/p'
}

# The first is Debian 12's newer kernel, the second Debian 13's only one.
offered_package() {
    local package version
    for package in ${GUEST_KERNEL:-linux-image-6.12-amd64 linux-image-amd64}; do
        version=$(candidate "$package")
        if [[ -z $version ]] || dpkg --compare-versions "$version" lt "$oldest"; then continue; fi
        # A metapackage is named after no version and depends on the package that is.
        apt-cache depends "$package" | sed -nE 's/^ *Depends: (linux-image-.*)/\1/p' | grep . || echo "$package"
        return
    done
}

download() { # package, version, folder to make
    local new
    mkdir -p "$cache"
    new=$(mktemp -d "$cache/new.XXXXXX")
    # shellcheck disable=SC2064 # this folder
    trap "rm -rf '$new'" EXIT
    echo "guest: getting $1 $2 into $3" >&2
    (cd "$new" && apt-get -q download "$1=$2" >apt.log 2>&1) || {
        cat "$new/apt.log" >&2
        echo "guest: could not get $1 $2; if apt's lists are old: apt-get update" >&2
        exit 1
    }
    dpkg -x "$new"/*.deb "$new/unpacked"
    mkdir "$new/kernel"
    mv "$new"/unpacked/boot/vmlinuz-* "$new/kernel/vmlinuz"
    if [[ -d $new/unpacked/lib ]]; then mv "$new/unpacked/lib" "$new/kernel/lib"; else mv "$new/unpacked/usr/lib" "$new/kernel/lib"; fi
    depmod -b "$new/kernel" "$(basename "$new"/kernel/lib/modules/*)"
    # One rename, so that a folder is there whole or not at all. Another run may have been faster.
    mv -T "$new/kernel" "$3" 2>/dev/null || [[ -e $3/vmlinuz ]]
    # Older versions, and what runs that were cut off left. Not the newest: another run may be reading it.
    find "$cache" -mindepth 1 -maxdepth 1 -mmin +60 ! -path "$3" -exec rm -rf {} +
}

command -v apt-cache >/dev/null || { echo "guest: the guest's kernel comes through apt, and this is not a Debian system." >&2 && exit 1; }
package=$(offered_package)
if [[ $package ]]; then
    version=$(candidate "$package")
    folder=$cache/${package}_$version
    [[ -e $folder/vmlinuz ]] || download "$package" "$version" "$folder"
else
    # Without apt's lists what was got before still serves.
    # shellcheck disable=SC2012 # the names are packages' names
    folder=$(ls -dt "$cache"/linux-image-*/ 2>/dev/null | head -n 1) || true
    if [[ -z $folder || ${GUEST_KERNEL:-} ]]; then
        echo "guest: apt offers no ${GUEST_KERNEL:-linux-image-6.12-amd64 (Debian 12) or linux-image-amd64 (Debian 13)} of at least $oldest." >&2
        echo "    If apt's lists are old or missing: apt-get update" >&2
        exit 1
    fi
fi
echo "${folder%/}"
