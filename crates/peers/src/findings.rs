//! What was found, as programs read it: a JSON object a line.

use serde::Serialize;

/// A result further from the reference than this is not attention on these inputs, so its time does
/// not count.
const WRONG: f64 = 0.02;

/// All that was found, in order.
#[derive(Debug, Default)]
pub(crate) struct Findings(pub(crate) Vec<Line>);

impl Findings {
    /// Says loudly that something was not timed.
    pub(crate) fn skip(&mut self, what: impl Into<String>, why: impl Into<String>) {
        let (what, why) = (what.into(), why.into());
        eprintln!("SKIP: {what} ({why})");
        self.0.push(Line::Skip { what, why });
    }

    /// How much was not timed.
    pub(crate) fn skipped(&self) -> usize {
        let skips = self.0.iter().filter(|l| matches!(l, Line::Skip { .. }));
        skips.count()
    }
}

/// Of all that a run says, one line.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Line {
    /// What ran, and where.
    Run(Run),
    /// How fast a contestant was.
    Time(Time),
    /// A ratio against its bar.
    Bar(Verdict),
    /// Our own time of one form against that of another.
    Form(Form),
    /// What was not timed, and why.
    Skip { what: String, why: String },
}

/// What ran, and where.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) machine: String,
    pub(crate) device: String,
    pub(crate) threads: usize,
    pub(crate) rounds: usize,
    /// By name of the peer.
    pub(crate) versions: Vec<(String, String)>,
    /// GFLOP/s that the device reaches at best, by dtype.
    pub(crate) peaks: Vec<(String, f64)>,
}

/// How fast a contestant was.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Time {
    pub(crate) row: u8,
    pub(crate) shape: String,
    pub(crate) peer: String,
    pub(crate) variant: String,
    pub(crate) dtype: String,
    /// Median of the rounds' medians, and the rounds' extremes.
    pub(crate) ms_median: f64,
    pub(crate) ms_min: f64,
    pub(crate) ms_max: f64,
    pub(crate) gflops: f64,
    /// Of our measured peak in the same dtype.
    pub(crate) share: Option<f64>,
    pub(crate) relative_error: Option<f64>,
}

impl Time {
    /// Whether it is the time of the right result.
    pub(crate) fn counts(&self) -> bool {
        self.relative_error.is_some_and(|error| error <= WRONG)
    }

    /// Who computes, and how.
    pub(crate) fn way(&self) -> String {
        format!("{} {}", self.peer, self.variant).trim_end().into()
    }

    /// Everything that names it.
    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.way(), self.dtype)
    }
}

/// A ratio against its bar.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    pub(crate) row: u8,
    pub(crate) dtype: &'static str,
    pub(crate) ms: f64,
    pub(crate) against: String,
    pub(crate) against_ms: f64,
    /// How many times as fast we are.
    pub(crate) ratio: f64,
    pub(crate) bar: f64,
    pub(crate) pass: bool,
}

/// Our own time of one form against that of another.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Form {
    pub(crate) what: String,
    pub(crate) dtype: String,
    pub(crate) form: String,
    pub(crate) ms_median: f64,
    pub(crate) ms_min: f64,
    pub(crate) ms_max: f64,
    /// What is compared: `GFLOP/s`, `GB/s` ...
    pub(crate) unit: &'static str,
    pub(crate) rate: f64,
    /// Against which of the forms, and how many times its time for the same work.
    pub(crate) against: String,
    pub(crate) ratio: f64,
}
