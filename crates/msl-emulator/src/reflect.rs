//! What a program says of itself: kernels, their arguments, function constants.

/// An address space of Metal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressSpace {
    /// `device`
    Device,
    /// `constant`
    Constant,
    /// `threadgroup`
    Threadgroup,
}

/// What an argument of a kernel is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArgumentKind {
    /// A pointer or reference that the caller binds.
    Buffer {
        /// Its index in its table, `[[buffer(n)]]` or `[[threadgroup(n)]]`.
        index: u32,
        /// Where it points.
        space: AddressSpace,
        /// Whether the kernel may only read it.
        is_const: bool,
        /// The function constant that must be true for it to exist.
        gate: Option<String>,
    },
    /// A value that the grid gives, such as `thread_position_in_grid`.
    BuiltIn(String),
}

/// An argument of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgumentInfo {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: ArgumentKind,
}

/// A kernel of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelInfo {
    /// The name that a host asks for.
    pub name: String,
    /// Its arguments in order.
    pub arguments: Vec<ArgumentInfo>,
    /// Names of the function constants that it cannot run without.
    pub required_constants: Vec<String>,
    /// `[[max_total_threads_per_threadgroup]]`, if it has one.
    pub max_threads: Option<u32>,
    /// Bytes of threadgroup memory that its body declares, each variable rounded up to 16.
    pub threadgroup_bytes: u32,
    /// Line of its declaration.
    pub line: u32,
}

/// A function constant of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConstantInfo {
    /// Its name in the text.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its type, as the text has it.
    pub type_name: String,
    /// Line of its declaration.
    pub line: u32,
}
