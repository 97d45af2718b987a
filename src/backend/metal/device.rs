//! The device: opened, described, asked for memory, kernels and work.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_foundation::ns_string;
use objc2_metal::{MTLCommandQueue, MTLCreateSystemDefaultDevice, MTLDevice, MTLGPUFamily};

use super::bindings::Constants;
use super::encode;
use super::launch::{self, Kernels, Launch, Prepared};
use super::library::Libraries;
use super::limits::Caps;
use super::memory::MetalMemory;
use super::sources;
use super::submit;
use crate::attention::Problem;
use crate::backend::command::Work;
use crate::backend::{Backend, DeviceKind, Kernel, Memory, Pending, Step};
use crate::error::{MlxError, Result, Unsupported};

// Without it a program that draws nothing is given no default device.
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

/// One Apple GPU with the queue that its commands go through.
pub(crate) struct Metal {
    device: Retained<ProtocolObject<dyn MTLDevice>>,
    queue: Retained<ProtocolObject<dyn MTLCommandQueue>>,
    libraries: Libraries,
    kernels: Kernels,
}

fn unavailable(reason: impl Into<String>) -> MlxError {
    MlxError::DeviceUnavailable {
        device: DeviceKind::Metal.name().into(),
        reason: reason.into(),
    }
}

impl Metal {
    /// The system's default GPU.
    pub(crate) fn open() -> Result<Self> {
        let device = MTLCreateSystemDefaultDevice()
            .ok_or_else(|| unavailable("the system offers no Metal device"))?;
        Self::new(device)
    }

    /// A GPU that the caller has found.
    pub(crate) fn new(device: Retained<ProtocolObject<dyn MTLDevice>>) -> Result<Self> {
        autoreleasepool(|_| {
            if let Some(reason) = caps(&device).missing() {
                return Err(unavailable(format!("{}: {reason}", device.name())));
            }
            let queue =
                queue_of(&device).ok_or_else(|| unavailable("the GPU gave no command queue"))?;
            Ok(Self {
                device,
                queue,
                libraries: Libraries::default(),
                kernels: Kernels::default(),
            })
        })
    }

    pub(crate) fn device(&self) -> &ProtocolObject<dyn MTLDevice> {
        &self.device
    }

    pub(super) fn queue(&self) -> &ProtocolObject<dyn MTLCommandQueue> {
        &self.queue
    }
}

/// The queue of a GPU, made once: devices that were opened apart share their GPU's memory, and commands
/// are ordered by what they touch within one queue alone.
fn queue_of(
    device: &ProtocolObject<dyn MTLDevice>,
) -> Option<Retained<ProtocolObject<dyn MTLCommandQueue>>> {
    type Queues = Mutex<Vec<Retained<ProtocolObject<dyn MTLCommandQueue>>>>;
    static QUEUES: Queues = Mutex::new(Vec::new());
    let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = queues.iter().find(|queue| *queue.device() == *device) {
        return Some(queue.clone());
    }
    let queue = device.newCommandQueue()?;
    queue.setLabel(Some(ns_string!("mlx-flash-attn")));
    queues.push(queue.clone());
    Some(queue)
}

fn caps(device: &ProtocolObject<dyn MTLDevice>) -> Caps {
    Caps {
        apple7: device.supportsFamily(MTLGPUFamily::Apple7),
        language_3_1: objc2::available!(macos = 14.0, ios = 17.0, tvos = 17.0, visionos = 1.0, ..),
        unified_memory: device.hasUnifiedMemory(),
        threadgroup_bytes: device.maxThreadgroupMemoryLength() as u64,
    }
}

/// The newest family of Apple GPUs, of those known here, that the device belongs to.
fn family(device: &ProtocolObject<dyn MTLDevice>) -> &'static str {
    let known = [
        (MTLGPUFamily::Apple10, "Apple10 or later"),
        (MTLGPUFamily::Apple9, "Apple9"),
        (MTLGPUFamily::Apple8, "Apple8"),
    ];
    known
        .into_iter()
        .find(|(family, _)| device.supportsFamily(*family))
        .map_or("Apple7", |(_, name)| name)
}

impl Backend for Metal {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Metal
    }

    fn name(&self) -> String {
        autoreleasepool(|_| self.device.name().to_string())
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let d = &self.device;
        vec![
            ("family", family(d).into()),
            (
                "threadgroup memory",
                format!("{} bytes", d.maxThreadgroupMemoryLength()),
            ),
            ("largest buffer", format!("{} bytes", d.maxBufferLength())),
            (
                "recommended working set",
                format!("{} bytes", d.recommendedMaxWorkingSetSize()),
            ),
            ("language", "Metal 3.1, safe math".into()),
        ]
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(MetalMemory::allocate(&self.device, bytes)?))
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
        let build = || {
            autoreleasepool(|_| {
                self.libraries
                    .build(&self.device, kernel, source, constants)
            })
        };
        if sources::is_own(kernel, source) {
            self.kernels.get(kernel, constants, build)
        } else {
            build().map(|kernel| Arc::new(kernel.into_foreign()))
        }
    }

    fn runs_text(&self) -> bool {
        true
    }

    fn owns_memory(&self, memory: &dyn Memory) -> bool {
        autoreleasepool(|_| encode::buffer(&self.device, memory).is_some())
    }

    fn owns_kernel(&self, kernel: &Kernel) -> bool {
        autoreleasepool(|_| encode::pipeline(&self.device, kernel).is_some())
    }

    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending> {
        submit::submit(self, &steps)
    }
}
