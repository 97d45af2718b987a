//! Images loaded onto the GPU, each once, whichever thread asks first.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{result, sys};

use super::compile::{ahead, arch, compile};
use super::driver::{Context, Stream, failed};
use super::images::Images;
use super::nvrtc::Nvrtc;
use super::spec::Spec;
use super::table::Capability;
use crate::error::{MlxError, Result};

/// The first GPUs and the first driver on which a kernel may start while the one before it on the
/// stream still runs, in graphs too (CUDA programming guide, programmatic dependent launch).
const EARLY: (Capability, (u32, u32)) = (Capability(9, 0), (12, 3));

/// A kernel that can be launched.
#[derive(Debug)]
pub(super) struct Function {
    raw: sys::CUfunction,
    module: sys::CUmodule,
    context: Arc<Context>,
    pub(super) spec: Spec,
    /// Whether it may start while the kernel before it runs.
    early: bool,
}

// SAFETY: functions and modules may be used from any thread whose context is theirs.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

type Slot = Arc<OnceLock<Result<Arc<Function>>>>;

/// The kernels loaded so far.
pub(super) struct Modules {
    /// Compiled ahead; looked at first.
    pub(super) images: Option<Arc<Images>>,
    nvrtc: OnceLock<Result<Nvrtc>>,
    slots: Mutex<HashMap<Spec, Slot>>,
}

impl std::fmt::Debug for Modules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Modules").finish_non_exhaustive()
    }
}

impl Modules {
    pub(super) fn new(images: Option<Arc<Images>>) -> Self {
        Self {
            images,
            nvrtc: OnceLock::new(),
            slots: Mutex::default(),
        }
    }

    /// The compiler, looked for when it is first needed.
    pub(super) fn nvrtc(&self, context: &Context) -> Result<&Nvrtc> {
        self.nvrtc
            .get_or_init(|| Nvrtc::find(Some(context.driver.0)))
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The kernel of a row, compiled and loaded where it is not yet. Different kernels are compiled
    /// side by side.
    pub(super) fn get(&self, context: &Arc<Context>, spec: &Spec) -> Result<Arc<Function>> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            match slots.get(spec) {
                Some(slot) => Arc::clone(slot),
                None => Arc::clone(slots.entry(spec.clone()).or_default()),
            }
        };
        slot.get_or_init(|| self.load(context, spec).map(Arc::new))
            .clone()
    }

    fn image(&self, context: &Context, spec: &Spec) -> Result<Vec<u8>> {
        if let Some(images) = &self.images
            && let Some(image) = ahead(images, spec, context.capability)?
        {
            return Ok(image);
        }
        let nvrtc = self.nvrtc(context)?;
        let arch = arch(nvrtc, context.capability)?;
        Ok(compile(nvrtc, spec, &arch, true)?.cubin)
    }

    fn load(&self, context: &Arc<Context>, spec: &Spec) -> Result<Function> {
        let cubin = self.image(context, spec)?;
        let failed = |what: &'static str| {
            let failed = failed(what);
            let name = spec.name();
            move |error| MlxError::ShaderCompilationError {
                name: name.clone(),
                message: failed(error).to_string(),
            }
        };
        context.enter()?;
        // SAFETY: an image that NVRTC made, whole as its checksum says, now, in the cache, or ahead
        // (whoever gave the file promised it in unsafe code); the driver copies it.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map_err(failed("loading the image"))?;
        let mut function = Function {
            raw: std::ptr::null_mut(),
            module,
            context: Arc::clone(context),
            spec: spec.clone(),
            early: spec.waits && context.capability >= EARLY.0 && context.driver >= EARLY.1,
        };
        let entry = CString::new(spec.entry).map_err(|e| MlxError::ShaderCompilationError {
            name: spec.name(),
            message: e.to_string(),
        })?;
        // SAFETY: the module is loaded and kept with the function.
        function.raw = unsafe { result::module::get_function(module, entry) }
            .map_err(failed("finding the kernel"))?;
        if let Ok(shared @ 1..) = i32::try_from(spec.shared) {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as A;
            // SAFETY: the function is there.
            unsafe { result::function::set_function_attribute(function.raw, A, shared) }
                .map_err(failed("asking for shared memory"))?;
        }
        Ok(function)
    }
}

impl Function {
    /// Launches `blocks` threadblocks.
    ///
    /// # Safety
    /// `args` point to values of the kernel's parameter types, and what those point to on the GPU is
    /// as large as the kernel takes it to be until it has run. One that says so waits by itself for the
    /// kernel before it, before it reads or writes any of that.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        blocks: u64,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(()); // no rows: nothing to write
        }
        let blocks = u32::try_from(blocks)
            .ok()
            .filter(|n| (1..=i32::MAX.unsigned_abs()).contains(n))
            .ok_or_else(|| {
                MlxError::CommandBufferError(format!(
                    "{}: expected 1 to 2147483647 threadblocks, got {blocks}",
                    self.spec.name()
                ))
            })?;
        let mut attribute = sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig_st {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.spec.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.spec.shared,
            hStream: stream.raw(),
            attrs: &raw mut attribute,
            numAttrs: self.early.into(),
        };
        // SAFETY: the module is loaded; the configuration and the attribute that it points to outlive
        // the call; the rest is promised by the caller.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.raw,
                args.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| failed(&self.spec.name())(error))
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: loaded once, unloaded once. Commands hold their kernels until they have run.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}
