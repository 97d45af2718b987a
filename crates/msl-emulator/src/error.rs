//! What can go wrong, from a missing compiler to a race in a kernel.

use std::fmt;
use std::path::PathBuf;

/// A failure to compile, load or run a program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This system or processor is not supported, or the program uses what is not emulated.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// No working `clang++` was found.
    #[error("no C++ compiler: {0}")]
    NoCompiler(String),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text breaks a rule of Metal that is checked before compiling.
    #[error("{file}:{line}: {message}")]
    Text {
        /// Name of the program.
        file: String,
        /// Line in it.
        line: u32,
        /// What is wrong.
        message: String,
    },
    /// The compiler rejected the text; the log has its messages with lines of the program.
    #[error("the program does not compile:\n{log}")]
    Compile {
        /// The compiler's messages.
        log: String,
    },
    /// The compiled program could not be loaded.
    #[error("cannot load the compiled program: {0}")]
    Load(String),
    /// No kernel of this name is in the text.
    #[error("no kernel `{name}` in the program; it has: {known}")]
    UnknownKernel {
        /// The name asked for.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// A buffer argument of the kernel has nothing bound to it.
    #[error("kernel `{kernel}`: nothing is bound to {what}({index}) `{argument}`")]
    MissingBinding {
        /// The kernel.
        kernel: String,
        /// `buffer` or `threadgroup`.
        what: &'static str,
        /// Its index.
        index: u32,
        /// Name of the argument.
        argument: String,
    },
    /// A binding is not what the argument needs.
    #[error("kernel `{kernel}`: buffer({index}) `{argument}`: {message}")]
    Binding {
        /// The kernel.
        kernel: String,
        /// The buffer index.
        index: u32,
        /// Name of the argument.
        argument: String,
        /// What is wrong with it.
        message: String,
    },
    /// A function constant that the kernel uses has no value.
    #[error("kernel `{kernel}`: function constant {index} `{name}` is not set")]
    UnsetConstant {
        /// The kernel.
        kernel: String,
        /// The constant's index.
        index: u32,
        /// Its name.
        name: String,
    },
    /// A function constant was given a value of another type.
    #[error("kernel `{kernel}`: function constant {index} `{name}` is a {expected}, got {got}")]
    ConstantType {
        /// The kernel.
        kernel: String,
        /// The constant's index.
        index: u32,
        /// Its name.
        name: String,
        /// The declared type.
        expected: String,
        /// The value's type.
        got: &'static str,
    },
    /// The dispatch asks for more than the device or the kernel allows.
    #[error("kernel `{kernel}`: {message}")]
    Limit {
        /// The kernel.
        kernel: String,
        /// Which limit, wanted and allowed.
        message: String,
    },
    /// The kernel did something wrong while it ran.
    #[error("{0}")]
    Fault(Box<Fault>),
}

/// What a kernel did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// Device memory outside of every binding.
    OutOfBounds,
    /// A write to a read-only binding.
    ReadOnlyWrite,
    /// Threadgroup memory outside of every threadgroup variable.
    ThreadgroupOutOfBounds,
    /// Two threads touch the same threadgroup memory, one of them writing, with no barrier between.
    ThreadgroupRace,
    /// The same for device memory, in a threadgroup or across threadgroups.
    DeviceRace,
    /// A read of threadgroup memory that nobody wrote.
    Unwritten,
    /// An address that is not a multiple of the size of its type.
    Misaligned,
    /// Memory of another thread.
    OtherThread,
    /// A barrier or simdgroup operation that not all threads reach, or not the same one.
    Divergence,
    /// A simdgroup operation whose lanes do not agree on the pointer or the value.
    LanesDisagree,
    /// Matrix elements changed through a reference taken before the matrix was last computed. A GPU
    /// allows it, the emulator needs `thread_elements()` to be called again.
    StaleElements,
}

/// A fault: where, who, and a message that says what.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What kind of fault.
    pub kind: FaultKind,
    /// The kernel.
    pub kernel: String,
    /// Its threadgroup in the grid.
    pub threadgroup: [u32; 3],
    /// The thread in the threadgroup.
    pub thread: [u32; 3],
    /// The other thread, for races and divergence.
    pub other_thread: Option<[u32; 3]>,
    /// Name of the program text.
    pub file: String,
    /// Line in it, when known.
    pub line: Option<u32>,
    /// The function, when the line is not known.
    pub symbol: Option<String>,
    /// Line of the other thread's access or operation, when known.
    pub other_line: Option<u32>,
    /// What happened, without the place.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [gx, gy, gz] = self.threadgroup;
        let [x, y, z] = self.thread;
        write!(
            f,
            "kernel `{}`, threadgroup ({gx}, {gy}, {gz}), thread ({x}, {y}, {z})",
            self.kernel
        )?;
        match (self.line, &self.symbol) {
            (Some(line), _) => write!(f, ", {}:{line}", self.file)?,
            (None, Some(symbol)) => write!(f, ", in {symbol}")?,
            (None, None) => {}
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for Fault {}

impl Error {
    /// The fault, when this is one.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Fault(fault) => Some(fault),
            _ => None,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
