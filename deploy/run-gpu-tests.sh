#!/usr/bin/env bash
# Run the GPU tests and benches of a bundle (made by bundle.sh), or of a build folder, where this script lies beside bin/
# and tests/ or is given that folder. Needs a GPU and its driver, and no package.
#
#   ./run-gpu-tests.sh [-d FOLDER] [-n] [NAME…]
#     -d FOLDER  the bundle or build folder; by default the one in which this script lies
#     -n         no benches
#     NAME       programs of tests/ to run; by default all
#
# Every test is listed by name as passed, skipped or FAILED; a skip never counts as passed. The last line is
# "N passed, N failed, N skipped". Exit status: 0 nothing failed, 1 something failed, 2 wrong arguments.
set -u
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
with_benches=1
while getopts d:nh option; do
    case $option in
    d) folder=$(cd "$OPTARG" && pwd) || exit 2 ;;
    n) with_benches=0 ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "$option" = h ] && exit 0 || exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ -d "$folder/tests" ] && [ -d "$folder/bin" ] || { echo "$folder has no tests/ and bin/" >&2; exit 2; }

tests=(kernels_matrix kernels_cuda exec_gpu attach_by_grpc_gpu survive_gpu stack_gpu.sh python_gpu.py kill_cache_gpu.sh)
benches=(kvp_bench_kernels kvp_bench_python.py)
limit_s=${KVPOOL_TEST_LIMIT_S:-300}
passed=0 failed=0 skipped=0
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT

# What a program printed, to lines "passed|FAILED|skipped NAME…" and a last one with the three counts. Check prints a line
# a test, "FILE:LINE:P:CASE:NAME:N: TEXT" (P passed, F and E failed); the others print such lines themselves, what belongs
# to one indented behind it, and their counts at the end.
read_results() {
    awk '
        match($0, /:[PFE]:[^:]*:[A-Za-z0-9_]+:[0-9]+: /) {
            split(substr($0, RSTART + 1, RLENGTH - 1), part, ":")
            name = part[3]; mark = part[1]
            if (!(name in seen)) { seen[name] = 1; order[++n] = name }
            if (mark == "P") { good[name]++; passed++ }
            else { bad[name] = bad[name] "\n    " substr($0, RSTART + RLENGTH); failed++ }
            next
        }
        /^skipped / { print; skipped++; next }
        /^passed / || /^FAILED / || /^    / { print; next }
        /^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { own_passed = $1; own_failed = $3; own = 1 }
        END {
            for (i = 1; i <= n; i++) {
                name = order[i]
                if (name in bad) print "FAILED  " name ":" bad[name]
                else print "passed  " name (good[name] > 1 ? " (" good[name] " times)" : "")
            }
            if (own) { passed += own_passed; failed += own_failed }
            print passed + 0, failed + 0, skipped + 0
        }' "$1"
}

# run_program NAME KIND
run_program() {
    local name=$1 kind=$2 limit=$limit_s status results counts p f s
    case $name in *.py) limit=$((limit * 3)) ;; esac # they load models, and may compile what others bring
    if [ ! -x "$folder/tests/$name" ]; then
        echo "skipped $name: it is not in $folder/tests"
        skipped=$((skipped + 1))
        return
    fi
    if [ "$kind" = bench ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
        echo "skipped $name: there is no GPU"
        skipped=$((skipped + 1))
        return
    fi
    echo "== $name"
    (cd "$folder/tests" && KVPOOL_BIN_DIR="$folder/bin" CK_DEFAULT_TIMEOUT=120 timeout -k 10 "$limit" "./$name") \
        >"$log" 2>&1 </dev/null
    status=$?
    if [ "$kind" = bench ]; then
        cat "$log"
        case $status in
        0) echo "passed  $name"; passed=$((passed + 1)) ;;
        *) echo "FAILED  $name: exit status $status"; failed=$((failed + 1)) ;;
        esac
        return
    fi
    results=$(read_results "$log")
    counts=${results##*$'\n'}
    read -r p f s <<<"$counts"
    [ "$results" = "$counts" ] || echo "${results%$'\n'*}"
    if [ "$status" -ne 0 ] && [ "$status" -ne 77 ] && [ "$f" -eq 0 ]; then
        tail -n 20 "$log"
        echo "FAILED  $name: exit status $status"
        f=1
    elif [ $((p + f + s)) -eq 0 ]; then
        echo "FAILED  $name: it ran no test"
        f=1
    fi
    [ "$p" -eq 0 ] || echo "$name: $p passed"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

if [ $# -gt 0 ]; then
    for name in "$@"; do
        case $name in kvp_bench_*) run_program "$name" bench ;; *) run_program "$name" test ;; esac
    done
else
    for name in "${tests[@]}"; do run_program "$name" test; done
    if [ $with_benches -eq 1 ]; then
        for name in "${benches[@]}"; do run_program "$name" bench; done
    fi
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
