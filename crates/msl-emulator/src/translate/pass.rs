//! The compilations that a program is translated for.

/// Which compilation the C++ is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Address spaces are real; only types are checked.
    Types,
    /// Address spaces are gone; code is generated.
    Code,
    /// Function constants are fixed, matrices opaque: shows what the optimiser leaves in memory.
    Registers,
}
