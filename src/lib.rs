//! Exact tiled flash attention.
pub mod attention;
mod backend;
mod dtype;
pub mod error;

pub use dtype::DType;
pub use error::{MlxError, Result};
