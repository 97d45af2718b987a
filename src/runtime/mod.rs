//! What a GPU program holds: a device, buffers, an encoder, the same on every device. The [`registry`] of
//! kernels is part of the API of `mlx-native`.

pub mod buffer;
pub mod capture;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod encoder;
pub mod mem_ranges;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub mod metal;

pub use crate::compat::registry;

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
