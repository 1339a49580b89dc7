#!/usr/bin/env bash
# Runs the tests of concurrency again and again: an order of events that fails once in a hundred runs passes `cargo test` on most days.
# Usage: scripts/repeat.sh [TIMES, default 200] [TEST FILE..., default those that meet page faults and peers and take seconds]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

times=${1:-200}
shift $(($# > 0))
tests=("$@")
((${#tests[@]})) || tests=(faults discard loss endings fetching forks net)
export REQUIRE_UFFD=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --no-run "${tests[@]/#/--test=}" 2>"$log" || { cat "$log" && exit 1; }
binaries=$(sed -nE 's/^ *Executable .*\((.*)\)$/\1/p' "$log")

failed=0
for binary in $binaries; do
    for ((i = 1; i <= times; i++)); do
        nice "$binary" --nocapture >"$log" 2>&1 && continue
        failed=$((failed + 1))
        echo "=== $binary, run $i of $times:"
        cat "$log"
    done
    echo "$(basename "$binary"): $times runs"
done
echo "$failed failed"
exit $((failed > 0))
