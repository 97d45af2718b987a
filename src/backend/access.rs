//! What a device does with an operand.

/// How a kernel uses a bound buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Only reads it.
    Read,
    /// Only writes it.
    Write,
    /// Does both, or it is not known.
    ReadWrite,
}

impl Access {
    /// Whether it may write.
    pub const fn writes(self) -> bool {
        !matches!(self, Self::Read)
    }
}
