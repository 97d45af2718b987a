//! Dispatches in the seed's own terms: kernels by name, params as bytes or in buffers, grids. They are read
//! back into work once, when they are recorded, for every device alike.

mod args;
mod encoder;
mod params;
mod raw;

pub(crate) use raw::decode_problem;
