//! Where results and messages go, and how a command ends.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// It did what was asked.
    Done,
    /// It ran, and the result was checked and found wrong.
    CheckFailed,
    /// It could not do what was asked.
    BadInput,
}

impl Status {
    /// The status after a check.
    pub(crate) fn of_check(ok: bool) -> Self {
        if ok { Self::Done } else { Self::CheckFailed }
    }

    /// The process's exit status.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::CheckFailed => 1,
            Self::BadInput => 2,
        }
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status.code())
    }
}

/// Standard output. A reader that has seen enough (`| head`) is no error: what follows is dropped.
pub(crate) struct Results {
    inner: Box<dyn Write>,
    closed: bool,
}

impl Results {
    pub(crate) fn stdout() -> Self {
        Self::to(io::stdout())
    }

    pub(crate) fn to(inner: impl Write + 'static) -> Self {
        Self {
            inner: Box::new(inner),
            closed: false,
        }
    }

    fn unless_closed(&mut self, result: io::Result<()>) -> anyhow::Result<()> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            other => other.context("cannot write to stdout"),
        }
    }

    /// Writes text as it is.
    pub(crate) fn text(&mut self, text: &str) -> anyhow::Result<()> {
        if self.closed {
            return Ok(());
        }
        let result = self.inner.write_all(text.as_bytes());
        self.unless_closed(result)
    }

    /// Writes one line.
    pub(crate) fn line(&mut self, line: impl fmt::Display) -> anyhow::Result<()> {
        self.text(&format!("{line}\n"))
    }

    /// Writes one object as one line, at once, so that a reader can follow.
    pub(crate) fn json(&mut self, object: &impl Serialize) -> anyhow::Result<()> {
        self.line(serde_json::to_string(object)?)?;
        self.finish()
    }

    /// Writes out what is buffered.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        if self.closed {
            return Ok(());
        }
        let result = self.inner.flush();
        self.unless_closed(result)
    }
}

/// Writes a message to stderr; if nobody reads it, so be it.
pub(crate) fn message(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fails(ErrorKind);

    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn exit_statuses() {
        let all = [Status::Done, Status::CheckFailed, Status::BadInput];
        assert_eq!(all.map(Status::code), [0, 1, 2]);
        assert_eq!(Status::of_check(true), Status::Done);
        assert_eq!(Status::of_check(false), Status::CheckFailed);
    }

    #[test]
    fn a_closed_pipe_is_no_error_but_a_full_disk_is() {
        let mut closed = Results::to(Fails(ErrorKind::BrokenPipe));
        closed.line("one").unwrap();
        closed.json(&2).unwrap();
        assert!(
            Results::to(Fails(ErrorKind::StorageFull))
                .line("one")
                .is_err()
        );
    }
}
