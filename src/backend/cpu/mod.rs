//! Attention on this machine's processors.

mod decode;
mod device;
mod isa;
mod job;
mod kernels;
mod masks;
mod processors;

pub use isa::Isa;
pub(crate) use processors::Cpu;
pub use processors::CpuOptions;
