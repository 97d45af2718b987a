//! The CUDA device: NVIDIA GPUs of compute capability 8.0 and later, through the driver alone. The
//! kernels' text is compiled at first use by NVRTC, which is looked for where pip and the CUDA toolkit
//! put it, and the images are kept on disk; or they were compiled ahead and need no compiler.

pub(crate) mod abi;
mod cache;
mod compile;
mod device;
mod driver;
mod fit;
mod gpu;
mod images;
mod launch;
mod maps;
mod memory;
mod modules;
mod nvrtc;
mod options;
mod order;
mod params;
mod prepared;
mod scratch;
mod search;
mod sources;
mod spec;
mod submit;
mod table;

pub(crate) use compile::{compile, fingerprint, in_parallel, key, text_id};
pub(crate) use device::Cuda;
pub(crate) use images::{Images, Key, trust};
pub(crate) use memory::CudaMemory;
pub(crate) use nvrtc::Nvrtc;
pub use options::{CudaKernels, CudaOptions};
pub(crate) use spec::Spec;
pub(crate) use submit::Enqueued;
pub(crate) use table::{Capability, every_spec};
