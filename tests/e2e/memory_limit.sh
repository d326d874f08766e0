#!/usr/bin/env bash
# A pool that the memory limit of a control group does not hold is refused: taken anyway, it would have the kernel end the
# daemon, whose client would ask its successor for it again. In a mount namespace, over control groups made of plain files.
#
#   memory_limit.sh BIN_DIR        exit 0 passed, 77 skipped (says why), 1 failed
set -euo pipefail
bin=$(cd "$1" && pwd)
namespace=(unshare --mount)
[ "$(id -u)" = 0 ] || namespace+=(--map-root-user)

if [ "${2:-}" != inside ]; then
    "${namespace[@]}" mount -t tmpfs tmpfs /sys/fs/cgroup 2>/dev/null || { echo "skipped: may not make namespaces"; exit 77; }
    exec "${namespace[@]}" "$0" "$bin" inside
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-limit.XXXXXX")
daemon=
clean() {
    [ -z "$daemon" ] || { kill -TERM "$daemon" 2>/dev/null || true; wait "$daemon" || true; }
    rm -rf "$work"
}
trap clean EXIT
fail() { echo "failed: $1"; exit 1; }
kvpool() { "$bin/kvpool" -e "$work/kvpool.sock" "$@"; }
mkpool() { kvpool pool create "$1" --pages "$2" --page-tokens 16 --layers 16 --kv-heads 8 --head-dim 128; } # 1 MiB a page
group_of() { sed -n "s/^[0-9]*:$1://p" /proc/self/cgroup | head -n 1 | grep -v '/\.\.' || true; }
mount -t tmpfs tmpfs /sys/fs/cgroup

# limits DIR LIMIT_FILE USED_FILE PREFIX: 400 MiB, of which 250 are used, 100 of these by page cache: 250 are available
limits() {
    mkdir -p "$1"
    echo $((400 << 20)) >"$1/$2"
    echo $((250 << 20)) >"$1/$3"
    printf '%sinactive_file %d\n%sactive_file %d\n' "$4" $((60 << 20)) "$4" $((40 << 20)) >"$1/memory.stat"
}
"$bin/kvpoold" --backend host --runtime-dir "$work" 2>"$work/log" &
daemon=$!
kvpool --wait 60 status >/dev/null

check() { # check WHAT: no more than 250 MiB, 64 of which stay
    ! said=$(mkpool large 200 2>&1) || fail "$1: a pool of 200 MiB is made"
    [[ $said == *"209715200 bytes of shared memory are asked for, 262144000 are available under the memory limit"*ENOMEM* ]] ||
        fail "$1: it says: $said"
    mkpool small 100 >/dev/null || fail "$1: no pool of 100 MiB"
    kvpool pool delete small >/dev/null
    rm -rf /sys/fs/cgroup/*
}
# Version 2: "max" in the process's own group, the limit above it. Version 1: where this machine has it, in the group
# itself; in any case at the mount, where a container sees its own.
own=$(group_of '')
if [ -n "$own" ] && [ "$own" != / ]; then
    mkdir -p "/sys/fs/cgroup$own"
    echo max >"/sys/fs/cgroup$own/memory.max"
fi
limits /sys/fs/cgroup memory.max memory.current ""
check "version 2"
if grep -q '^[0-9]*:memory:' /proc/self/cgroup; then
    limits "/sys/fs/cgroup/memory$(group_of memory)" memory.limit_in_bytes memory.usage_in_bytes total_
    check "version 1"
fi
mkpool large 200 >/dev/null || fail "without a limit: no pool of 200 MiB"
kvpool audit >/dev/null
kill -TERM "$daemon"
wait "$daemon" || fail "the daemon ended with $?"
daemon=
echo "passed: what the limit does not hold is refused"
