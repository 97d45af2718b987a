//! Systems and processors without support.

use std::path::PathBuf;

use crate::{
    CompileOptions, Constant, ConstantInfo, Counters, Dispatch, DispatchOptions, Error, KernelInfo,
    Result,
};

fn unsupported<T>() -> Result<T> {
    Err(Error::Unsupported(
        "the emulator runs on x86_64 and aarch64 Unix systems".into(),
    ))
}

/// Finds the C++ compiler; there is none to use here.
pub fn find_compiler() -> Result<PathBuf> {
    unsupported()
}

/// Fails: this system is not supported.
pub fn kept_in_memory(
    _: &str,
    _: &CompileOptions,
    _: &[(u32, Constant)],
) -> Result<Vec<(String, Vec<String>)>> {
    unsupported()
}

/// A compiled program; it cannot exist here.
#[derive(Debug)]
pub struct Library {
    never: std::convert::Infallible,
}

impl Library {
    /// Fails: this system is not supported.
    pub fn compile(_: &str, _: &CompileOptions) -> Result<Self> {
        unsupported()
    }

    /// The kernels.
    #[must_use]
    pub fn kernels(&self) -> &[KernelInfo] {
        match self.never {}
    }

    /// One kernel.
    pub fn kernel(&self, _: &str) -> Result<&KernelInfo> {
        match self.never {}
    }

    /// The function constants.
    #[must_use]
    pub fn constants(&self) -> &[ConstantInfo] {
        match self.never {}
    }

    /// Runs a dispatch.
    ///
    /// # Safety
    /// None to keep: it cannot be called.
    pub unsafe fn dispatch(&self, _: &mut Dispatch<'_>, _: &DispatchOptions) -> Result<Counters> {
        match self.never {}
    }
}
