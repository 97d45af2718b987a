//! Element types of buffers.

use std::fmt;

/// The element type of a buffer. A bool mask is `U8`: nonzero attends, zero masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE-754 binary32.
    F32,
    /// IEEE-754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// Unsigned 8-bit integer; also a bool mask and tile classes.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 32-bit integer.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size_of(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::BF16 | Self::U16 => 2,
            Self::F32 | Self::U32 | Self::I32 => 4,
        }
    }

    /// Lower-case name, as in `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::I32 => "i32",
        }
    }

    /// Whether this is one of the floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::DType;

    #[test]
    fn names_and_sizes() {
        let all = [
            (DType::F32, "f32", 4),
            (DType::F16, "f16", 2),
            (DType::BF16, "bf16", 2),
            (DType::U8, "u8", 1),
            (DType::U16, "u16", 2),
            (DType::U32, "u32", 4),
            (DType::I32, "i32", 4),
        ];
        for (dtype, name, size) in all {
            assert_eq!(dtype.to_string(), name);
            assert_eq!(dtype.size_of(), size);
        }
    }
}
