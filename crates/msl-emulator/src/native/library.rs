//! A compiled program.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::{self, Hash};
use super::module::{self, Module};
use super::shim::{self, Headers};
use super::{compiler, run};
use crate::dispatch::{Counters, Dispatch};
use crate::error::{Error, Result};
use crate::options::{CompileOptions, DispatchOptions};
use crate::reflect::{ConstantInfo, KernelInfo};
use crate::translate::{self, Pass, Program};

/// A compiled program: its kernels can be listed and run.
///
/// The checked form is compiled when it is first asked for. Both are kept on disk, so that the same
/// text is compiled once for all processes.
pub struct Library {
    program: Program,
    stem: PathBuf,
    headers: Headers,
    fast: Arc<Module>,
    checked: Mutex<Option<Arc<Module>>>,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("file", &self.program.file)
            .field("kernels", &self.program.kernels)
            .finish_non_exhaustive()
    }
}

impl Library {
    /// Compiles `source`, or finds it compiled in the cache.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] without clang, [`Error::Text`] and [`Error::Compile`] for faulty text,
    /// both with the line; [`Error::UnknownKernel`] where `options` name a kernel that the text lacks.
    pub fn compile(source: &str, options: &CompileOptions) -> Result<Self> {
        let dir = cache::dir()?;
        let headers = shim::headers(&dir)?;
        let compiler = compiler::fingerprint()?;
        let expanded = expanded(source, options, &headers, &dir, compiler)?;
        let only = &options.kernels;
        let mut program = translate::translate(&expanded, &options.name, only, Pass::Code)?;
        if let Some(name) = only.iter().find(|n| !program.names.contains(n)) {
            return Err(Error::UnknownKernel {
                name: name.clone(),
                known: program.names.join(", "),
            });
        }

        let mut hash = Hash::new();
        hash.add(&compiler.to_le_bytes());
        hash.add(&shim::fingerprint().to_le_bytes());
        hash.add(program.code.as_bytes());
        let stem = dir.join(format!("{:032x}", hash.value()));
        let path = with_suffix(&stem, "-fast.so");
        cache::make_once(&path, || {
            compiler::build(&program.code, false, &headers, &path)
        })?;
        if options.check_types {
            let types = with_suffix(&stem, "-types");
            cache::make_once(&types, || {
                let twin = translate::translate(&expanded, &options.name, only, Pass::Types)?;
                compiler::check_types(&twin.code, &headers)?;
                cache::write(&types, b"")
            })?;
        }
        let fast = module::load(&path, false)?;
        for (info, record) in program.kernels.iter_mut().zip(fast.kernels()) {
            info.max_threads = (record.max_threads > 0).then_some(record.max_threads);
            info.threadgroup_bytes = fast
                .variables(record)
                .iter()
                .map(|v| v.bytes.next_multiple_of(v.align))
                .sum();
        }
        Ok(Self {
            program,
            stem,
            headers,
            fast,
            checked: Mutex::new(None),
        })
    }

    /// The kernels that a host can ask for.
    #[must_use]
    pub fn kernels(&self) -> &[KernelInfo] {
        &self.program.kernels
    }

    /// One kernel.
    ///
    /// # Errors
    /// [`Error::UnknownKernel`], with the names that exist.
    pub fn kernel(&self, name: &str) -> Result<&KernelInfo> {
        self.index(name).map(|i| &self.program.kernels[i])
    }

    /// The function constants.
    #[must_use]
    pub fn constants(&self) -> &[ConstantInfo] {
        &self.program.constants
    }

    /// Runs a dispatch to its end.
    ///
    /// Dispatches of one program run one after the other; each uses the threads that `options` give.
    ///
    /// # Errors
    /// Whatever the dispatch lacks, before it runs; [`Error::Fault`] for what the kernel did wrong.
    /// After a fault the contents of writable bindings are not defined.
    ///
    /// # Safety
    /// The text was compiled to native code that runs in this process, so it must be trusted. Memory
    /// given by [`Binding::raw`](crate::Binding::raw) must be valid for the dispatch, for writes too
    /// where so declared, and used by nobody else meanwhile. When `options.check` is false the kernel
    /// must stay within its bindings and must not write to the read-only ones: nothing watches it.
    pub unsafe fn dispatch(
        &self,
        dispatch: &mut Dispatch<'_>,
        options: &DispatchOptions,
    ) -> Result<Counters> {
        let index = self.index(&dispatch.kernel)?;
        let module = if options.check {
            self.checked()?
        } else {
            Arc::clone(&self.fast)
        };
        // SAFETY: passed on to the caller.
        unsafe { run::run(&self.program, &module, index, dispatch, options) }
    }

    fn index(&self, name: &str) -> Result<usize> {
        self.program
            .kernels
            .iter()
            .position(|k| k.name == name)
            .ok_or_else(|| {
                let known: Vec<&str> = self
                    .program
                    .kernels
                    .iter()
                    .map(|k| k.name.as_str())
                    .collect();
                Error::UnknownKernel {
                    name: name.into(),
                    known: known.join(", "),
                }
            })
    }

    fn checked(&self) -> Result<Arc<Module>> {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = &*checked {
            return Ok(Arc::clone(module));
        }
        let path = with_suffix(&self.stem, "-checked.so");
        cache::make_once(&path, || {
            compiler::build(&self.program.code, true, &self.headers, &path)
        })?;
        let module = module::load(&path, true)?;
        *checked = Some(Arc::clone(&module));
        Ok(module)
    }
}

fn with_suffix(stem: &std::path::Path, suffix: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The preprocessed text, from the cache when the program includes no files of its own.
pub(super) fn expanded(
    source: &str,
    options: &CompileOptions,
    headers: &Headers,
    dir: &std::path::Path,
    compiler: u128,
) -> Result<String> {
    if !options.include_dirs.is_empty() {
        return compiler::preprocess(source, options, headers);
    }
    let mut hash = Hash::new();
    hash.add(&compiler.to_le_bytes());
    hash.add(&shim::fingerprint().to_le_bytes());
    hash.add(source.as_bytes());
    hash.add(options.name.as_bytes());
    for (name, value) in &options.defines {
        hash.add(name.as_bytes());
        hash.add(value.as_bytes());
    }
    let path = dir.join(format!("{:032x}.expanded", hash.value()));
    if let Ok(text) = std::fs::read_to_string(&path) {
        return Ok(text);
    }
    let text = compiler::preprocess(source, options, headers)?;
    cache::write(&path, text.as_bytes())?;
    Ok(text)
}
