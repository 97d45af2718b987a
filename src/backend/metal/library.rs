//! From kernel text to pipelines.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use objc2::rc::Retained;
use objc2::runtime::{NSObjectProtocol, ProtocolObject};
use objc2::sel;
use objc2_foundation::{NSError, NSString, NSURL};
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineDescriptor, MTLComputePipelineState, MTLDataType,
    MTLDevice, MTLFunction, MTLFunctionConstantValues, MTLLanguageVersion, MTLLibrary,
    MTLMathFloatingPointFunctions, MTLMathMode, MTLPipelineOption,
};

use super::bindings::{Constants, accesses};
use super::constants::{self, Value};
use super::limits;
use super::sources;
use crate::backend::{Kernel, Limits};
use crate::error::{MlxError, Result};

type PipelineState = Retained<ProtocolObject<dyn MTLComputePipelineState>>;

/// What a kernel of this device holds.
pub(super) struct Built {
    pub(super) pipeline: PipelineState,
}

type Library = Retained<ProtocolObject<dyn MTLLibrary>>;

/// A library that is compiled once, by whoever asks first.
type Slot = Arc<OnceLock<std::result::Result<Library, String>>>;

/// Libraries by text or path. Threads that ask for the same one share it, however many constants its
/// kernels are built with; different ones are made side by side.
#[derive(Default)]
struct Slots(Mutex<HashMap<String, Slot>>);

impl Slots {
    fn get(
        &self,
        key: &str,
        make: impl FnOnce() -> std::result::Result<Library, String>,
    ) -> std::result::Result<Library, String> {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match slots.get(key) {
                Some(slot) => Arc::clone(slot),
                None => Arc::clone(slots.entry(key.into()).or_default()),
            }
        };
        slot.get_or_init(make).clone()
    }
}

/// Libraries of this device.
#[derive(Default)]
pub(super) struct Libraries {
    /// By text.
    compiled: Slots,
    /// By path.
    loaded: Slots,
}

impl Libraries {
    pub(super) fn build(
        &self,
        device: &ProtocolObject<dyn MTLDevice>,
        kernel: &str,
        source: &str,
        constants: &Constants,
    ) -> Result<Kernel> {
        let failed = |message: String| MlxError::ShaderCompilationError {
            name: kernel.into(),
            message,
        };
        // A library that was made for another system or GPU may fail when it is loaded or when a
        // pipeline is made from it. The text serves then.
        let ahead = precompiled(source).and_then(|path| {
            let library = self.loaded.get(&path, || load(device, &path)).ok()?;
            pipeline(device, &library, kernel, constants).ok()
        });
        let pipeline = match ahead {
            Some(pipeline) => pipeline,
            None => {
                let text = sources::only(source, kernel);
                let library = self.compiled.get(&text, || compile(device, &text));
                library
                    .and_then(|library| pipeline(device, &library, kernel, constants))
                    .map_err(failed)?
            }
        };
        let limits = Limits {
            thread_execution_width: pipeline.threadExecutionWidth() as u64,
            max_threads: pipeline.maxTotalThreadsPerThreadgroup() as u64,
            static_threadgroup_bytes: pipeline.staticThreadgroupMemoryLength() as u64,
        };
        if let Some(reason) = limits::violation(kernel, constants, &limits) {
            return Err(failed(reason));
        }
        Ok(Kernel::new(
            kernel,
            constants,
            limits,
            accesses(kernel),
            Built { pipeline },
        ))
    }
}

fn load(
    device: &ProtocolObject<dyn MTLDevice>,
    path: &str,
) -> std::result::Result<Library, String> {
    let url = NSURL::fileURLWithPath(&NSString::from_str(path));
    device
        .newLibraryWithURL_error(&url)
        .map_err(|e| message(&e))
}

fn compile(
    device: &ProtocolObject<dyn MTLDevice>,
    text: &str,
) -> std::result::Result<Library, String> {
    let text = NSString::from_str(text);
    device
        .newLibraryWithSource_options_error(&text, Some(&options()))
        .map_err(|e| message(&e))
}

/// The text's library in `MLX_FLASH_METALLIB_DIR`, if it is there (see `cargo xtask metallib`).
fn precompiled(source: &str) -> Option<String> {
    let dir = std::env::var_os("MLX_FLASH_METALLIB_DIR")?;
    let path = std::path::Path::new(&dir).join(sources::metallib_name(source));
    path.exists().then(|| path.to_str().map(str::to_owned))?
}

/// The compiler's own words.
fn message(error: &NSError) -> String {
    error.localizedDescription().to_string()
}

/// Version 3.1 of the language, whatever the program was built for, and math that honours
/// infinities; what may be fast says so in the kernels.
fn options() -> Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    options.setLanguageVersion(MTLLanguageVersion::Version3_1);
    if options.respondsToSelector(sel!(setMathMode:)) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[allow(deprecated)] // All there is before macOS 15.
        options.setFastMathEnabled(false);
    }
    options
}

fn pipeline(
    device: &ProtocolObject<dyn MTLDevice>,
    library: &ProtocolObject<dyn MTLLibrary>,
    kernel: &str,
    constants: &Constants,
) -> std::result::Result<PipelineState, String> {
    let name = NSString::from_str(kernel);
    let declared = library
        .newFunctionWithName(&name)
        .ok_or("the text has no kernel of this name")?;
    let values = constant_values(&declared, kernel, constants);
    let function = library
        .newFunctionWithName_constantValues_error(&name, &values)
        .map_err(|e| message(&e))?;
    let descriptor = MTLComputePipelineDescriptor::new();
    descriptor.setLabel(Some(&name));
    descriptor.setComputeFunction(Some(&function));
    device
        .newComputePipelineStateWithDescriptor_options_reflection_error(
            &descriptor,
            MTLPipelineOption::empty(),
            None,
        )
        .map_err(|e| message(&e))
}

/// A value for every constant: our own, and false or 0 for what a caller's text declares besides.
fn constant_values(
    function: &ProtocolObject<dyn MTLFunction>,
    kernel: &str,
    constants: &Constants,
) -> Retained<MTLFunctionConstantValues> {
    let mut values = constants::values(kernel, constants);
    for constant in function.functionConstantsDictionary().allValues().iter() {
        let index = constant.index();
        let given = values.iter().any(|(i, _)| *i == index);
        match constant.r#type() {
            _ if given || !constant.required() => {}
            MTLDataType::Bool => values.push((index, Value::Bool(false))),
            MTLDataType::Int | MTLDataType::UInt => values.push((index, Value::Int(0))),
            // The compiler says that it is missing.
            _ => {}
        }
    }
    let out = MTLFunctionConstantValues::new();
    for (index, value) in values {
        match value {
            Value::Bool(value) => set(&out, &value, MTLDataType::Bool, index),
            Value::Int(value) => set(&out, &value, MTLDataType::Int, index),
        }
    }
    out
}

fn set<T>(values: &MTLFunctionConstantValues, value: &T, kind: MTLDataType, index: usize) {
    let value: NonNull<c_void> = NonNull::from(value).cast();
    // SAFETY: `value` points to a value of `kind`'s size, which is copied; Metal takes any index.
    unsafe { values.setConstantValue_type_atIndex(value, kind, index) }
}
