//! Kernels by name, and the pipelines built from them.

use std::borrow::Cow;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::command::{Planned, Work};
use crate::backend::metal::plan::Plan;
use crate::backend::metal::{bindings, sources, table};
use crate::backend::{Constants, Kernel, Limits};
use crate::error::{MlxError, Result};
use crate::runtime::device::DeviceHandle;

/// A kernel built for one device with one set of constants.
#[derive(Debug, Clone)]
pub struct Pipeline(Arc<Kernel>);

impl Pipeline {
    /// The kernel's name.
    pub fn label(&self) -> &str {
        &self.0.name
    }

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
    crate::backend::metal::sources::metallib_name(source)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    kernel: Cow<'static, str>,
    constants: Constants,
}

/// A kernel's text.
#[derive(Debug, Clone, Copy)]
struct Source {
    text: &'static str,
    /// Who answers for what the text does with what is bound.
    from: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// This crate, under this name.
    Us,
    /// A caller who promised that it stays in bounds.
    Promised,
    /// A caller who did not: it is known, and never built.
    Unknown,
}

/// Every kernel by name, and the pipelines built so far.
///
/// Pipelines are built from this crate's own texts, and from those for which a caller has answered with
/// [`KernelRegistry::register_foreign_source`]: a kernel's text can do anything with the memory that a
/// dispatch binds, so that safe code runs none but ours.
///
/// A clone shares the pipelines, so each thread can hold its own and nothing is built twice.
#[derive(Debug, Clone)]
pub struct KernelRegistry {
    sources: HashMap<Cow<'static, str>, Source>,
    /// Pipelines this handle has given out.
    local: HashMap<Key, Pipeline>,
    /// Pipelines that any clone has built.
    shared: Arc<Mutex<HashMap<Key, Pipeline>>>,
    /// The last few attentions whose kernels are among the pipelines.
    noted: VecDeque<Arc<Planned>>,
}

/// Most problems that are remembered: the kinds of layer of a model.
const REMEMBERED: usize = 4;

impl Default for KernelRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl KernelRegistry {
    /// A registry that knows every kernel of this crate.
    pub fn new() -> Self {
        let sources = sources::all()
            .map(|(name, text)| {
                let from = Origin::Us;
                (Cow::Borrowed(name), Source { text, from })
            })
            .collect();
        Self {
            sources,
            local: HashMap::new(),
            shared: Arc::default(),
            noted: VecDeque::new(),
        }
    }

    /// Counts the kernel of a planned attention among the built ones, as a caller of the kernel's name
    /// expects.
    pub(crate) fn note(&mut self, device: &DeviceHandle, planned: &Arc<Planned>) -> Result<()> {
        let Work::Attention(problem, hint) = &planned.work else {
            return Ok(());
        };
        if self.noted.iter().any(|noted| Arc::ptr_eq(noted, planned)) {
            return Ok(());
        }
        let plan = Plan::new(problem, *hint)?;
        self.get(plan.variant.kernel, device, plan.constants)?;
        self.noted.truncate(REMEMBERED - 1);
        self.noted.push_front(Arc::clone(planned));
        Ok(())
    }

    /// Makes a kernel known by name, or replaces its text; pipelines of an earlier text are dropped. A
    /// text that is not this crate's own of that name is known from then on, but asking for its pipeline
    /// is an error: [`KernelRegistry::register_foreign_source`] takes those that are to run.
    pub fn register_source(&mut self, name: impl Into<String>, source: &'static str) {
        let name = name.into();
        let ours = sources::is_own(&name, source);
        self.register(
            name,
            source,
            if ours { Origin::Us } else { Origin::Unknown },
        );
    }

    /// As [`KernelRegistry::register_source`], for a text of the caller's own: Metal's language on Metal and
    /// the emulator. The CPU and CUDA run no other texts than this crate's.
    ///
    /// # Safety
    /// In every dispatch that is encoded with a pipeline of this text, whatever it binds and over
    /// whatever grid, the kernel reads and writes nothing but what is bound, and ends.
    ///
    /// ```compile_fail,E0133
    /// # fn f(registry: &mut mlx_flash_attn::KernelRegistry) {
    /// registry.register_foreign_source("mine", "kernel void mine() {}");
    /// # }
    /// ```
    pub unsafe fn register_foreign_source(
        &mut self,
        name: impl Into<String>,
        source: &'static str,
    ) {
        self.register(name.into(), source, Origin::Promised);
    }

    fn register(&mut self, name: String, text: &'static str, from: Origin) {
        let name = Cow::<'static, str>::Owned(name);
        let same = |known: &Source| known.text == text && known.from == from;
        if self.sources.get(&name).is_some_and(same) {
            return;
        }
        self.local.retain(|key, _| key.kernel != name);
        self.noted.clear();
        // Other clones keep what they built from the text they know.
        self.shared = Arc::new(Mutex::new(self.local.clone()));
        self.sources.insert(name, Source { text, from });
    }

    /// The pipeline of a kernel that takes no constants.
    ///
    /// # Errors
    /// `KernelNotFound` for a name that is not registered, `ShaderCompilationError` where its text does not compile or
    /// is not to run on the device.
    pub fn get_pipeline(&mut self, name: &str, device: &DeviceHandle) -> Result<&Pipeline> {
        self.get(name, device, Constants::default())
    }

    /// The pipeline of a kernel with bool constants; one that is left out is false.
    ///
    /// # Errors
    /// As for [`Self::get_pipeline`].
    pub fn get_pipeline_with_bool_constants(
        &mut self,
        name: &str,
        device: &DeviceHandle,
        bools: &[(usize, bool)],
    ) -> Result<&Pipeline> {
        self.get(name, device, Constants::new(bools, &[]))
    }

    /// The pipeline of a kernel with bool and int constants; one that is left out has its default.
    ///
    /// # Errors
    /// As for [`Self::get_pipeline`].
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
        if source.from == Origin::Unknown {
            return Err(MlxError::ShaderCompilationError {
                name: name.into(),
                message: "its text is not this crate's; a text of the caller's own is registered \
                          with `register_foreign_source`, which is unsafe"
                    .into(),
            });
        }
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
                let constants = &slot.key().constants;
                let backend = &*device.backend;
                let kernel = if backend.runs_text() || !bindings::is_own(name) {
                    backend.build(name, source.text, constants)?
                } else {
                    // The device runs the work that a dispatch of it states.
                    let threads = table::by_name(name).map_or(1024, |row| row.threads() as u64);
                    let limits = Limits {
                        thread_execution_width: 32,
                        max_threads: threads.max(32),
                        static_threadgroup_bytes: 0,
                    };
                    let state = backend.named_kernel();
                    Arc::new(Kernel::with_state(
                        name,
                        constants,
                        limits,
                        bindings::accesses(name),
                        state,
                    ))
                };
                let pipeline = Pipeline(kernel);
                shared.insert(slot.key().clone(), pipeline.clone());
                pipeline
            }
        };
        Ok(slot.insert(pipeline))
    }

    /// Whether a pipeline of this kernel has been built: with any constants for a name alone, with
    /// exactly these for a name with constants, as in `flash_attn_prefill_bf16_d64|300:b1|301:b0`
    /// (`b0`, `b1`: a bool; `i8`: an int). A bool that is false counts as left out, in any order.
    pub fn is_cached(&self, name: &str) -> bool {
        let (name, constants) = match name.split_once('|') {
            None => (name, None),
            Some((name, constants)) => match parse_constants(constants) {
                None => return false,
                constants => (name, constants),
            },
        };
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .any(|key| key.kernel == name && constants.as_ref().is_none_or(|c| *c == key.constants))
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
            .map(|(name, source)| (name.as_ref(), source.text))
    }

    /// How many kernels are known.
    pub fn source_count(&self) -> usize {
        self.sources.len()
    }
}

/// Constants in the form that [`KernelRegistry::is_cached`] takes.
fn parse_constants(text: &str) -> Option<Constants> {
    let (mut bools, mut ints) = (Vec::new(), Vec::new());
    for constant in text.split('|') {
        let (index, value) = constant.split_once(':')?;
        let index = index.parse().ok()?;
        match value {
            "b0" => bools.push((index, false)),
            "b1" => bools.push((index, true)),
            _ => ints.push((index, value.strip_prefix('i')?.parse().ok()?)),
        }
    }
    Some(Constants::new(&bools, &ints))
}
