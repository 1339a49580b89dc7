#!/usr/bin/env bash
# Runs the tests of concurrency again and again: an order of events that fails once in a hundred runs passes `cargo test` on most days.
# Usage: scripts/repeat.sh [TIMES, default 200] [TEST FILE..., default all that meet real page faults]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

times=${1:-200}
shift $(($# > 0))
tests=("$@")
((${#tests[@]})) || tests=(faults discard loss endings fetching)
export REQUIRE_UFFD=1
binaries=$(cargo test --no-run "${tests[@]/#/--test=}" 2>&1 | sed -nE 's/^ *Executable .*\((.*)\)$/\1/p')

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
for binary in $binaries; do
    for ((i = 1; i <= times; i++)); do
        # In cargo's absence a test finds files relative to the current folder, as with it.
        nice "$binary" >"$log" 2>&1 && continue
        failed=$((failed + 1))
        echo "=== $binary, run $i of $times:"
        cat "$log"
    done
    echo "$(basename "$binary"): $times runs"
done
echo "$failed failed"
exit $((failed > 0))
