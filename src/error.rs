//! The one error type of this crate.

/// What a device cannot do, though the problem is a right one: another device may do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is not supported on the {device} device: {reason}")]
#[non_exhaustive]
pub struct Unsupported {
    /// The device's kind, as `MLX_FLASH_DEVICE` takes it.
    pub device: &'static str,
    /// The part of the problem that it cannot do.
    pub what: String,
    /// Why, and what it can do instead.
    pub reason: String,
}

impl Unsupported {
    pub(crate) fn new(
        device: &'static str,
        what: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self {
            device,
            what: what.into(),
            reason: reason.into(),
        }
    }
}

/// Why a call was refused or a command failed.
///
/// A refused call has encoded nothing and written nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MlxError {
    /// No usable device was found on this machine.
    #[error("no usable device was found")]
    DeviceNotFound,
    /// The device that was asked for by name cannot be used here.
    #[error("device `{device}` is not available: {reason}")]
    DeviceUnavailable {
        /// The name that was asked for.
        device: String,
        /// Why it cannot be used, and what to do.
        reason: String,
    },
    /// A committed command failed while it ran.
    #[error("command failed: {0}")]
    CommandBufferError(String),
    /// A kernel could not be built for the device.
    #[error("kernel `{name}` could not be built: {message}")]
    ShaderCompilationError {
        /// The kernel's name.
        name: String,
        /// The compiler's own message.
        message: String,
    },
    /// The device has no room for a buffer of this size.
    #[error("a buffer of {bytes} bytes could not be allocated")]
    BufferAllocationError {
        /// The size that was asked for, in bytes.
        bytes: usize,
    },
    /// An argument is wrong; the message names it, what was expected and what was given.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// The device cannot do what the problem asks.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// No kernel is known by this name.
    #[error("kernel not found: {0}")]
    KernelNotFound(String),
    /// The dtype cannot be used for this operand.
    #[error("unsupported dtype: {0}")]
    UnsupportedDtype(String),
    /// A file could not be read or written.
    #[error("i/o error: {0}")]
    IoError(String),
    /// A safetensors file is malformed.
    #[error("safetensors error: {0}")]
    SafetensorsError(String),
}

/// `Result` with [`MlxError`].
pub type Result<T> = std::result::Result<T, MlxError>;

impl MlxError {
    /// Whether the same call may succeed later: memory that was short may be free then. Everything else
    /// is wrong with the call or the machine.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::BufferAllocationError { .. })
    }

    /// The usual shape of a refusal: which operand, what was expected, what was given.
    pub(crate) fn expected(
        operand: &str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::InvalidArgument(format!("{operand}: expected {expected}, got {got}"))
    }
}

#[cfg(test)]
mod tests {
    use super::MlxError;

    #[test]
    fn only_memory_that_is_short_may_be_free_later() {
        assert!(MlxError::BufferAllocationError { bytes: 1 }.is_transient());
        for error in [
            MlxError::DeviceNotFound,
            MlxError::CommandBufferError(String::new()),
            MlxError::InvalidArgument(String::new()),
            MlxError::KernelNotFound(String::new()),
        ] {
            assert!(!error.is_transient(), "{error}");
        }
    }
}
