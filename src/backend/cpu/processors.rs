//! The processors that the CPU device runs on: their instruction set and their threads.

use super::isa::Isa;
use super::kernels;
use crate::error::{MlxError, Result};

/// How to open the CPU device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuOptions {
    /// Instruction set; the machine's best when not given.
    pub isa: Option<Isa>,
    /// Threads of a pool of its own; rayon's global pool when not given.
    pub threads: Option<usize>,
}

impl CpuOptions {
    /// Options from `MLX_FLASH_CPU_ISA` and `MLX_FLASH_THREADS`.
    ///
    /// # Errors
    /// `InvalidArgument` where a variable names no instruction set, or no number of threads.
    pub fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let isa = var("MLX_FLASH_CPU_ISA").map(|name| {
            Isa::by_name(&name).ok_or_else(|| {
                MlxError::expected(
                    "MLX_FLASH_CPU_ISA",
                    format!("one of {}", Isa::ALL.map(Isa::name).join(", ")),
                    name,
                )
            })
        });
        let threads = var("MLX_FLASH_THREADS").map(|n| {
            n.parse()
                .ok()
                .filter(|n| *n >= 1)
                .ok_or_else(|| MlxError::expected("MLX_FLASH_THREADS", "a count of at least 1", n))
        });
        Ok(Self {
            isa: isa.transpose()?,
            threads: threads.transpose()?,
        })
    }
}

/// The processors of this machine.
pub(crate) struct Cpu {
    pub(super) isa: Isa,
    pool: Option<rayon::ThreadPool>,
}

impl Cpu {
    pub(crate) fn open(options: CpuOptions) -> Result<Self> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        if !isa.is_available() {
            return Err(MlxError::DeviceUnavailable {
                device: format!("cpu ({isa})"),
                reason: format!("this machine's best instruction set is {}", Isa::best()),
            });
        }
        let pool = match options.threads {
            None => None,
            Some(0) => return Err(MlxError::expected("threads", "at least 1", 0)),
            Some(n) => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n)
                    .build()
                    .map_err(|e| MlxError::DeviceUnavailable {
                        device: format!("cpu with {n} threads"),
                        reason: e.to_string(),
                    })?,
            ),
        };
        Ok(Self { isa, pool })
    }

    pub(super) fn team(&self) -> kernels::Team<'_> {
        kernels::Team {
            pool: self.pool.as_ref(),
            threads: self
                .pool
                .as_ref()
                .map_or_else(rayon::current_num_threads, |p| p.current_num_threads()),
        }
    }

    /// Runs `work` inside the pool.
    pub(super) fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}
