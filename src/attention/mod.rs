//! Attention itself: what is asked ([`Problem`]), which keys a query sees ([`mask`]), which kernel
//! serves it ([`variant`]), and how it is dispatched ([`plan`]). Nothing here knows a device or
//! holds memory; everything is pure and runs anywhere.

pub mod bindings;
mod builder;
pub mod layout;
pub mod mask;
mod operand;
pub mod oracle;
pub mod params;
pub mod plan;
pub mod problem;
pub mod tolerance;
pub mod variant;
mod varlen;

pub use builder::ProblemBuilder;
pub use layout::{Layout, Strides};
pub use mask::{MaskSpec, TileClass, Visibility};
pub use operand::{OperandSpec, Role};
pub use problem::{Problem, QueryOffset, Sequence, Shape};
