//! Element types as the kernels tell them apart: closed lists, so that a `match` leaves none out.

use crate::DType;
use crate::error::{MlxError, Result};

/// Elements of Q and O, or of K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    Bf16,
    F16,
    F32,
}

impl Float {
    pub(super) fn of(dtype: DType) -> Result<Self> {
        match dtype {
            DType::BF16 => Ok(Self::Bf16),
            DType::F16 => Ok(Self::F16),
            DType::F32 => Ok(Self::F32),
            other => Err(MlxError::UnsupportedDtype(format!(
                "Q, K and V: expected f32, f16 or bf16, got {other}"
            ))),
        }
    }

    pub(super) const fn size_of(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Cells of a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cells {
    Add(Float),
    /// Nonzero attends.
    Bool,
}

impl Cells {
    pub(super) fn of(dtype: DType) -> Result<Self> {
        match dtype {
            DType::U8 => Ok(Self::Bool),
            other => Float::of(other).map(Self::Add).map_err(|_| {
                MlxError::UnsupportedDtype(format!(
                    "mask: expected f32, f16, bf16 or u8, got {other}"
                ))
            }),
        }
    }
}

/// Evaluates an expression with a name for the type of elements that a kernel takes. Words of two
/// elements hold bf16 and nothing else, which [`super::call::Call::new`] makes sure of.
macro_rules! with_elements {
    ($kernel:ty, $float:expr, $element:ident => $body:expr) => {
        if <$kernel>::PAIR == 2 {
            type $element = half::bf16;
            $body
        } else {
            with_float!($float, $element => $body)
        }
    };
}

/// Evaluates an expression with a name for a type of elements.
macro_rules! with_float {
    ($float:expr, $element:ident => $body:expr) => {
        match $float {
            Float::Bf16 => {
                type $element = half::bf16;
                $body
            }
            Float::F16 => {
                type $element = half::f16;
                $body
            }
            Float::F32 => {
                type $element = f32;
                $body
            }
        }
    };
}

/// Evaluates an expression with a name for a type of mask cells.
macro_rules! with_cells {
    ($cells:expr, $cell:ident => $body:expr) => {
        match $cells {
            Cells::Add(float) => with_float!(float, $cell => $body),
            Cells::Bool => {
                type $cell = u8;
                $body
            }
        }
    };
}
pub(super) use {with_cells, with_elements, with_float};
