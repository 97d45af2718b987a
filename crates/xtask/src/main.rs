//! Chores of the workspace.
//!
//! `cargo xtask metallib DIR` compiles the Metal kernels ahead of time, where Apple's compiler is.
//! A program with `MLX_FLASH_METALLIB_DIR=DIR` then loads them instead of compiling their text.
//!
//! `cargo xtask allocas` fails where a Metal kernel keeps variables in memory instead of registers. It needs
//! a `clang++`, and no Mac.
//!
//! `cargo xtask-cuda cubins ARCH..` (`sm_80 sm_90a`) compiles the CUDA kernels, which needs
//! no GPU, and fails where one spills registers or the compiler complains.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod allocas;
#[cfg(feature = "cuda")]
mod cubins;

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
        ["cubins", ref archs @ ..] if !archs.is_empty() => cubins::run(archs),
        _ => Err(
            "usage: cargo xtask metallib DIR; cargo xtask allocas; cargo xtask-cuda cubins ARCH.."
                .into(),
        ),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::from(2)
        }
    }
}

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
            .args([
                "-sdk",
                "macosx",
                "metal",
                "-std=metal3.1",
                "-fno-fast-math",
                "-o",
            ])
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
