#!/usr/bin/env bash
# The whole of kvpool on a GPU, by its programs alone: daemon, keeper, executor, command line tool, demo.
#
#   stack_gpu.sh [host]
#
# Each function below is a test, its name what it proves; each starts daemons of its own in a folder of its own. With
# `host` the same runs on the host backend, but for what only a GPU can show. Prints a line a test, and last
# "N passed, N failed, N skipped"; exit status 0, 1 where something failed, 77 where there is no GPU.
set -u
backend=${1:-cuda}
bin=${KVPOOL_BIN_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../bin" && pwd)}
passed=0 failed=0 skipped=0
daemon='' dir=''

# ---- helpers ---------------------------------------------------------------------------------------------------------

fail() {
    echo "    $*"
    return 1
}

# start PROGRAM…: a daemon, up and answering
start() {
    "$@" --backend "$backend" --runtime-dir "$dir" >>"$dir.log" 2>&1 &
    daemon=$!
    kvpool --wait 20 status >/dev/null || fail "no daemon answers"
}

stop() {
    [ -z "$daemon" ] || { kill -TERM "$daemon" 2>/dev/null; wait "$daemon" 2>/dev/null; }
    daemon=''
}

kvpool() {
    timeout 120 "$bin/kvpool" -e "$dir/kvpool.sock" "$@"
}

# field KEY: its first value in the JSON document on standard input
field() {
    sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" | head -n 1
}

executor_pid() {
    kvpool --json status | sed -n '/"executors"/,$p' | field pid
}

# the daemon of this test, whoever started it
daemon_pid() {
    local process
    for process in /proc/[0-9]*; do
        case $(readlink "$process/exe" 2>/dev/null) in
        */kvpoold) tr '\0' '\n' <"$process/cmdline" 2>/dev/null | grep -qxF "$dir" && echo "${process#/proc/}" ;;
        esac
    done
}

# expect WHAT GOT WANTED
expect() {
    [ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"
}

small=(--layers 4 --kv-heads 4 --head-dim 64)
demo_s=${KVPOOL_DEMO_SECONDS:-5}

# ---- the tests -------------------------------------------------------------------------------------------------------

a_pool_lies_on_the_gpu_and_the_daemon_has_no_driver_open() {
    start "$bin/kvpoold" || return 1
    kvpool --json pool create a --pages 256 "${small[@]}" >"$dir.out" || return 1
    expect backend "$(field backend <"$dir.out")" "$backend" || return 1
    if [ "$backend" = cuda ]; then
        grep -q '"GPU-' "$dir.out" || fail "no GPU is named" || return 1
        grep -q libcuda "/proc/$(executor_pid)/maps" || fail "the executor has no driver open" || return 1
    fi
    ! grep -Eq 'libcuda|libnvidia' "/proc/$daemon/maps" || fail "the daemon has the driver open"
}

an_executor_killed_in_mid_append_is_replaced_and_only_what_is_written_counts() {
    local token seq before status job want=40 got
    start "$bin/kvpoold" || return 1
    kvpool pool create a --pages 4096 "${small[@]}" >/dev/null || return 1
    token=$(kvpool session open) || return 1
    seq=$(kvpool --session "$token" seq open a 7) || return 1
    kvpool --session "$token" seq append a "$seq" --tokens 40 >/dev/null || return 1
    before=$(executor_pid)
    kvpool --session "$token" seq append a "$seq" --at 40 --tokens 10000 >/dev/null 2>&1 &
    job=$!
    kill -KILL "$before" || return 1
    wait "$job"
    status=$?
    [ $status -ne 0 ] || want=10040
    got=$(kvpool seqlens a "$seq" | tail -n 1 | awk '{ print $NF }')
    expect length "$got" $want || return 1
    expect written "$(kvpool --session "$token" --json seq append a "$seq" --at "$got" --tokens 33 | field written)" \
        $((want + 33)) || return 1
    [ "$before" != "$(executor_pid)" ] || fail "the executor is still $before" || return 1
    kvpool audit >/dev/null
}

a_pool_for_legacy_handles_is_lost_with_its_executor_and_that_is_said() {
    local token seq
    [ "$backend" = cuda ] || return 77
    start "$bin/kvpoold" || return 1
    kvpool pool create a --pages 256 --legacy-ipc "${small[@]}" >/dev/null || return 1
    token=$(kvpool session open) || return 1
    seq=$(kvpool --session "$token" seq open a 7) || return 1
    kvpool --session "$token" seq append a "$seq" --tokens 40 >/dev/null || return 1
    kill -KILL "$(executor_pid)" || return 1
    # the daemon hears of it by its own poll: until then the pool is as it was
    for _ in $(seq 200); do
        expect state "$(kvpool --json pool show a | field state)" lost >/dev/null && break
    done
    expect state "$(kvpool --json pool show a | field state)" lost || return 1
    ! kvpool --session "$token" seq append a "$seq" 2>/dev/null || fail "an append to a lost pool passed" || return 1
    kvpool audit >/dev/null
}

the_demo_finds_no_wrong_byte_and_no_page_kept() {
    start "$bin/kvpoold" || return 1
    kvpool --json demo --seconds "$demo_s" >"$dir.out" || { cat "$dir.out"; fail "the demo failed"; return 1; }
    sed 's/^/    /' "$dir.out"
    expect corrupt_bytes "$(field corrupt_bytes <"$dir.out")" 0 || return 1
    expect leaked_pages "$(field leaked_pages <"$dir.out")" 0 || return 1
    kvpool audit >/dev/null
}

the_demo_finds_the_fault_that_it_makes() {
    start "$bin/kvpoold" || return 1
    kvpool --json demo --seconds 2 --inject-fault >"$dir.out" && { fail "it passed"; return 1; }
    [ "$(field corrupt_bytes <"$dir.out")" -gt 0 ] || fail "no byte was found" || return 1
    [ "$(field leaked_pages <"$dir.out")" -gt 0 ] || fail "no page was found"
}

a_killed_daemon_comes_back_to_its_pool_and_sequences() {
    local token seq before epoch
    start "$bin/kvpool-keeper" "$bin/kvpoold" || return 1
    kvpool pool create a --pages 256 "${small[@]}" >/dev/null || return 1
    token=$(kvpool session open) || return 1
    seq=$(kvpool --session "$token" seq open a 7) || return 1
    kvpool --session "$token" seq append a "$seq" --tokens 100 >/dev/null || return 1
    epoch=$(kvpool --json status | field epoch)
    before=$(daemon_pid)
    kill -KILL "$before" || return 1
    kvpool --json --wait 20 status >"$dir.out" || return 1
    expect epoch "$(field epoch <"$dir.out")" $((epoch + 1)) || return 1
    echo "    pause $(field last_pause_us <"$dir.out") us"
    expect lengths "$(kvpool seqlens a "$seq" | tail -n 1 | awk '{ print $NF }')" 100 || return 1
    expect written "$(kvpool --session "$token" --json seq append a "$seq" --at 100 --tokens 9 | field written)" 109 ||
        return 1
    kvpool audit >/dev/null
}

pools_lie_on_the_gpus_that_are_named_and_each_has_an_executor() {
    local gpus token seq pids
    mapfile -t gpus < <(sed -n 's/^GPU UUID:[[:space:]]*//p' /proc/driver/nvidia/gpus/*/information 2>/dev/null)
    [ "$backend" = cuda ] && [ ${#gpus[@]} -ge 2 ] || return 77
    start "$bin/kvpoold" || return 1
    kvpool --json pool create both --pages 256 --devices "${gpus[0]},${gpus[1]}" "${small[@]}" >"$dir.out" || return 1
    [ "$(grep -cF -e "${gpus[0]}" -e "${gpus[1]}" "$dir.out")" = 2 ] || fail "not both GPUs are named" || return 1
    pids=$(kvpool --json status | sed -n '/"executors"/,$p' | sed -n 's/^ *"pid": \([0-9]*\).*/\1/p' | sort -u)
    expect executors "$(wc -w <<<"$pids")" 2 || return 1
    kvpool pool create second --pages 256 --devices "${gpus[1]}" "${small[@]}" >/dev/null || return 1
    token=$(kvpool session open) || return 1
    seq=$(kvpool --session "$token" seq open second 7) || return 1
    kvpool --session "$token" seq append second "$seq" --tokens 40 >/dev/null || return 1
    # shellcheck disable=SC2086 # a word each
    kill -KILL $pids || return 1
    expect written "$(kvpool --session "$token" --json seq append second "$seq" --at 40 --tokens 9 | field written)" 49 ||
        return 1
    kvpool audit >/dev/null
}

sigterm_ends_it_with_0_and_its_executor_with_it() {
    local executor status
    start "$bin/kvpoold" || return 1
    kvpool pool create a --pages 256 "${small[@]}" >/dev/null || return 1
    executor=$(executor_pid)
    kill -TERM "$daemon"
    wait "$daemon"
    status=$?
    daemon=''
    expect "exit status" "$status" 0 || return 1
    timeout 15 tail -s 0.05 --pid="$executor" -f /dev/null || fail "the executor $executor lives on"
}

# ---- the run ---------------------------------------------------------------------------------------------------------

tests=(a_pool_lies_on_the_gpu_and_the_daemon_has_no_driver_open
    an_executor_killed_in_mid_append_is_replaced_and_only_what_is_written_counts
    a_pool_for_legacy_handles_is_lost_with_its_executor_and_that_is_said
    the_demo_finds_no_wrong_byte_and_no_page_kept
    the_demo_finds_the_fault_that_it_makes
    a_killed_daemon_comes_back_to_its_pool_and_sequences
    pools_lie_on_the_gpus_that_are_named_and_each_has_an_executor
    sigterm_ends_it_with_0_and_its_executor_with_it)

if [ "$backend" = cuda ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    for name in "${tests[@]}"; do echo "skipped $name: there is no GPU"; done
    echo "0 passed, 0 failed, ${#tests[@]} skipped"
    exit 77
fi
scratch=$(mktemp -d "${TMPDIR:-/tmp}/kvp.XXXXXX") || exit 1
trap 'stop; rm -rf "$scratch"' EXIT
for name in "${tests[@]}"; do
    dir=$scratch/$((passed + failed + skipped))
    mkdir -m 0755 "$dir"
    output=$("$name" 2>&1; status=$?; stop; exit $status)
    status=$?
    case $status in
    0) echo "passed  $name"; passed=$((passed + 1)) ;;
    77) echo "skipped $name: this machine has not the GPUs for it"; skipped=$((skipped + 1)) ;;
    *)
        echo "FAILED  $name"
        failed=$((failed + 1))
        tail -n 15 "$dir.log" 2>/dev/null | sed 's/^/    log: /'
        ;;
    esac
    [ -z "$output" ] || echo "$output"
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
