//! Attention itself: what is asked ([`Problem`]) and which keys a query sees ([`visibility`]). Nothing here knows
//! a device or holds memory; everything is pure and runs anywhere.

#![forbid(unsafe_code)]

mod builder;
mod element;
mod keys;
pub mod layout;
mod lengths;
pub mod mask;
mod operand;
pub mod oracle;
mod placement;
pub mod problem;
mod score;
mod shape;
pub mod tolerance;
mod varlen;
pub mod visibility;

pub use builder::ProblemBuilder;
pub use element::Format;
pub use keys::{KeyLengths, KeyRow, Keys, PackedRows, Pages};
pub use layout::{Layout, Strides};
pub use mask::{MaskSpec, Tile, TileClass, class_tile};
pub use operand::{OperandSpec, Role};
pub use problem::{Problem, QueryOffset, Sequence};
pub use score::ScoreStep;
pub use shape::{HEAD_DIMS, Shape};
pub use visibility::Visibility;
