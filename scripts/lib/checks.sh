# What is checked, a function each, run as steps by scripts/test. Sourced by it.

# One set of features everywhere, so that the library is compiled once for its tests, for the program
# and for what else runs here.
features=(--features cuda,emulator)
built=${CARGO_TARGET_DIR:-$root/target}
# Checks that only read the code have a folder of their own: a build locks the one it builds in.
checks=$built/checks
# NVIDIA's oldest and newest instructions that the kernels use.
cuda_archs="sm_80 sm_90a"
# Machines that the code is linted for beside this one; Apple's has a script of its own.
# Only --all takes the second list: every run lints the same code for Apple and runs it on arm64.
cross_targets="x86_64-unknown-linux-gnu x86_64-pc-windows-msvc"
cross_targets_all="aarch64-unknown-linux-gnu"
# Unit tests that miri runs, by parts of their names: where the core crate has unsafe code, and knows no
# device but the CPU. miri takes the portable code. Only --all runs the second list.
miri_filters="runtime:: backend::host_memory interpreted::keys interpreted::two_threads"
miri_filters_all="interpreted:: kernels::tests::vectors"

in_checks() {
    CARGO_TARGET_DIR=$checks "$@"
}

# in_candle COMMAND...: in the workspace of the candle crate.
in_candle() {
    (cd crates/mlx-flash-attn-candle && "$@")
}

# -- What reads the code ---------------------------------------------------------------------------

formatting() {
    need_component rustfmt || { skip "formatting" "rustfmt is not installed"; return; }
    cargo fmt --all --check && in_candle cargo fmt --check
}

# Imports run one way, and no more than two files import each other.
imports() {
    command -v python3 >/dev/null || { skip "imports" "there is no python3"; return; }
    scripts/imports
}

lints() {
    need_component clippy || { skip "lints" "clippy is not installed"; return; }
    in_checks cargo clippy $locked --workspace --all-targets "$@" -- -D warnings
}

# cross TARGET: type-checked and linted for another machine, so that code for it cannot rot.
cross() {
    need_target "$1" || { skip "$1" "no rustup, or the target is not installed"; return; }
    lints --target "$1" "${features[@]}"
}

# apple [--all]. Exit status 2 says that the check could not be made.
apple() {
    local status=0
    in_checks scripts/check-apple "$@" $($offline && echo --offline) || status=$?
    [ "$status" -ne 2 ] || { skip "check for Apple" "scripts/check-apple cannot run here"; return; }
    return "$status"
}

documentation() {
    RUSTDOCFLAGS="-D warnings" in_checks cargo doc --workspace --no-deps "${features[@]}"
}

# msrv [--all]: of the library; with --all of the program, too. Development dependencies may ask for more, so only what
# users build is checked.
msrv() {
    local toolchain
    need_minimum . || { skip "minimum Rust $toolchain" "the toolchain is not installed"; return; }
    in_checks rustup run "$toolchain" cargo check --locked -p mlx-flash-attn --lib "${features[@]}" || return
    [ "${1-}" != --all ] ||
        in_checks rustup run "$toolchain" cargo check --locked -p mlx-flash-attn-cli --bins "${features[@]}"
}

# Workspaces that no other step builds. Nothing is linked, so libFuzzer need not be compiled.
fuzz_targets() {
    (cd fuzz && CUSTOM_LIBFUZZER_PATH=/libfuzzer.a in_checks cargo check --locked --all-targets)
}

peers() {
    (cd crates/peers && in_checks cargo check --locked --all-targets --workspace)
}

deny() {
    need_deny || { skip "licences, bans and sources" "cargo-deny is not installed"; return; }
    cargo deny check bans licenses sources &&
        in_candle cargo deny check bans licenses sources
}

advisories() {
    need_deny || { skip "advisories" "cargo-deny is not installed"; return; }
    if $offline || ! cargo deny fetch db; then
        skip "advisories" "the advisory database cannot be fetched"
        return
    fi
    cargo deny check advisories && in_candle cargo deny check advisories
}

candle_lints() {
    need_component clippy || { skip "lints of the candle crate" "clippy is not installed"; return; }
    in_candle in_checks cargo clippy --locked --all-targets -- -D warnings
}

candle_documentation() {
    RUSTDOCFLAGS="-D warnings" in_candle in_checks cargo doc --locked --no-deps
}

candle_msrv() {
    local toolchain
    need_minimum crates/mlx-flash-attn-candle ||
        { skip "minimum Rust $toolchain of the candle crate" "the toolchain is not installed"; return; }
    in_candle in_checks rustup run "$toolchain" cargo check --locked --lib
}

data() {
    cd data || return
    if have sha256sum; then sha256sum -c SHA256SUMS; else shasum -a 256 -c SHA256SUMS; fi
}

# -- What is published -----------------------------------------------------------------------------

# Nothing of it is fast or need be: the same code is tested optimised.
unoptimised() {
    CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=0 in_checks "$@"
}

# What the registry would refuse. That the packages build is another check, `packages`.
publish() {
    if $offline; then
        skip "publication" "it asks the registry"
        return
    fi
    unoptimised cargo publish --dry-run --workspace --locked --allow-dirty --no-verify
}

# The crates as a user gets them build, and their documentation tests pass: what they include is in the
# package too.
packages() {
    local packages=$checks/package version folder package patches
    unoptimised cargo package $($offline && echo --offline) --workspace --exclude xtask --locked --allow-dirty \
        --no-verify || return
    version=$(sed -n 's/^version *= *"\(.*\)".*/\1/p' Cargo.toml | head -n 1)
    folder=$(mktemp -d "$scratch/packages.XXXXXX") || return
    # The registry may not have the other crates yet.
    patches=()
    for package in msl-emulator mlx-flash-attn; do
        patches+=(--config "patch.crates-io.$package.path='$folder/$package-$version'")
    done
    for package in msl-emulator mlx-flash-attn mlx-flash-attn-cli; do
        tar -xzf "$packages/$package-$version.crate" -C "$folder" || return
    done
    (cd "$folder/msl-emulator-$version" && unoptimised cargo test --doc --no-fail-fast) &&
        (cd "$folder/mlx-flash-attn-$version" &&
            unoptimised cargo test --doc --no-fail-fast "${features[@]}" "${patches[@]:0:2}") &&
        (cd "$folder/mlx-flash-attn-cli-$version" &&
            unoptimised cargo check "${features[@]}" "${patches[@]}")
}

# -- What runs the code ----------------------------------------------------------------------------

# Everything that the steps after it run.
build() {
    cargo build $locked --workspace --all-targets "${features[@]}"
}

tests() {
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run $locked --workspace "${features[@]}" --no-fail-fast --success-output immediate "$@"
    else
        cargo test $locked --workspace "${features[@]}" --no-fail-fast \
            --lib --bins --tests --examples "$@" -- --show-output
    fi
}

# What is too slow for every run, and ignored there.
slow_tests() {
    cargo test $locked --workspace "${features[@]}" --lib -- --ignored --show-output barrier
}

# Unit tests of mlx-native's own module, of which the repository has no copy.
seed_tests() {
    [ -n "${MLX_FLASH_SEED_FILE-}" ] ||
        { skip "mlx-native's own unit tests" "MLX_FLASH_SEED_FILE names no copy of them"; return; }
    scripts/seed-tests
}

documentation_tests() {
    cargo test $locked --workspace "${features[@]}" --doc --no-fail-fast
}

main_job() {
    "$built/debug/mlx-flash-attn" run -i data/mpnet_layer0.safetensors -o "$scratch/out.safetensors" --check ||
        return
    if [ ! -s "$scratch/out.safetensors" ]; then
        echo "no output was written"
        return 1
    fi
}

# miri FILTER...: the unit tests whose names have one of the filters.
miri() {
    need_miri || { skip "miri" "it is not installed on nightly"; return; }
    # Rayon's pool outlives main, casts integers to pointers, and is sound by Tree Borrows only.
    # Property tests read the clock and the folder they run in, and are slow when interpreted.
    local flags="-Zmiri-tree-borrows -Zmiri-permissive-provenance -Zmiri-ignore-leaks -Zmiri-disable-isolation"
    # Panics that tests expect would each be traced by an interpreted unwinder.
    RUST_BACKTRACE=0 MIRIFLAGS="${MIRIFLAGS-$flags}" PROPTEST_CASES="${PROPTEST_CASES-4}" \
        rustup run nightly cargo miri test --locked -p mlx-flash-attn --lib -- "$@"
}

# arm64 "ISA PART"...: parts of the contract on NEON, emulated; ISA is a value of MLX_FLASH_CPU_ISA.
# For release, which compiles and runs in less time.
arm64() {
    local target=aarch64-unknown-linux-gnu run status=0
    if [ "$(uname -m)" = aarch64 ]; then
        skip "contract on emulated arm64" "this machine is arm64: its own contract covers it"
        return
    fi
    need_arm64 || { skip "contract on emulated arm64" "no qemu-aarch64 or aarch64-linux-gnu-gcc"; return; }
    need_target "$target" || { skip "contract on emulated arm64" "the target $target is not installed"; return; }
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        cargo build --release --locked --quiet -p mlx-flash-attn-cli --target "$target" || return
    for run in "$@"; do
        echo "MLX_FLASH_CPU_ISA, part: $run"
        MLX_FLASH_CPU_ISA=${run% *} qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu \
            "$built/$target/release/mlx-flash-attn" \
            verify --device cpu --quick --part "${run#* }" || status=1
    done
    return $status
}

cuda_gpu() {
    nvidia-smi -L >/dev/null 2>&1 || { skip "tests on an NVIDIA GPU" "there is none"; return; }
    # The whole workspace, so that nothing is compiled again for other features.
    cargo test --locked --workspace "${features[@]}" \
        --test cuda --test bits --test visibility --test extremes -- --show-output
}

# cuda_kernels [--all]: that no kernel spills registers or is serialized. Without --all, kernels that
# the manifest knows by their text, options and compiler are not compiled again.
cuda_kernels() {
    need_nvrtc || { skip "CUDA kernels" "NVRTC $nvrtc_version is not installed and pip cannot bring it"; return; }
    # What NVRTC has in a cache of its own it returns without a report of registers and spills.
    CUDA_CACHE_DISABLE=1 MLX_FLASH_NVRTC=$nvrtc "$built/debug/xtask" cubins "$@" $cuda_archs
}

# That no Metal kernel keeps an array in memory that belongs in registers.
metal_registers() {
    need_clang || { skip "Metal kernels keep to registers" "there is no clang++"; return; }
    "$built/debug/xtask" allocas
}

# -- candle ----------------------------------------------------------------------------------------

candle_tests() {
    in_candle cargo test --locked --no-fail-fast --lib --test "*" -- --show-output &&
        in_candle cargo test --locked --doc
}

# models [ARGUMENT...]: tests that need the weights, which are ignored elsewhere; with arguments of the
# test program. One at a time: some count time and memory.
models() {
    need_models || { skip "real models" "scripts/fetch-models could not install the weights"; return; }
    in_candle cargo test --locked --no-fail-fast --examples -- \
        --include-ignored --test-threads 1 --nocapture "$@" || return
    in_candle cargo run --locked --quiet --example gemma3 -- \
        "The capital of France is" | tee "$scratch/gemma3" || return
    grep -q "40 generated" "$scratch/gemma3"
}

embeddings() {
    need_models || { skip "embeddings" "scripts/fetch-models could not install the weights"; return; }
    (cd crates/mlx-flash-attn-candle && ../../scripts/check-embed \
        cargo run --locked --quiet --example embed --)
}
