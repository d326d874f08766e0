#!/usr/bin/env bash
# Every hit of the prefix cache on a GPU, byte by byte, under kills of the daemon, workers and executor: kill_cache with
# --backend cuda, by one user and (where this is root) by two. $KVPOOL_KILLS: how many kills of each, 60.
#
# Prints a line a test, and last "N passed, N failed, N skipped"; exit status 0, 1 where something failed, 77 where there
# is no GPU.
set -u
tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export KVPOOL_BIN_DIR=${KVPOOL_BIN_DIR:-$tests/../bin}
passed=0 failed=0 skipped=0
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT

# prove NAME [OPTION…]
prove() {
    local name=$1
    shift
    "$tests/kill_cache" --backend cuda --kills "${KVPOOL_KILLS:-60}" --json "$@" >"$log" 2>&1
    case $? in
    0) echo "passed  $name"; passed=$((passed + 1)) ;;
    77) echo "skipped $name: $(tail -n 1 "$log")"; skipped=$((skipped + 1)); return ;;
    *) echo "FAILED  $name"; failed=$((failed + 1)) ;;
    esac
    grep -v 'kvpool-keeper: the daemon (pid' "$log" | tail -n 5 | sed 's/^/    /'
}

prove a_hit_page_holds_what_its_prefix_stands_for
prove pages_of_two_users_never_show_the_others_bytes --tenants
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] || exit 1
[ "$passed" -gt 0 ] || exit 77
