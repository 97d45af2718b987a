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

/// How a kernel uses its buffers.
#[derive(Debug, Clone, Copy)]
pub struct Accesses {
    /// Indices that it writes; none where the kernel is not ours.
    written: &'static [usize],
}

impl Accesses {
    /// A kernel that may do anything.
    pub const UNKNOWN: Self = Self { written: &[] };

    /// A kernel of this crate that writes the buffers at these indices, and only reads the others.
    pub(crate) const fn writing(written: &'static [usize]) -> Self {
        Self { written }
    }

    /// Whether it is known what the kernel does.
    pub(crate) const fn is_known(self) -> bool {
        !self.written.is_empty()
    }

    /// How it uses the buffer at `index`. A kernel that is not ours may do anything.
    pub fn of(self, index: usize) -> Access {
        // Every kernel of ours writes something.
        match self.written {
            [] => Access::ReadWrite,
            written if written.contains(&index) => Access::Write,
            _ => Access::Read,
        }
    }
}
