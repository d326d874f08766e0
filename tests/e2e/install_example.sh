#!/usr/bin/env bash
# The README's C client compiles against an installed tree, by pkg-config and by find_package, and runs.
# install_example.sh BUILD SOURCE CC FLAGS: BUILD is installed into a folder of its own; example.c is that of SOURCE.
set -euo pipefail
build=$1 source=$2 cc=$3 flags=${4:-}

work=$(mktemp -d "${TMPDIR:-/tmp}/kvpool-install.XXXXXX")
daemon=
clean() {
    [ -z "$daemon" ] || { kill -TERM "$daemon" 2>/dev/null || true; wait "$daemon" || true; }
    rm -rf "$work"
}
trap clean EXIT

DESTDIR=$work/tree cmake --install "$build" --prefix / >"$work/install.log" || { cat "$work/install.log"; exit 1; }
for file in bin/kvpool bin/kvpoold bin/kvpool-exec include/kvpool/kvpool.h; do
    [ -e "$work/tree/$file" ] || { echo "not installed: $file"; exit 1; }
done
sample=$work/tree$("$work/tree/bin/kvpoold" --help | sed -n 's/.*read FILE (\(.*\), where it is).*/\1/p')
[ -f "$sample" ] || { echo "kvpoold reads a file that is not installed: $sample"; exit 1; }
"$work/tree/bin/kvpoold" --print-config | cmp - "$sample"
echo '# of the operator' >>"$sample"
DESTDIR=$work/tree cmake --install "$build" --prefix / >"$work/install.log"
tail -n 1 "$sample" | grep -qx '# of the operator' || { echo "an upgrade takes the operator's $sample away"; exit 1; }
library=$(find "$work/tree" -name 'libkvpool.so.0')
[ -n "$library" ] || { echo "not installed: libkvpool.so.0"; exit 1; }
library=$(dirname "$library")
if objdump -p "$library/libkvpool.so.0" | grep -E 'NEEDED.*(grpc|libcuda|nvidia)'; then
    echo "libkvpool links what it must not"
    exit 1
fi
[ "$(grep -c '' "$source/example.c")" -le 30 ] || { echo "the example has more than 30 lines"; exit 1; }

# by pkg-config
export PKG_CONFIG_PATH=$library/pkgconfig
# shellcheck disable=SC2046,SC2086
"$cc" -std=gnu11 -Wall -Wextra -Werror $flags "$source/example.c" -o "$work/by-pkg-config" \
    $(pkg-config --cflags --libs kvpool) -Wl,-rpath,"$library"

# by find_package
mkdir "$work/project"
cp "$source/example.c" "$work/project/"
cat >"$work/project/CMakeLists.txt" <<'PROJECT'
cmake_minimum_required(VERSION 3.25)
project(app C)
find_package(kvpool 0.1 REQUIRED)
add_executable(app example.c)
target_link_libraries(app kvpool::kvpool)
PROJECT
cmake -G Ninja -S "$work/project" -B "$work/project/build" -DCMAKE_PREFIX_PATH="$work/tree" -DCMAKE_C_COMPILER="$cc" \
    -DCMAKE_C_FLAGS="$flags" >"$work/cmake.log" 2>&1 &&
    cmake --build "$work/project/build" >>"$work/cmake.log" 2>&1 || { cat "$work/cmake.log"; exit 1; }

# both, against the installed daemon
mkdir "$work/run"
"$work/tree/bin/kvpoold" --backend host --runtime-dir "$work/run" 2>"$work/daemon.log" &
daemon=$!
export KVPOOL_ENDPOINT=$work/run/kvpool.sock
"$work/tree/bin/kvpool" --wait 20 status >/dev/null
for program in "$work/by-pkg-config" "$work/project/build/app"; do
    said=$("$program")
    [ "$said" = "sequence 42 has 20 tokens" ] || { echo "$program said: $said"; exit 1; }
done
"$work/tree/bin/kvpool" audit >/dev/null
kill -TERM "$daemon"
wait "$daemon"
daemon=
echo "the example compiles and runs by pkg-config and by find_package"
