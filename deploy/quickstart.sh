#!/usr/bin/env bash
# kvpool in one command: packages, build (tests and benches included), a daemon, the demo, and the daemon stopped again.
# Nothing stays behind but build/release. Arguments go to `kvpool demo`, e.g. --seconds 5 --trace FILE.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/packages.sh
need_packages "${packages_build[@]}"

cmake --preset release >/dev/null
cmake --build --preset release

run=$(mktemp -d "${TMPDIR:-/tmp}/kvpool.XXXXXX")
daemon=
stop() {
    if [ -n "$daemon" ]; then
        kill -TERM "$daemon" 2>/dev/null || true
        wait "$daemon" || true
    fi
    rm -rf "$run"
}
trap stop EXIT

echo
echo "$ kvpoold --runtime-dir $run"
build/release/bin/kvpoold --runtime-dir "$run" &
daemon=$!
build/release/bin/kvpool -e "$run/kvpool.sock" --wait 10 status
echo
echo "$ kvpool demo $*"
build/release/bin/kvpool -e "$run/kvpool.sock" demo "$@"
echo
build/release/bin/kvpool -e "$run/kvpool.sock" audit
