#!/usr/bin/env bash
# kill_leaves_nothing: a fault run that fails leaves no folder behind. leaves_nothing.sh PROGRAM…
# Without a daemon to start, each of them fails after the time that it gives a connection.
set -euo pipefail
work=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-leaves.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/tmp"

for program in "$@"; do
    if KVPOOL_BIN_DIR=$work/bin TMPDIR=$work/tmp "$program" --kills 1 >"$work/log" 2>&1; then
        echo "$program did not fail"
        exit 1
    fi
    grep -q ': connect: ' "$work/log" || { echo "$program failed of something else:"; cat "$work/log"; exit 1; }
    [ -z "$(ls -A "$work/tmp")" ] || { echo "$program left $(ls -A "$work/tmp")"; exit 1; }
done
