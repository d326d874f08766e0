#!/usr/bin/env bash
# A real systemd, in namespaces of its own, runs kvpoold from the units that are installed: kill -9, restart and stop.
#
#   systemd.sh BUILD_DIR        exit 0 passed, 77 skipped (says why), 1 failed
#
# 1. socket activation starts the daemon    2. a pool, a lease and a sequence are made    3. kill -9: they are there
# 4. systemctl restart: they are there      5. systemctl stop gives the memory up, and the executor with it
set -euo pipefail
build=$(cd "$1" && pwd)
skip() { echo "skipped: $1"; exit 77; }

[ "$(id -u)" = 0 ] || skip "needs root"
[ -x /lib/systemd/systemd ] || skip "needs systemd"
command -v nsenter >/dev/null && command -v unshare >/dev/null || skip "needs util-linux"
unshare --pid --fork --mount --cgroup --mount-proc true 2>/dev/null || skip "may not make namespaces"
grep -q cgroup2 /proc/filesystems || skip "needs cgroup2"

work=$(mktemp -d)
init=
cleanup() {
    [ -z "$init" ] || kill -KILL "$init" 2>/dev/null || true
    [ -z "$init" ] || wait "$init" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

DESTDIR=$work/tree cmake --install "$build" >/dev/null
units=$(dirname "$(find "$work/tree" -name kvpoold.service)")
mkdir -p "$work/units/kvpoold.service.d" "$work/units/kvpoold.socket.d"
cp "$units"/kvpoold.service "$units"/kvpoold.socket "$work/units/"
# Of the installed units only what a machine without users and targets can not have is overridden.
cat >"$work/units/kvpoold.service.d/test.conf" <<EOF
[Unit]
DefaultDependencies=no
After=
[Service]
User=root
Group=root
ProtectSystem=no
ProtectHome=no
ReadWritePaths=
ExecStart=
ExecStart=$build/bin/kvpoold --backend host
EOF
printf '[Unit]\nDefaultDependencies=no\n[Socket]\nSocketUser=root\nSocketGroup=root\n' >"$work/units/kvpoold.socket.d/test.conf"
printf '[Unit]\nDefaultDependencies=no\nRequires=kvpoold.socket\nAfter=kvpoold.socket\n' >"$work/units/kvpool-test.target"
cat >"$work/init" <<EOF
#!/bin/bash
set -e
mount --make-rprivate /
umount -l /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir -p /run/kvpool
mkdir -p /etc/systemd/system
mount -t tmpfs tmpfs /etc/systemd/system
cp -r $work/units/. /etc/systemd/system/
exec env -i PATH="\$PATH" container=other /lib/systemd/systemd --system --unit=kvpool-test.target --log-target=console
EOF
chmod +x "$work/init"
unshare --pid --fork --mount --cgroup --uts --ipc --mount-proc --kill-child=KILL "$work/init" >"$work/log" 2>&1 &
init=$!

fail() {
    echo "failed: $1"
    tail -n 40 "$work/log"
    exit 1
}
inside() { nsenter -t "$(pgrep -P "$init" | head -1)" -m -p -C "$@"; }
# until_true WHAT COMMAND…: for up to 60 s; systemd has no event that a shell could wait for.
until_true() {
    local what=$1 end=$((SECONDS + 60))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what"
        sleep 0.05
    done
}
kvpool() { inside "$build/bin/kvpool" "$@"; }
main_pid() { inside systemctl show -p MainPID --value kvpoold.service; }
field() { python3 -c "import json,sys; print(json.load(sys.stdin)$1)"; }

until_true "the socket does not listen" inside systemctl is-active kvpoold.socket
kvpool --json status >/dev/null || fail "socket activation"
[ "$(inside systemctl is-active kvpoold.service)" = active ] || fail "the service is not active"
kvpool pool create test --pages 64 --page-tokens 16 --layers 2 --kv-heads 2 --head-dim 16 || fail "pool create"
session=$(kvpool session open --lease-ms=600000)
seq=$(kvpool --session="$session" seq open test 7) || fail "seq open"
kvpool --session="$session" seq advance test "$seq" 40 || fail "seq advance"
epoch=$(kvpool --json status | field '["epoch"]')

check() { # check WHAT EPOCH: everything is there, in the next epoch
    [ "$(kvpool --json status | field '["epoch"]')" = "$2" ] || fail "$1: the epoch is not $2"
    kvpool --json pool show test | field '["free_pages"]' | grep -qx 61 || fail "$1: pages"
    kvpool --session="$session" seq show test "$seq" | grep -q 40 || fail "$1: the sequence is not there"
    kvpool audit || fail "$1: audit"
}
pid=$(main_pid)
inside kill -KILL "$pid"
until_true "killed and not back" inside sh -c "[ \$(systemctl show -p MainPID --value kvpoold.service) != $pid ] && systemctl is-active kvpoold.service"
check "after kill -9" $((epoch + 1))
# Starts that fail at once, with a client at the door: the doors stay, and all is there once it starts again.
printf '[Service]\nExecStart=\nExecStart=/bin/false\n' | inside sh -c 'd=/run/systemd/system/kvpoold.service.d; mkdir -p $d; cat >$d/wrong.conf'
inside systemctl daemon-reload
inside systemctl restart kvpoold.service 2>/dev/null && fail "/bin/false serves"
kvpool status 2>/dev/null & # until it is served
client=$!
until_true "it is not started again" inside sh -c '[ $(systemctl show -p NRestarts --value kvpoold.service) -gt 25 ]'
inside rm /run/systemd/system/kvpoold.service.d/wrong.conf
inside systemctl daemon-reload
until_true "not back" inside systemctl is-active kvpoold.service
inside systemctl is-active kvpoold.socket >/dev/null || fail "the doors are closed: $(inside systemctl show -p Result kvpoold.socket)"
wait $client || fail "the client at the door was not served"
epoch=$((epoch + 1))
check "after starts that failed" $((epoch + 1))
inside systemctl restart kvpoold.service
check "after systemctl restart" $((epoch + 2))

executor=$(pgrep -f "^$build/bin/kvpool-exec|kvpool-exec --" | head -1 || true)
inside systemctl stop kvpoold.service kvpoold.socket
until_true "the executor outlives systemctl stop" inside sh -c "! pgrep -x kvpool-exec"
echo "passed: kill -9, restart and stop under systemd (executor ${executor:-none} ended)"
