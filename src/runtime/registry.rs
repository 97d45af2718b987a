//! Kernels by name, and the pipelines built from them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::DeviceHandle;
use crate::attention::bindings::Constants;
use crate::backend::Kernel;
use crate::error::{MlxError, Result};
use crate::sources;

/// A kernel built for one device with one set of constants.
#[derive(Debug, Clone)]
pub struct Pipeline(Arc<Kernel>);

impl Pipeline {
    /// Threads that run in lock step.
    pub fn thread_execution_width(&self) -> u64 {
        self.0.limits.thread_execution_width
    }

    /// Most threads of a threadgroup.
    pub fn max_total_threads_per_threadgroup(&self) -> u64 {
        self.0.limits.max_threads
    }

    /// Threadgroup memory the kernel declares, in bytes.
    pub fn static_threadgroup_memory_length(&self) -> u64 {
        self.0.limits.static_threadgroup_bytes
    }

    pub(crate) fn kernel(&self) -> &Arc<Kernel> {
        &self.0
    }
}

/// File name under which a text's precompiled library is looked for in `MLX_FLASH_METALLIB_DIR`.
pub fn metallib_name(source: &str) -> String {
    crate::sources::metallib_name(source)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    kernel: Cow<'static, str>,
    constants: Constants,
}

/// Every kernel by name, and the pipelines built so far.
///
/// A clone shares the pipelines, so each thread can hold its own and nothing is built twice.
#[derive(Debug, Clone)]
pub struct KernelRegistry {
    sources: HashMap<Cow<'static, str>, &'static str>,
    /// Pipelines this handle has given out.
    local: HashMap<Key, Pipeline>,
    /// Pipelines that any clone has built.
    shared: Arc<Mutex<HashMap<Key, Pipeline>>>,
}

impl Default for KernelRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl KernelRegistry {
    /// A registry that knows every kernel of this crate.
    pub fn new() -> Self {
        let sources = sources::all()
            .map(|(name, text)| (Cow::Borrowed(name), text))
            .collect();
        Self {
            sources,
            local: HashMap::new(),
            shared: Arc::default(),
        }
    }

    /// Adds a kernel, or replaces its text; pipelines of an earlier text are dropped.
    pub fn register_source(&mut self, name: impl Into<String>, source: &'static str) {
        let name = Cow::<'static, str>::Owned(name.into());
        if self.sources.get(&name).is_some_and(|text| *text == source) {
            return;
        }
        self.local.retain(|key, _| key.kernel != name);
        // Other clones keep what they built from the text they know.
        self.shared = Arc::new(Mutex::new(self.local.clone()));
        self.sources.insert(name, source);
    }

    /// The pipeline of a kernel that takes no constants.
    pub fn get_pipeline(&mut self, name: &str, device: &DeviceHandle) -> Result<&Pipeline> {
        self.get(name, device, Constants::default())
    }

    /// The pipeline of a kernel with bool constants; one that is left out is false.
    pub fn get_pipeline_with_bool_constants(
        &mut self,
        name: &str,
        device: &DeviceHandle,
        bools: &[(usize, bool)],
    ) -> Result<&Pipeline> {
        self.get(name, device, Constants::new(bools, &[]))
    }

    /// The pipeline of a kernel with bool and int constants; one that is left out has its default.
    pub fn get_pipeline_with_constants(
        &mut self,
        name: &str,
        device: &DeviceHandle,
        bools: &[(usize, bool)],
        ints: &[(usize, i32)],
    ) -> Result<&Pipeline> {
        self.get(name, device, Constants::new(bools, ints))
    }

    pub(crate) fn get(
        &mut self,
        name: &str,
        device: &DeviceHandle,
        constants: Constants,
    ) -> Result<&Pipeline> {
        let Some((known, source)) = self.sources.get_key_value(name) else {
            return Err(MlxError::KernelNotFound(name.into()));
        };
        let key = Key {
            device: device.id,
            kernel: known.clone(),
            constants,
        };
        let slot = match self.local.entry(key) {
            Entry::Occupied(given) => return Ok(given.into_mut()),
            Entry::Vacant(slot) => slot,
        };
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let pipeline = match shared.get(slot.key()) {
            Some(built) => built.clone(),
            None => {
                let kernel = device.backend.build(name, source, &slot.key().constants)?;
                let pipeline = Pipeline(Arc::new(kernel));
                shared.insert(slot.key().clone(), pipeline.clone());
                pipeline
            }
        };
        Ok(slot.insert(pipeline))
    }

    /// Whether some pipeline of this kernel has been built.
    pub fn is_cached(&self, name: &str) -> bool {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .any(|key| key.kernel == name)
    }

    /// How many pipelines have been built.
    pub fn cached_count(&self) -> usize {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Every kernel's name with its text, in no particular order.
    pub fn sources(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.sources
            .iter()
            .map(|(name, text)| (name.as_ref(), *text))
    }

    /// How many kernels are known.
    pub fn source_count(&self) -> usize {
        self.sources.len()
    }
}
