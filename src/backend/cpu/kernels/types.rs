//! Element types as the kernels tell them apart: closed lists, so that a `match` leaves none out.

use super::blocks::{BLOCK, Q4_0, Q8_0};
use crate::DType;
use crate::attention::Format;
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

/// How K, or V, is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Plain(Float),
    Q8_0,
    Q4_0,
}

impl Stored {
    pub(super) fn of(format: Format) -> Result<Self> {
        match format {
            Format::Plain(dtype) => Float::of(dtype).map(Self::Plain),
            Format::Q8_0 => Ok(Self::Q8_0),
            Format::Q4_0 => Ok(Self::Q4_0),
        }
    }

    /// Bytes of so many elements, which are whole blocks. Offsets wrap, as strides may.
    pub(super) const fn bytes(self, elements: usize) -> usize {
        match self {
            Self::Plain(float) => elements.wrapping_mul(float.size_of()),
            Self::Q8_0 => (elements / BLOCK).wrapping_mul(size_of::<Q8_0>()),
            Self::Q4_0 => (elements / BLOCK).wrapping_mul(size_of::<Q4_0>()),
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

/// Evaluates an expression with a name for what rows of K, or of V, consist of under a kernel, as `with_elements` does.
macro_rules! with_rows {
    ($kernel:ty, $stored:expr, $row:ident => $body:expr) => {
        if <$kernel>::PAIR == 2 {
            type $row = half::bf16;
            $body
        } else {
            with_stored!($stored, $row => $body)
        }
    };
}

/// Evaluates an expression with a name for what rows that are so stored consist of.
macro_rules! with_stored {
    ($stored:expr, $row:ident => $body:expr) => {
        match $stored {
            Stored::Plain(float) => with_float!(float, $row => $body),
            Stored::Q8_0 => {
                type $row = crate::backend::cpu::kernels::blocks::Q8_0;
                $body
            }
            Stored::Q4_0 => {
                type $row = crate::backend::cpu::kernels::blocks::Q4_0;
                $body
            }
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
pub(super) use {with_cells, with_elements, with_float, with_rows, with_stored};
