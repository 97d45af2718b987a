//! The contract as a matrix of cases that any device can run: every head dim, dtype, mask kind and
//! layout, with every feature spread over them. Operands are surrounded by poison (NaN, infinities)
//! wherever a kernel must not read, outputs are poisoned before and watched around, and results are
//! held against the f64 oracle.
//!
//! ```no_run
//! use mlx_flash_attn::verify::{self, Scope};
//! use mlx_flash_attn::{KernelRegistry, MlxDevice};
//!
//! # fn main() -> mlx_flash_attn::Result<()> {
//! let (device, mut registry) = (MlxDevice::new()?, KernelRegistry::new());
//! for case in verify::cases(Scope::Quick, &device) {
//!     let outcome = verify::run(&case, &device, &mut registry)?;
//!     assert!(outcome.ok(), "{}: {:?}", case.name(), outcome.failures);
//! }
//! # Ok(())
//! # }
//! ```

mod case;
mod cases;
mod data;
mod run;

pub use case::Case;
pub use cases::{Scope, cases};
pub use data::{Data, Random};
pub use run::{Outcome, run};
