//! Chores of the workspace.
//!
//! `cargo xtask metallib DIR` compiles the Metal kernels ahead of time, where Apple's compiler is.
//! A program with `MLX_FLASH_METALLIB_DIR=DIR` then loads them instead of compiling their text.
//!
//! `cargo xtask allocas` fails where a Metal kernel keeps variables in memory instead of registers. It needs
//! a `clang++`, and no Mac.
//!
//! `cargo xtask-cuda cubins [--all] [--update] ARCH..` (`sm_80 sm_90a`) checks the CUDA kernels,
//! which needs no GPU, and fails where one spills registers or the compiler complains. Kernels that
//! `crates/xtask/cubins.txt` has are not compiled again; `--update` compiles the others and writes
//! that file, `--all` compiles every kernel and compares.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod allocas;
#[cfg(feature = "cuda")]
mod cubins;
#[cfg(feature = "cuda")]
mod manifest;
#[cfg(feature = "cuda")]
mod resources;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

use mlx_flash_attn::KernelRegistry;
use mlx_flash_attn::kernel_registry::metallib_name;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["metallib", dir] => metallib(Path::new(dir)),
        ["allocas"] => allocas::run(),
        #[cfg(feature = "cuda")]
        ["cubins", ref rest @ ..] if rest.iter().any(|a| !a.starts_with("--")) => cubins(rest),
        _ => Err("usage: cargo xtask metallib DIR; cargo xtask allocas; \
                  cargo xtask-cuda cubins [--all] [--update] ARCH.."
            .into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::from(2)
        }
    }
}

#[cfg(feature = "cuda")]
fn cubins(arguments: &[&str]) -> Result<(), String> {
    let (flags, archs): (Vec<&str>, Vec<&str>) =
        arguments.iter().partition(|a| a.starts_with("--"));
    let mut options = cubins::Options::default();
    for flag in flags {
        match flag {
            "--all" => options.all = true,
            "--update" => options.update = true,
            other => return Err(format!("cubins: unknown option {other}")),
        }
    }
    cubins::run(&archs, options)
}

/// As the device compiles it, and for the oldest system that is served: without a version the library
/// would ask for the system that it was made on.
const METAL: [&str; 7] = [
    "-sdk",
    "macosx",
    "metal",
    "-mmacosx-version-min=14.0",
    "-std=metal3.1",
    "-fno-fast-math",
    "-o",
];

/// Compiles each text once, with the options that the device compiles it with.
fn metallib(dir: &Path) -> Result<(), String> {
    std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let registry = KernelRegistry::new();
    let texts: BTreeMap<String, &str> = registry
        .sources()
        .map(|(_, text)| (metallib_name(text), text))
        .collect();
    for (name, text) in texts {
        let library = dir.join(&name);
        let source = library.with_extension("metal");
        std::fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
        let status = Command::new("xcrun")
            .args(METAL)
            .args([&library, &source])
            .status()
            .map_err(|e| format!("xcrun, which comes with Xcode: {e}"))?;
        if !status.success() {
            return Err(format!("xcrun: {status}"));
        }
        println!("{}", library.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    /// Its own copies of tiles, params and launches had drifted from the library's.
    #[test]
    fn the_gpu_benchmark_asks_the_library_for_kernels_and_params() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts");
        let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap_or_default();
        let (bench, library) = (read("gpu-bench"), read("lib/gpu_library.py"));
        assert!(bench.contains("gpu_library") && library.contains("self.request_fields()"));
        for copied in [
            "WGS",
            "STAGES",
            "cuModule",
            "nvrtcCompile",
            "(8, 64)",
            "scale_log2",
        ] {
            assert!(
                !bench.contains(copied) && !library.contains(copied),
                "{copied}"
            );
        }
    }

    #[test]
    fn metal_libraries_are_made_for_the_oldest_system_that_is_served() {
        assert!(super::METAL.contains(&"-mmacosx-version-min=14.0"));
    }
}
