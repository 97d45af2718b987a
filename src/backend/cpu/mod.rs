//! The CPU device.

mod isa;
mod job;
mod kernels;
