//! Contestants take turns, so that what else the machine does meets all of them alike.

use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::ours::Ours;
use crate::worker::Worker;

/// How long a turn takes, about.
const TURN: Duration = Duration::from_millis(300);
/// Between turns: threads that spin for a while after a run (ONNX Runtime's longest, for some 35 ms)
/// have then gone to sleep.
const PAUSE: Duration = Duration::from_millis(50);
const MOST_ITERATIONS: u64 = 2000;

/// Who computes.
#[derive(Debug)]
pub(crate) enum Runner {
    /// The library.
    Ours(Box<Ours>),
    /// A worker, by its place among all, and its variant.
    Peer { worker: usize, variant: usize },
}

/// One way of someone to compute a row.
#[derive(Debug)]
pub(crate) struct Contestant {
    pub(crate) peer: String,
    pub(crate) variant: String,
    pub(crate) dtype: String,
    pub(crate) runner: Runner,
}

impl Contestant {
    /// Everything that names it.
    pub(crate) fn name(&self) -> String {
        format!("{} {} {}", self.peer, self.variant, self.dtype)
    }

    fn time(&mut self, workers: &mut [Worker], warm: usize, iters: usize) -> Result<Vec<u64>> {
        match &mut self.runner {
            Runner::Ours(ours) => ours.time(warm, iters),
            Runner::Peer { worker, variant } => workers
                .get_mut(*worker)
                .ok_or_else(|| anyhow!("there is no worker {worker}"))?
                .time(*variant, warm, iters),
        }
    }
}

/// The median; 0 of nothing.
pub(crate) fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    let n = of.len();
    match (of.get(n.saturating_sub(1) / 2), of.get(n / 2)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

/// Times all contestants in `rounds` rounds: milliseconds of each, a median for each round, or why
/// there are none.
pub(crate) fn run(
    contestants: &mut [Contestant],
    workers: &mut [Worker],
    rounds: usize,
) -> Vec<Result<Vec<f64>>> {
    let mut results: Vec<Result<Vec<f64>>> = Vec::new();
    let mut iterations = Vec::new();
    for contestant in contestants.iter_mut() {
        std::thread::sleep(PAUSE);
        let trial = contestant.time(workers, 2, 1);
        let ns = trial
            .as_ref()
            .ok()
            .and_then(|ns| ns.first().copied())
            .unwrap_or(1);
        let iters = (TURN.as_nanos() as u64 / ns.max(1)).clamp(1, MOST_ITERATIONS);
        iterations.push(iters as usize);
        results.push(trial.map(|_| Vec::new()));
    }
    let n = contestants.len();
    for round in 0..rounds {
        // Each round begins with another one.
        for index in (0..n).map(|i| (i + round) % n) {
            let (Some(contestant), Some(result), Some(iters)) = (
                contestants.get_mut(index),
                results.get_mut(index),
                iterations.get(index),
            ) else {
                continue;
            };
            let Ok(times) = result else { continue };
            std::thread::sleep(PAUSE);
            // Others have used the caches since; a long run warms up by itself.
            let warm = usize::from(*iters > 1);
            match contestant.time(workers, warm, *iters) {
                Ok(ns) => times.push(median(ns.iter().map(|ns| *ns as f64 / 1e6).collect())),
                Err(error) => *result = Err(error),
            }
        }
    }
    results
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 10.0]), 3.0);
        assert_eq!(median(vec![2.0, 1.0]), 1.5);
    }
}
