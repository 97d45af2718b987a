//! The kernels against the oracle, for every instruction set that this machine has.

mod bits;
mod classes;
mod features;
mod harness;
mod hidden;
mod interpreted;
mod memory;
mod runs;
mod shapes;
mod speed;
pub(super) mod tiles;
mod vectors;
