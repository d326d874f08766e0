#!/usr/bin/env bash
# systemd_units: `systemd-analyze verify` finds nothing to say about the units as they would be installed.
# Arguments: the folder of the configured units, the folder of the others, the folder of the programs.
set -euo pipefail
configured=$1 plain=$2 bin=$3

if ! command -v systemd-analyze >/dev/null; then
    echo "skipped: systemd_units (there is no systemd-analyze here)"
    exit 77
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-units.XXXXXX")
trap 'rm -rf "$dir"' EXIT
sed "s|^ExecStart=[^ ]*/kvpoold|ExecStart=$bin/kvpoold|" "$configured/kvpoold.service" >"$dir/kvpoold.service"
cp "$plain/kvpoold.socket" "$dir/"
[ -x "$bin/kvpoold" ] || { echo "$bin/kvpoold is not there"; exit 1; }

# Warnings about the system's own units are not ours to judge.
said=$(systemd-analyze verify --man=no "$dir/kvpoold.service" "$dir/kvpoold.socket" 2>&1 | grep -F kvpool || true)
if [ -n "$said" ]; then
    echo "$said"
    exit 1
fi
for kept in FileDescriptorStoreMax= NotifyAccess=main Restart=always RestartSec=0 StartLimitIntervalSec=0 \
    KillMode=process WatchdogSec=; do
    grep -q "^$kept" "$dir/kvpoold.service" || { echo "kvpoold.service lacks $kept"; exit 1; }
done
grep -q '^TriggerLimitIntervalSec=0' "$dir/kvpoold.socket" || { echo "crashes close the doors of kvpoold.socket"; exit 1; }
if grep -rq '^RuntimeDirectory=' "$dir"; then
    echo "RuntimeDirectory= would remove the sockets at every restart"
    exit 1
fi
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers --dry-run "$plain/sysusers.d/kvpool.conf" >/dev/null
fi
