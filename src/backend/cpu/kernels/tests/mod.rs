//! The kernels against the oracle, for every instruction set that this machine has.

mod bits;
mod features;
mod harness;
mod interpreted;
mod shapes;
mod speed;
pub(super) mod tiles;
mod vectors;
