//! Attention itself: what is asked ([`Problem`]) and which keys a query sees ([`mask`]). Nothing here knows
//! a device or holds memory; everything is pure and runs anywhere.

mod builder;
pub mod layout;
pub mod mask;
mod operand;
pub mod oracle;
pub mod problem;
mod shape;
pub mod tolerance;
mod varlen;

pub use builder::ProblemBuilder;
pub use layout::{Layout, Strides};
pub use mask::{MaskSpec, Tile, TileClass, Visibility, class_tile};
pub use operand::{OperandSpec, Role};
pub use problem::{Problem, QueryOffset, Sequence};
pub use shape::{HEAD_DIMS, Shape};
