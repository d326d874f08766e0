#!/usr/bin/env bash
# Make build/bundle/: kvpool for a machine with a GPU on which nothing is installed (Debian 12, Ubuntu 24.04).
#
#   ./deploy/bundle.sh [-b BUILD] [-o FOLDER]
#     -b BUILD   take this build folder as it is; by default the release preset is built
#     -o FOLDER  by default build/bundle
#
#   bin/               every program; they find each other there
#   lib/               libkvpool.so, and each shared library that anything here needs, but those of the C library
#   tests/             the tests that use a GPU, and the benches
#   python/            the package kvpool, and its tests
#   run-gpu-tests.sh   runs them
#
# All of it finds its libraries by $ORIGIN, so the folder may lie anywhere. The driver is the machine's own.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
. deploy/packages.sh

build='' bundle=build/bundle
max_mib=60
while getopts b:o:h option; do
    case $option in
    b) build=$OPTARG ;;
    o) bundle=$OPTARG ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0"; [ "$option" = h ] && exit 0 || exit 2 ;;
    esac
done

need_packages patchelf binutils
if [ -z "$build" ]; then
    need_packages "${packages_build[@]}"
    build=build/release
    cmake --preset release >/dev/null
    cmake --build --preset release
fi
if ! [ -x "$build/bin/kvpool-exec" ] || ! [ -x "$build/tests/exec_gpu" ]; then
    echo "$build has no CUDA backend: a bundle needs NVIDIA's toolkit where it is built (KVPOOL_CUDA=ON says what is missing)" >&2
    exit 1
fi

# Part of the C library or of the kernel, and so of every machine.
is_system() {
    case $1 in
    ld-linux* | linux-vdso* | libc.so.* | libm.so.* | libdl.so.* | libpthread.so.* | librt.so.* | libresolv.so.* | \
        libutil.so.* | libanl.so.* | libmvec.so.*) return 0 ;;
    esac
    return 1
}

is_elf() {
    [ "$(head -c 4 "$1" | tr -d '\0')" = $'\x7fELF' ]
}

rm -rf "$bundle"
mkdir -p "$bundle"/{bin,lib,tests}
for program in "$build"/bin/*; do
    if [ -f "$program" ] && [ -x "$program" ]; then cp "$program" "$bundle/bin/"; fi
done
for program in "$build"/tests/{kernels_matrix,kernels_cuda,exec_gpu,attach_by_grpc_gpu,survive_gpu,stack_gpu.sh,python_gpu.py} \
    "$build"/tests/kill_cache{,_gpu.sh} \
    "$build"/tests/kvp_bench_*; do
    if [ -f "$program" ]; then cp "$program" "$bundle/tests/"; fi
done
cp deploy/run-gpu-tests.sh LICENSE "$bundle/"
mkdir "$bundle/python"
cp -r client/python/{kvpool,tests,examples} "$bundle/python/"
find "$bundle/python" -name __pycache__ -prune -exec rm -r {} +

# A shared library of ours or of a package, under the name by which it is asked for.
find "$build" -name 'libkvpool.so*' -exec cp -P {} "$bundle/lib/" \;
for file in "$bundle"/bin/* "$bundle"/tests/* "$bundle"/lib/*; do
    if [ -L "$file" ] || ! is_elf "$file"; then continue; fi
    LD_LIBRARY_PATH="$bundle/lib" ldd "$file" | awk '$2 == "=>" { print $1, $3 }'
done | sort -u | while read -r name path; do
    if is_system "$name" || [ -e "$bundle/lib/$name" ]; then continue; fi
    if [ "$path" = not ]; then
        echo "$name is needed and not here" >&2
        exit 1
    fi
    cp -L "$path" "$bundle/lib/$name"
done

for file in "$bundle"/bin/* "$bundle"/tests/* "$bundle"/lib/*; do
    if [ -L "$file" ] || ! is_elf "$file"; then continue; fi
    chmod u+w "$file"
    strip --strip-unneeded "$file"
    case $file in
    */lib/*) patchelf --set-rpath '$ORIGIN' "$file" ;;
    *) patchelf --set-rpath '$ORIGIN/../lib' "$file" ;;
    esac
done

# What it is worth: every library that is not the system's is found inside, and the size holds.
inside=$(cd "$bundle" && pwd)
outside=$(for file in "$bundle"/bin/* "$bundle"/tests/* "$bundle"/lib/*; do
    if [ -L "$file" ] || ! is_elf "$file"; then continue; fi
    ldd "$file" | awk -v inside="$inside/" '$2 == "=>" && index($3, inside) != 1 { print $1 }'
done | sort -u | while read -r name; do is_system "$name" || echo "$name"; done)
if [ -n "$outside" ]; then
    echo "found outside of the bundle: $outside" >&2
    exit 1
fi
mib=$(du -sm --apparent-size "$bundle" | cut -f1)
echo "$bundle: $mib MiB, $(find "$bundle/lib" -type f | wc -l) libraries"
if [ "$mib" -gt "$max_mib" ]; then
    echo "that is over $max_mib MiB" >&2
    exit 1
fi
