//! The Metal device: Apple GPUs, through objc2-metal.
//!
//! Type-checked and linted for Apple systems, with the parts that need no GPU tested anywhere; it has
//! not run on Apple hardware.
// Without a GPU in the build only the tests of those parts use them.
#![cfg_attr(not(all(feature = "metal", target_vendor = "apple")), allow(dead_code))]

pub mod bindings;
#[cfg(any(test, all(feature = "metal", target_vendor = "apple")))]
mod constants;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod device;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod encode;
pub(crate) mod launch;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod library;
mod limits;
mod lowering;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod memory;
pub(crate) mod params;
pub(crate) mod plan;
pub(crate) mod sources;
pub(crate) mod split;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod submit;
pub mod table;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod target;

#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub use target::{ComputeTarget, DirectTarget};
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub(crate) use {
    device::Metal,
    encode::{Temporary, encode_into},
    memory::MetalMemory,
};
