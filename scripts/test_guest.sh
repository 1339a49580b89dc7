#!/usr/bin/env bash
# Builds test files and runs each in a guest (scripts/guest.sh, which lists what can be set).
# Usage: scripts/test_guest.sh TEST FILE... [-- ARGUMENTS OF THE TESTS...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests=()
while (($#)) && [[ $1 != -- ]]; do
    tests+=("$1")
    shift
done
shift $(($# > 0))
((${#tests[@]})) || { echo "usage: scripts/test_guest.sh TEST FILE... [-- ARGUMENTS...]" >&2 && exit 2; }

# The guest's kernel has the bits: a test that misses them fails instead of skipping.
export REQUIRE_SOFT_DIRTY=1 GUEST_ENV="${GUEST_ENV:-} REQUIRE_SOFT_DIRTY"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --profile guest --no-run "${tests[@]/#/--test=}" 2>&1 | tee "$log"
binaries=$(sed -nE 's/^ *Executable .*\((.*)\)$/\1/p' "$log")

failed=()
for binary in $binaries; do
    echo "=== $binary, in the guest"
    start=$SECONDS
    scripts/guest.sh "$binary" "$@" || failed+=("$(basename "$binary")")
    echo "=== $((SECONDS - start)) s"
done
((${#failed[@]} == 0)) || { echo "failed in the guest: ${failed[*]}" >&2 && exit 1; }
