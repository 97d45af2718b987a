//! The one error type of this crate.

/// What a device cannot do, though the problem is a right one: another device may do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {device} device does not support {what}: {reason}")]
#[non_exhaustive]
pub struct Unsupported {
    /// The device's kind, as `MLX_FLASH_DEVICE` takes it.
    pub device: &'static str,
    /// The part of the problem that it cannot do.
    pub what: String,
    /// Why, and what it can do instead where there is something.
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

/// What a GPU's driver reported: the source of [`MlxError::Driver`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({name})")]
#[non_exhaustive]
pub struct DriverError {
    /// The driver's number for it: a `CUresult`, or the code of an `NSError`.
    pub code: i64,
    /// The driver's name for it: of a `CUresult`, or the domain of an `NSError`.
    pub name: String,
    /// The driver's own words.
    pub message: String,
}

impl DriverError {
    #[cfg(any(feature = "cuda", all(feature = "metal", target_vendor = "apple")))]
    pub(crate) fn while_doing(self, what: impl Into<String>) -> MlxError {
        MlxError::Driver {
            what: what.into(),
            source: self,
        }
    }
}

/// What kind of thing went wrong, and so what a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The call is wrong: [`MlxError::argument`] names the argument, the message what was expected.
    BadArgument,
    /// The device has no kernel for it; another device may.
    Unsupported,
    /// The device is not there, or failed.
    Device,
    /// A kernel did not compile.
    Compile,
    /// Memory was short; it may be free later.
    OutOfMemory,
}

/// Why a call was refused or a command failed. [`MlxError::cause`] sorts the variants, whose names are those
/// of `mlx-native`.
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
    /// The GPU's driver refused a call, or a committed command failed on the GPU. The message has the source's.
    #[error("command failed: {what}: {source}")]
    Driver {
        /// What was being done.
        what: String,
        /// What the driver reported.
        source: DriverError,
    },
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
    /// A file could not be read or written. For programs that read weights: this crate reads none.
    #[error("i/o error: {0}")]
    IoError(String),
    /// A safetensors file is malformed. For programs that read weights: this crate reads none.
    #[error("safetensors error: {0}")]
    SafetensorsError(String),
}

/// `Result` with [`MlxError`].
pub type Result<T> = std::result::Result<T, MlxError>;

impl MlxError {
    /// What kind of thing went wrong.
    pub fn cause(&self) -> Cause {
        match self {
            Self::InvalidArgument(_)
            | Self::UnsupportedDtype(_)
            | Self::KernelNotFound(_)
            | Self::IoError(_)
            | Self::SafetensorsError(_) => Cause::BadArgument,
            Self::Unsupported(_) => Cause::Unsupported,
            Self::DeviceNotFound
            | Self::DeviceUnavailable { .. }
            | Self::CommandBufferError(_)
            | Self::Driver { .. } => Cause::Device,
            Self::ShaderCompilationError { .. } => Cause::Compile,
            Self::BufferAllocationError { .. } => Cause::OutOfMemory,
        }
    }

    /// The argument that is wrong, by its name: an operand's as [`crate::attention::Role::name`] gives it, a
    /// size or an option. `None` where a call as a whole is wrong, and for other causes.
    pub fn argument(&self) -> Option<&str> {
        let (Self::InvalidArgument(message) | Self::UnsupportedDtype(message)) = self else {
            return None;
        };
        let (name, _) = message.split_once(": ")?;
        (!name.contains(' ')).then_some(name)
    }

    /// Whether the error is a `CommandBufferError`, as `mlx-native` has it, or a driver's, which it reports under
    /// that variant: the same command may run another time. A raw dispatch whose params and bindings do not fit
    /// each other is a `CommandBufferError`, too, and will be refused again. [`Self::cause`] tells memory that is
    /// short.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::CommandBufferError(_) | Self::Driver { .. })
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
    use std::error::Error as _;

    use super::{Cause, DriverError, MlxError, Unsupported};

    #[test]
    fn errors_name_their_cause_and_argument() {
        let wrong = MlxError::expected("mask", "dtype bf16", "u32");
        assert_eq!(
            (wrong.cause(), wrong.argument()),
            (Cause::BadArgument, Some("mask"))
        );
        let whole = MlxError::InvalidArgument("a call as a whole: is wrong".into());
        assert_eq!(whole.argument(), None);
        let unsupported = MlxError::from(Unsupported::new("cpu", "pages", "why"));
        assert_eq!(
            (unsupported.cause(), unsupported.argument()),
            (Cause::Unsupported, None)
        );
        assert_eq!(
            unsupported.to_string(),
            "the cpu device does not support pages: why"
        );
    }

    #[test]
    fn a_drivers_error_is_the_source() {
        let source = DriverError {
            code: 700,
            name: "CUDA_ERROR_ILLEGAL_ADDRESS".into(),
            message: "an illegal memory access was encountered".into(),
        };
        let error = MlxError::Driver {
            what: "CUDA: the command".into(),
            source: source.clone(),
        };
        assert_eq!((error.cause(), error.is_transient()), (Cause::Device, true));
        let found = error.source().and_then(|s| s.downcast_ref());
        assert_eq!(found, Some(&source));
        let text = "command failed: CUDA: the command: an illegal memory access was encountered \
                    (CUDA_ERROR_ILLEGAL_ADDRESS)";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn only_a_command_that_failed_may_run_later() {
        assert!(MlxError::CommandBufferError(String::new()).is_transient());
        for error in [
            MlxError::DeviceNotFound,
            MlxError::BufferAllocationError { bytes: 1 },
            MlxError::InvalidArgument(String::new()),
            MlxError::KernelNotFound(String::new()),
        ] {
            assert!(!error.is_transient(), "{error}");
        }
    }
}
