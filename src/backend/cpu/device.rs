//! The CPU device: each kind of work as a native function.

use std::any::Any;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use super::isa::Isa;
use super::job::Job;
use super::processors::Cpu;
use super::{decode, kernels, masks};
use crate::attention::Problem;
use crate::backend::abilities::Abilities;
use crate::backend::command::{Span, Task, Work};
use crate::backend::host_memory::HostMemory;
use crate::backend::{Backend, DeviceKind, Done, Memory, Pending, Step, Timing, runs_no_text};
use crate::dtype::DType;
use crate::error::{Result, Unsupported};

impl Cpu {
    /// Runs steps one after another, each on all threads, so that barriers hold by themselves.
    fn run(&self, steps: &[Step]) -> Result<()> {
        steps.iter().try_for_each(|step| match step {
            Step::Barrier => Ok(()),
            Step::Task(task) => self.task(task),
            Step::Foreign(dispatch) => Err(runs_no_text(DeviceKind::Cpu, &dispatch.kernel.name)),
        })
    }

    fn task(&self, task: &Task<Span>) -> Result<()> {
        match task.work() {
            Work::Attention(problem, _) => {
                let at = task.pointers()?;
                kernels::run(&Job { problem, at }, self.isa, self.team())
            }
            Work::FillMask(fill) => masks::fill(self, fill, task),
            Work::FillBlocks(fill) => masks::fill_blocks(self, fill, task),
            Work::ClassifyTiles(classify) => masks::classify(self, classify, task),
            Work::DecodePartials(decode) => decode::partials(self, decode, task),
            Work::JoinPartials(join) => decode::join(join, task),
        }
    }
}

impl Backend for Cpu {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cpu
    }

    fn name(&self) -> String {
        format!("CPU ({}, {} threads)", self.isa, self.team().threads)
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let available = Isa::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .map(Isa::name);
        vec![
            ("instruction set", self.isa.to_string()),
            ("available", available.collect::<Vec<_>>().join(", ")),
            ("threads", self.team().threads.to_string()),
        ]
    }

    fn measured_peak(&self, dtype: DType) -> Option<f64> {
        self.install(|| kernels::peak(self.isa, dtype))
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(HostMemory::zeroed(bytes)?))
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        let abilities = Abilities {
            kv_dtype: true,
            block_format: |_| true,
            formats_differ: true,
            pages: true,
            queries_packed_alone: true,
            host_lengths: true,
            device_lengths: true,
            ..Abilities::ALIKE
        };
        abilities.check(self.kind(), problem)
    }

    fn prepare(&self, _work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }

    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending> {
        static CLOCK: LazyLock<Instant> = LazyLock::new(Instant::now);
        let clock = *CLOCK;
        let start = clock.elapsed().as_secs_f64();
        let result = self.run(&steps);
        let end = clock.elapsed().as_secs_f64();
        Arc::new(Done(result.map(|()| Timing { start, end })))
    }
}
