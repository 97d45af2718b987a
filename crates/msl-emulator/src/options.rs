//! What a caller chooses: how to compile, and how to run.

use std::path::PathBuf;

/// How to compile a program.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CompileOptions {
    /// Name of the text in messages.
    pub name: String,
    /// Preprocessor macros, as `MTLCompileOptions.preprocessorMacros`.
    pub defines: Vec<(String, String)>,
    /// Folders for `#include "..."`.
    pub include_dirs: Vec<PathBuf>,
    /// Instantiations of kernel templates to compile, by the names that a host asks for; all where
    /// none is named. Kernels that are no templates are always compiled.
    pub kernels: Vec<String>,
    /// Whether to check address spaces in a compilation of its own.
    pub check_types: bool,
}

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            name: "program.metal".into(),
            defines: Vec::new(),
            include_dirs: Vec::new(),
            kernels: Vec::new(),
            check_types: true,
        }
    }
}

impl CompileOptions {
    /// The defaults, with a name for messages.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Adds a macro.
    #[must_use]
    pub fn define(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.defines.push((name.into(), value.into()));
        self
    }

    /// Adds a kernel to those that are compiled.
    #[must_use]
    pub fn kernel(mut self, name: impl Into<String>) -> Self {
        self.kernels.push(name.into());
        self
    }

    /// Adds a folder for `#include "..."`.
    #[must_use]
    pub fn include_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.include_dirs.push(dir.into());
        self
    }
}

/// What the emulated device allows. The defaults are those of Apple GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of threadgroup memory.
    pub threadgroup_bytes: u32,
    /// Threads in a threadgroup; at most 1024.
    pub max_threads: u32,
    /// Threads in a simdgroup; only 32 is emulated.
    pub simd_width: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            threadgroup_bytes: 32_768,
            max_threads: 1024,
            simd_width: 32,
        }
    }
}

/// How to run a dispatch.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct DispatchOptions {
    /// Whether to check every access. Slower by one to two orders of magnitude.
    pub check: bool,
    /// Runs lanes, simdgroups and threadgroups in an order drawn from this seed.
    pub shuffle_seed: Option<u64>,
    /// Worker threads; 0 is one a core.
    pub threads: usize,
    /// What the device allows.
    pub limits: Limits,
}

impl DispatchOptions {
    /// Every access checked.
    #[must_use]
    pub fn checked() -> Self {
        Self {
            check: true,
            ..Self::default()
        }
    }

    /// Sets the order of lanes and threadgroups.
    #[must_use]
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.shuffle_seed = Some(seed);
        self
    }

    /// Sets the number of worker threads.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }
}
