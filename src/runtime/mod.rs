//! What a GPU program holds: a device, buffers, an encoder, a registry of kernels. The same on every
//! device.

pub mod buffer;
pub mod capture;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod encoder;
pub mod mem_ranges;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub mod metal;
pub mod prepared;
pub mod registry;
pub mod submission;

mod copies;
mod guards;
mod hazards;
mod host;
mod size;
mod snapshot;
mod submit;
mod turns;
mod uses;

#[cfg(test)]
mod another_gpu;
#[cfg(test)]
mod tests;
