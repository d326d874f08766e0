#!/usr/bin/env bash
# Every test that can run on this machine: release and ASan+UBSan builds, under 10 minutes on 2 cores.
#   --tsan    the ThreadSanitizer build too
#   --clang   a build with clang too (warnings are errors)
#   --long    the long runs: more seeds, kills and calls
# Leaves nothing behind but build/.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/packages.sh

presets=(release asan)
clang=
for argument in "$@"; do
    case $argument in
    --tsan) presets+=(tsan) ;;
    --clang) clang=yes ;;
    --long) export KVPOOL_TEST_LONG=1 ;;
    *)
        echo "test.sh: no such option: $argument (there are --tsan, --clang, --long)" >&2
        exit 2
        ;;
    esac
done
need_packages "${packages_build[@]}" "${packages_test[@]}" ${clang:+"${packages_clang[@]}"}

# Sockets, runtime folders and logs of the tests go into a folder of this run's own, which must be empty at the end.
scratch=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-test.XXXXXX")
if [ ${#scratch} -gt 40 ]; then # a socket's path is short: a long $TMPDIR is passed over
    rmdir "$scratch"
    scratch=$(mktemp -d /tmp/kvpool-test.XXXXXX)
fi
chmod 711 "$scratch" # the tests' second user goes through it
export TMPDIR=$scratch
export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="suppressions=$PWD/tests/support/tsan.supp halt_on_error=1"
trap 'rm -rf "$scratch"' EXIT

for preset in "${presets[@]}"; do
    echo "== $preset"
    cmake --preset "$preset" >"$scratch/configure.log" 2>&1 || { cat "$scratch/configure.log"; exit 1; }
    rm -f "$scratch/configure.log"
    cmake --build --preset "$preset"
done
if [ -n "$clang" ]; then
    echo "== clang"
    CC=clang cmake -S . -B build/clang -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVPOOL_CUDA=OFF >/dev/null
    cmake --build build/clang
fi

failed=0
for preset in "${presets[@]}"; do
    echo "== tests of $preset"
    # three on two cores: most of them wait for other processes half of their time
    ctest --test-dir "build/$preset" --output-on-failure --timeout 900 -j 3 || failed=1
done

left=$(find "$scratch" -mindepth 1 | sed -n 1,5p) # to the end: head would leave find with a broken pipe
if [ -n "$left" ]; then
    printf 'left behind by the tests:\n%s\n' "$left"
    failed=1
fi
# An executor whose daemon a test killed ends by itself, at the end-of-file of its socket: it gets a minute for that.
ours="$PWD/build/.*/(bin|tests)/"
for _ in $(seq 300); do
    pgrep -f "$ours" >/dev/null || break
    sleep 0.2
done
if pgrep -f "$ours" >/dev/null; then
    echo "processes left behind by the tests:"
    pgrep -af "$ours"
    failed=1
fi
exit $failed
