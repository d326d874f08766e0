#!/usr/bin/env bash
# kill_leaves_nothing: a fault run that fails leaves no folder behind. leaves_nothing.sh PROGRAM…
# Without a daemon to start, each of them fails after the time that it gives a connection.
set -euo pipefail
work=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-leaves.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin"

# fails_and_leaves_nothing PROGRAM
fails_and_leaves_nothing() {
    local program=$1 own=$work/${1##*/}
    mkdir "$own" "$own/tmp"
    if KVPOOL_BIN_DIR=$work/bin TMPDIR=$own/tmp "$program" --kills 1 >"$own/log" 2>&1; then
        echo "$program did not fail"
        return 1
    fi
    grep -q ': connect: ' "$own/log" || { echo "$program failed of something else:"; cat "$own/log"; return 1; }
    [ -z "$(ls -A "$own/tmp")" ] || { echo "$program left $(ls -A "$own/tmp")"; return 1; }
}

# side by side, as they wait
running=()
for program in "$@"; do
    fails_and_leaves_nothing "$program" &
    running+=($!)
done
failed=0
for pid in "${running[@]}"; do
    wait "$pid" || failed=1
done
exit $failed
