# shellcheck shell=bash
# What kvpool needs of Debian 12, for quickstart.sh and test.sh (sourced by both): the lists, and one function that
# installs what is missing, or says the one line to run. The CUDA toolkit comes from NVIDIA and is used where it is.

packages_build=(gcc libc6-dev cmake ninja-build pkg-config libuv1-dev libprotobuf-c-dev protobuf-c-compiler libgrpc-dev
    libsystemd-dev libinih-dev libjansson-dev libxxhash-dev libssl-dev check)
packages_test=(python3 python3-venv python3-numpy python3-hypothesis python3-grpcio python3-protobuf protobuf-compiler
    git openssl systemd util-linux procps patchelf binutils gnuplot-nox)
packages_clang=(clang libclang-rt-14-dev)

# need_packages NAME…: returns 0 with all of them installed; else prints what to run and returns 1.
need_packages() {
    local missing=() name
    command -v dpkg-query >/dev/null || { echo "kvpool is built on Debian 12: these packages are needed: $*" >&2; return 0; }
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            as_root=(sudo)
        else
            printf 'These packages are missing; run this and start again:\n  apt-get update && apt-get install -y %s\n' \
                "${missing[*]}" >&2
            return 1
        fi
    fi
    echo "installing: ${missing[*]}"
    "${as_root[@]}" apt-get -qq update &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" \
            >/dev/null
}
