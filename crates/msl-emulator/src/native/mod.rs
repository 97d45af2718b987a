//! Compiling, loading and running, on systems that can.

mod abi;
mod cache;
mod compiler;
mod constants;
mod library;
mod module;
mod region;
mod registers;
mod report;
mod run;
mod shim;
mod stage;
mod validate;

pub use compiler::find_compiler;
pub use library::Library;
pub use registers::kept_in_memory;
