//! The Metal kernels, run on this machine's processors from the text that a Mac compiles: the same
//! plan, names, constants, params, bindings and grid.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use msl_emulator::{Binding, CompileOptions, Constant, Counters, DispatchOptions, Library};

use super::command::Work;
use super::host_memory::HostMemory;
use super::metal::launch::{self, Kernels, Launch, Prepared};
use super::metal::split;
use super::{
    Arg, Backend, DeviceKind, Dispatch, Done, Kernel, Limits, Memory, Pending, Step, Timing,
};
use crate::attention::Problem;
use crate::backend::metal::bindings::{Constants, accesses, constant};
use crate::backend::metal::sources;
use crate::backend::metal::table::{self, APPLE_THREADGROUP_BYTES};
use crate::error::{MlxError, Result, Unsupported};

/// How to open the emulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EmulatorOptions {
    /// Watches every access: bounds, races, barriers, uninitialised threadgroup memory. Much slower.
    pub check: bool,
    /// Runs lanes and threadgroups in an order drawn from this seed.
    pub shuffle_seed: Option<u64>,
    /// Threads; one a core when 0.
    pub threads: usize,
}

/// The emulated GPU.
pub(crate) struct Emulator {
    options: EmulatorOptions,
    /// By the contents of the source text, then by kernel: a library holds few kernels, as the whole
    /// text takes long to compile.
    libraries: Mutex<HashMap<String, HashMap<String, Arc<Library>>>>,
    kernels: Kernels,
    counters: Mutex<Counters>,
    /// Operations of one part of a dispatch, which the Metal device runs as a command of its own.
    part_flops: f64,
}

/// What a built kernel holds.
struct Built {
    library: Arc<Library>,
    constants: Vec<(u32, Constant)>,
}

impl Emulator {
    pub(crate) fn open(options: EmulatorOptions) -> Result<Self> {
        msl_emulator::find_compiler().map_err(|e| MlxError::DeviceUnavailable {
            device: DeviceKind::Emulator.name().into(),
            reason: e.to_string(),
        })?;
        Ok(Self {
            options,
            libraries: Mutex::default(),
            kernels: Kernels::default(),
            counters: Mutex::default(),
            part_flops: split::COMMAND_FLOPS,
        })
    }

    pub(crate) fn take_counters(&self) -> Counters {
        std::mem::take(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn library(&self, kernel: &str, source: &str) -> Result<Arc<Library>> {
        let libraries = || {
            self.libraries
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let found = libraries()
            .get(source)
            .and_then(|of_text| of_text.get(kernel).cloned());
        if let Some(library) = found {
            return Ok(library);
        }
        // The lock is not held meanwhile: other kernels compile at the same time.
        let names = compiled_together(kernel, source);
        let mut options = CompileOptions::named(format!("{}.metal", names[0]));
        options.kernels = names.iter().map(|name| (*name).to_owned()).collect();
        let library = Library::compile(source, &options).map_err(|e| failed(kernel, &e))?;
        let library = Arc::new(library);
        let mut libraries = libraries();
        let of_text = libraries.entry(source.to_owned()).or_default();
        for name in names {
            of_text.insert(name.to_owned(), Arc::clone(&library));
        }
        Ok(library)
    }

    fn compile(&self, kernel: &str, source: &str, constants: &Constants) -> Result<Kernel> {
        let library = self.library(kernel, source)?;
        let info = library.kernel(kernel).map_err(|e| failed(kernel, &e))?;
        let row = table::by_name(kernel);
        let values = library
            .constants()
            .iter()
            .map(|info| {
                let index = info.index as usize;
                let value = if info.type_name == "bool" {
                    Constant::Bool(constants.bool(index))
                } else {
                    let default = row.filter(|_| index == constant::NSG);
                    let default = default.map_or(0, |v| v.simdgroups as i32);
                    Constant::Int(constants.int(index).unwrap_or(default))
                };
                (info.index, value)
            })
            .collect();
        let limits = Limits {
            thread_execution_width: 32,
            max_threads: info.max_threads.map_or(1024, u64::from),
            static_threadgroup_bytes: u64::from(info.threadgroup_bytes),
        };
        let built = Built {
            library: Arc::clone(&library),
            constants: values,
        };
        Ok(Kernel::new(
            kernel,
            constants,
            limits,
            accesses(kernel),
            built,
        ))
    }

    fn run(&self, dispatch: &Dispatch) -> Result<()> {
        let name = &dispatch.kernel.name;
        let fail = |message: String| MlxError::CommandBufferError(format!("{name}: {message}"));
        let Some(built) = dispatch.kernel.state.downcast_ref::<Built>() else {
            return Err(fail("was built for another device".into()));
        };
        for (part, _) in split::parts(dispatch, self.part_flops) {
            self.run_part(&part, built)?;
        }
        Ok(())
    }

    /// Runs a dispatch that was checked, or a part of one.
    fn run_part(&self, dispatch: &Dispatch, built: &Built) -> Result<()> {
        let name = &dispatch.kernel.name;
        let fail = |message: String| MlxError::CommandBufferError(format!("{name}: {message}"));
        let size = |sizes: [u64; 3], what: &str| -> Result<[u32; 3]> {
            let mut out = [0; 3];
            for (out, size) in out.iter_mut().zip(sizes) {
                *out = u32::try_from(size)
                    .map_err(|_| fail(format!("{what} of {size} is too large")))?;
            }
            Ok(out)
        };
        let mut call = msl_emulator::Dispatch::new(name.as_str())
            .threadgroups(size(dispatch.grid, "a grid")?)
            .threads(size(dispatch.threadgroup, "a threadgroup")?);
        for (index, value) in &built.constants {
            call = call.constant(*index, *value);
        }
        for (index, arg) in &dispatch.args {
            let slot =
                u32::try_from(*index).map_err(|_| fail(format!("no buffer index {index}")))?;
            call = match arg {
                Arg::Memory {
                    memory,
                    offset,
                    len,
                } => {
                    let use_ = dispatch.kernel.accesses.of(*index);
                    // SAFETY: the encoder keeps `offset + len` inside the memory.
                    let ptr = unsafe { memory.host(use_)?.add(*offset) };
                    call.bind(slot, Binding::raw(ptr, *len, use_.writes()))
                }
                Arg::Bytes(bytes) => call.bind(slot, Binding::read_only(bytes)),
            };
        }
        let mut options = DispatchOptions::default().threads(self.options.threads);
        // A text that a caller registered may do anything.
        options.check = self.options.check || dispatch.kernel.foreign;
        options.shuffle_seed = self.options.shuffle_seed;
        // SAFETY: bindings lie inside live memory that nobody else uses while commands run. This
        // crate's own text stays inside them, as params, constants and grid follow from a checked problem;
        // any other text runs with every access watched.
        let counters = unsafe { built.library.dispatch(&mut call, &options) };
        let counters = counters.map_err(|e| fail(e.to_string()))?;
        add(
            &mut self.counters.lock().unwrap_or_else(PoisonError::into_inner),
            &counters,
        );
        Ok(())
    }
}

/// The kernels that are compiled when `kernel` is asked for: of this crate's prefill text those of its
/// dtype and head dim, of any other text the kernel itself.
fn compiled_together<'a>(kernel: &'a str, source: &str) -> Vec<&'a str> {
    match table::by_name(kernel) {
        Some(row) if source == sources::PREFILL_TEXT => table::PREFILL
            .iter()
            .filter(|v| (v.dtype, v.head_dim) == (row.dtype, row.head_dim))
            .map(|v| v.kernel)
            .collect(),
        _ => vec![kernel],
    }
}

fn add(total: &mut Counters, one: &Counters) {
    total.matrix_multiplies += one.matrix_multiplies;
    total.threadgroup_barriers += one.threadgroup_barriers;
    total.simdgroup_barriers += one.simdgroup_barriers;
    total.device_bytes_read += one.device_bytes_read;
    total.device_bytes_written += one.device_bytes_written;
    total.threadgroup_bytes_read += one.threadgroup_bytes_read;
    total.threadgroup_bytes_written += one.threadgroup_bytes_written;
    total.exp2_calls += one.exp2_calls;
}

fn failed(kernel: &str, error: &msl_emulator::Error) -> MlxError {
    MlxError::ShaderCompilationError {
        name: kernel.into(),
        message: error.to_string(),
    }
}

impl Backend for Emulator {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Emulator
    }

    fn name(&self) -> String {
        "Metal emulator".into()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        vec![
            ("checked", self.options.check.to_string()),
            (
                "threadgroup memory",
                format!("{APPLE_THREADGROUP_BYTES} bytes"),
            ),
        ]
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(HostMemory::zeroed(bytes)?))
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        launch::supports(self.kind(), problem)
    }

    fn prepare(&self, work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        let launch = Launch::of(work)?;
        let kernel = self.build(launch.kernel, launch.source, &launch.constants)?;
        Ok(Box::new(Prepared { launch, kernel }))
    }

    fn build(&self, kernel: &str, source: &str, constants: &Constants) -> Result<Arc<Kernel>> {
        let build = || self.compile(kernel, source, constants);
        if sources::is_own(kernel, source) {
            self.kernels.get(kernel, constants, build)
        } else {
            build().map(|kernel| Arc::new(kernel.into_foreign()))
        }
    }

    fn runs_text(&self) -> bool {
        true
    }

    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending> {
        let begun = Instant::now();
        let result = steps.iter().try_for_each(|step| match step {
            Step::Barrier => Ok(()),
            Step::Foreign(dispatch) => self.run(dispatch),
            Step::Task(task) => self.run(&launch::dispatch(task)?),
        });
        let timing = Timing {
            start: 0.0,
            end: begun.elapsed().as_secs_f64(),
        };
        Arc::new(Done(result.map(|()| timing)))
    }
}

#[cfg(test)]
mod parts;
#[cfg(test)]
mod tests;
