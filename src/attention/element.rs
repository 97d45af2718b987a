//! How the elements of K and V are stored.

use std::fmt;

use crate::dtype::DType;

/// How the elements of K or V are stored. A row is a whole number of blocks; strides count elements and are
/// whole blocks, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Each element by itself.
    Plain(DType),
    /// GGML's `q8_0`: blocks of 32 elements, an f16 scale before 32 signed bytes.
    Q8_0,
    /// GGML's `q4_0`: blocks of 32 elements, an f16 scale before 16 bytes. Byte `i` holds element `i` in its
    /// low half and element `i + 16` in its high half, each with 8 added.
    Q4_0,
}

impl Format {
    /// Elements of a block.
    pub const fn block(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Q8_0 | Self::Q4_0 => 32,
        }
    }

    /// Bytes of a block, its scale included.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.size_of(),
            Self::Q8_0 => 2 + 32,
            Self::Q4_0 => 2 + 16,
        }
    }

    /// Element type of the buffer that holds it: `U8` for blocks.
    pub const fn storage(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Q8_0 | Self::Q4_0 => DType::U8,
        }
    }

    /// How many of [`Self::storage`] hold so many elements, which are whole blocks; `None` on overflow.
    pub(super) const fn stored(self, elements: usize) -> Option<usize> {
        match self {
            Self::Plain(_) => Some(elements),
            _ => (elements / self.block()).checked_mul(self.block_bytes()),
        }
    }

    /// How many elements so many of [`Self::storage`] stand for: the inverse of `stored`.
    pub(crate) const fn elements(self, stored: usize) -> usize {
        match self {
            Self::Plain(_) => stored,
            _ => stored / self.block_bytes() * self.block(),
        }
    }

    /// Name, as in `q8_0`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }
}

impl From<DType> for Format {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Format;
    use crate::dtype::DType;

    #[test]
    fn blocks_have_the_sizes_of_ggml() {
        assert_eq!((Format::Q8_0.block(), Format::Q8_0.block_bytes()), (32, 34));
        assert_eq!((Format::Q4_0.block(), Format::Q4_0.block_bytes()), (32, 18));
        assert_eq!(Format::Q8_0.stored(96), Some(102));
        assert_eq!(Format::Q4_0.stored(96), Some(54));
        assert_eq!(Format::Q8_0.stored(usize::MAX), None);
        assert_eq!(Format::Q8_0.elements(102), 96);
        assert_eq!(Format::Q4_0.elements(54), 96);
        let plain = Format::from(DType::BF16);
        assert_eq!((plain.stored(96), plain.storage()), (Some(96), DType::BF16));
        assert_eq!(plain.elements(96), 96);
        assert_eq!(Format::Q4_0.storage(), DType::U8);
    }
}
