//! Memory and pipelines of another device of the same kind, as a machine with two GPUs has them.

use std::any::Any;
use std::sync::Arc;

use super::device::MlxDevice;
use super::encoder::{KernelArg, MTLSize};
use super::registry::KernelRegistry;
use crate::attention::Problem;
use crate::backend::access::Access;
use crate::backend::command::Work;
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::backend::host_memory::HostMemory;
use crate::backend::metal::bindings::names;
use crate::backend::{Backend, DeviceKind, Kernel, Memory, Pending, Step};
use crate::error::{Result, Unsupported};
use crate::{DType, MlxError};

/// A device that runs on the CPU and knows its own memory and kernels, as GPUs do.
struct Numbered(Cpu, u64);

#[derive(Debug)]
struct OfNumber(HostMemory, u64);

impl Memory for OfNumber {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn host(&self, access: Access) -> Result<*mut u8> {
        self.0.host(access)
    }
}

impl Backend for Numbered {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda
    }

    fn name(&self) -> String {
        self.0.name()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(OfNumber(HostMemory::zeroed(bytes)?, self.1)))
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        self.0.supports(problem)
    }

    fn prepare(&self, work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        self.0.prepare(work)
    }

    fn named_kernel(&self) -> Box<dyn Any + Send + Sync> {
        Box::new(self.1)
    }

    fn owns_memory(&self, memory: &dyn Memory) -> bool {
        let memory: &dyn std::any::Any = memory;
        let ours = memory.downcast_ref::<OfNumber>();
        ours.is_some_and(|memory| memory.1 == self.1)
    }

    fn owns_kernel(&self, kernel: &Kernel) -> bool {
        kernel.state.downcast_ref::<u64>() == Some(&self.1)
    }

    fn submit(&self, _steps: Vec<Step>) -> Arc<dyn Pending> {
        unreachable!("nothing that was refused is run")
    }
}

fn numbered(number: u64) -> MlxDevice {
    let cpu = Cpu::open(CpuOptions::default()).unwrap();
    MlxDevice::from_backend(Arc::new(Numbered(cpu, number)))
}

#[test]
fn memory_and_pipelines_of_another_gpu_of_the_same_kind_are_refused() {
    let (ours, theirs) = (numbered(0), numbered(1));
    let one = MTLSize::new(1, 1, 1);
    let refused = |pipeline_of: &MlxDevice, memory_of: &MlxDevice, what: &str| {
        let mut registry = KernelRegistry::new();
        let handle = pipeline_of.metal_device();
        let pipeline = registry.get_pipeline(names::MASK_FILL, handle).unwrap();
        let mask = memory_of.alloc_buffer(4, DType::BF16, vec![2]).unwrap();
        let mut encoder = ours.command_encoder().unwrap();
        let args = [(0, KernelArg::Buffer(&mask))];
        encoder.encode_threadgroups_with_args(pipeline, &args, one, one);
        let error = encoder.commit_and_wait().unwrap_err();
        assert!(matches!(error, MlxError::InvalidArgument(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    };
    refused(&ours, &theirs, "memory of another cuda device");
    refused(&theirs, &ours, "a pipeline of this device");
}
