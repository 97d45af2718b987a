//! The error of a translation step: a line of the text and the rule that it breaks.

/// A line of the text that breaks a rule of Metal.
pub(crate) struct Diagnostic {
    pub(super) line: u32,
    pub(super) message: String,
}

/// The result of one step of the translation.
pub(crate) type Step<T> = std::result::Result<T, Diagnostic>;

/// The error of a step that rejects `line`.
pub(super) fn reject<T>(line: u32, message: impl Into<String>) -> Step<T> {
    Err(Diagnostic {
        line,
        message: message.into(),
    })
}
