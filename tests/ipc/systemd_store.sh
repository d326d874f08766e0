#!/usr/bin/env bash
# systemd_store: kvpoold under a real systemd, in namespaces of its own: its unit starts, and what it parks is there after
# SIGKILL and after `systemctl restart`; `systemctl stop` gives it up. Argument: the folder of the programs.
#
# systemd runs as in FACTS of the project's tests: a fresh cgroup2 mount, tmpfs on /run and /etc/systemd/system, units
# without default dependencies. Needs root; skipped by name elsewhere.
set -euo pipefail
bin=$1
skip() {
    echo "skipped: systemd_store ($1)"
    exit 77
}
[ "$(id -u)" -eq 0 ] || skip "needs root"
[ -x /lib/systemd/systemd ] || skip "there is no systemd here"
unshare --pid --fork --mount --cgroup --uts --ipc --mount-proc true 2>/dev/null || skip "no new namespaces here"

dir=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-systemd.XXXXXX")
inside=
end() {
    [ -z "$inside" ] || kill -KILL "$inside" 2>/dev/null || true
    [ -z "$inside" ] || wait "$inside" 2>/dev/null || true
    rm -rf "$dir"
}
trap end EXIT

cat >"$dir/start.sh" <<SCRIPT
set -e
mount --make-rprivate /
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mkdir -p /run/kvpool
mount -t tmpfs none /etc/systemd/system
cat >/etc/systemd/system/kvpoold.service <<UNIT
[Unit]
DefaultDependencies=no
StartLimitIntervalSec=0
[Service]
Type=notify
NotifyAccess=main
ExecStart=$bin/kvpoold --backend host --runtime-dir /run/kvpool --set grpc.enabled=no
Restart=always
RestartSec=0
WatchdogSec=10
KillMode=process
FileDescriptorStoreMax=8192
StandardError=append:$dir/log
UNIT
printf '[Unit]\nDefaultDependencies=no\nWants=kvpoold.service\n' >/etc/systemd/system/kvpool-test.target
exec env container=other /lib/systemd/systemd --system --unit=kvpool-test.target
SCRIPT
unshare --pid --fork --mount --cgroup --uts --ipc --mount-proc --kill-child=KILL bash "$dir/start.sh" \
    >"$dir/systemd.log" 2>&1 &
inside=$!

# wait_for N TEXT: until the daemon's log holds TEXT N times.
wait_for() {
    local until=$((SECONDS + 30))
    while [ "$(grep -c -- "$2" "$dir/log" 2>/dev/null || true)" != "$1" ]; do
        if [ $SECONDS -ge $until ]; then
            echo "the log does not hold \"$2\" $1 times:"
            cat "$dir/log" "$dir/systemd.log" 2>/dev/null
            exit 1
        fi
        sleep 0.05
    done
}
wait_for 1 "serves in"
manager=$(pgrep -P "$inside" | head -1)
control() { nsenter -t "$manager" -m -p -C systemctl "$@"; }
main_pid() { control show -p MainPID --value kvpoold.service; }
stored() { control show -p NFileDescriptorStore --value kvpoold.service; }

[ "$(stored)" -ge 2 ] || { echo "stored: $(stored)"; exit 1; }
nsenter -t "$manager" -m -p kill -KILL "$(main_pid)"
wait_for 1 "adopted the ledger of an earlier daemon, and 0 connections: epoch 2"
wait_for 2 "serves in"
control restart kvpoold.service
wait_for 1 "epoch 3"
wait_for 3 "serves in"
control stop kvpoold.service
[ "$(stored)" -eq 0 ] || { echo "systemctl stop left $(stored) fds"; exit 1; }
control start kvpoold.service
wait_for 4 "serves in"
[ "$(grep -c adopted "$dir/log")" -eq 2 ] || { cat "$dir/log"; exit 1; }
echo "parked: ledger and sockets; kept over SIGKILL and restart, given up by stop"
