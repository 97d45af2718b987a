//! A peer in a process of its own, which sleeps while others are timed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::protocol::{Load, Reply, Request};

/// A worker that says nothing for so long is ended: it hangs, or is too slow to be of interest.
const PATIENCE: Duration = Duration::from_secs(90);

/// A running worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) version: String,
    child: Child,
    requests: Option<ChildStdin>,
    replies: Receiver<String>,
}

impl Worker {
    /// Starts `program` with `arguments` and waits for its version.
    pub(crate) fn start(
        name: &str,
        program: &Path,
        arguments: &[String],
        threads: usize,
    ) -> Result<Self> {
        let mut child = Command::new(program)
            .args(arguments)
            // Libraries that take their number of threads from the environment.
            .env("RAYON_NUM_THREADS", threads.to_string())
            .env("OMP_NUM_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let (send, replies) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                let lines = BufReader::new(stdout).lines();
                // Ends with the worker, or with the driver's interest.
                for line in lines.map_while(Result::ok) {
                    if send.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let mut worker = Self {
            name: name.to_owned(),
            version: String::new(),
            requests: child.stdin.take(),
            child,
            replies,
        };
        worker.version = worker.reply()?.version.unwrap_or_default();
        Ok(worker)
    }

    fn reply(&mut self) -> Result<Reply> {
        let line = self.replies.recv_timeout(PATIENCE).map_err(|why| {
            // Nothing more is asked of it.
            self.requests = None;
            let _ = self.child.kill();
            anyhow!("{}: no reply ({why})", self.name)
        })?;
        let reply: Reply = serde_json::from_str(&line)
            .with_context(|| format!("{}: {line:?} is no reply", self.name))?;
        match reply.error {
            Some(error) => bail!("{}: {error}", self.name),
            None => Ok(reply),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply> {
        let line = serde_json::to_string(request)?;
        let Some(to) = &mut self.requests else {
            bail!("{}: was ended before", self.name)
        };
        writeln!(to, "{line}").with_context(|| format!("{}: has ended", self.name))?;
        self.reply()
    }

    /// Gets ready for a row; the reply has its variants.
    pub(crate) fn load(&mut self, load: Load) -> Result<Reply> {
        self.ask(&Request::Load(load))
    }

    /// Nanoseconds of each of `iters` runs.
    pub(crate) fn time(&mut self, variant: usize, warm: usize, iters: usize) -> Result<Vec<u64>> {
        let request = Request::Time {
            variant,
            warm,
            iters,
        };
        Ok(self.ask(&request)?.ns)
    }

    /// The last output, f32 `[B, H, Sq, D]`, passed through a file at `path`.
    pub(crate) fn output(&mut self, variant: usize, path: &Path) -> Result<Vec<f32>> {
        self.ask(&Request::Output {
            variant,
            path: path.to_owned(),
        })?;
        let bytes = fs::read(path)?;
        let (numbers, _) = bytes.as_chunks::<4>();
        Ok(numbers.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A closed stdin ends a worker; one that is stuck is ended the hard way.
        self.requests = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
