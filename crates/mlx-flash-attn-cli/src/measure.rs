//! How long something takes: warmed up, repeated, and summed up by its median.

use std::time::{Duration, Instant};

use anyhow::Result;

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    /// Run unmeasured for this long, and at least once for each of the inputs.
    pub(crate) warm_up: Duration,
    /// Measure for this long at least ...
    pub(crate) at_least: Duration,
    /// ... and this often, unless `at_most` has passed.
    pub(crate) runs: usize,
    /// Measure no longer than this once there are three runs.
    pub(crate) at_most: Duration,
}

pub(crate) const BENCH: Policy = Policy {
    warm_up: Duration::from_millis(300),
    at_least: Duration::from_secs(1),
    runs: 11,
    at_most: Duration::from_secs(20),
};

/// What was measured, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Times {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
}

impl Times {
    /// Sums up times in seconds; `None` where there are none.
    fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let (min, max) = (*seconds.first()?, *seconds.last()?);
        let n = seconds.len();
        let median = (seconds.get((n - 1) / 2)? + seconds.get(n / 2)?) / 2.0;
        Some(Self {
            median: median * 1e3,
            min: min * 1e3,
            max: max * 1e3,
            runs: n,
        })
    }
}

/// Measures `once`, which runs on input `i` of `inputs` and gives its own time in seconds.
/// `progress` hears which part of the work is done.
pub(crate) fn measure(
    policy: &Policy,
    inputs: usize,
    mut once: impl FnMut(usize) -> Result<f64>,
    progress: impl Fn(f64),
) -> Result<Times> {
    let inputs = inputs.max(1);
    let start = Instant::now();
    let mut next = 0..;
    let mut run = || once(next.next().unwrap_or(0) % inputs);
    for done in 0.. {
        // One run that outlasts the warm-up is enough of it.
        let elapsed = start.elapsed();
        if elapsed >= policy.warm_up && (done >= inputs || elapsed >= policy.at_least) && done > 0 {
            break;
        }
        run()?;
    }
    let start = Instant::now();
    let mut seconds = Vec::new();
    loop {
        seconds.push(run()?);
        let (elapsed, n) = (start.elapsed(), seconds.len());
        let by_time = elapsed.as_secs_f64() / policy.at_least.as_secs_f64().max(1e-9);
        let by_runs = n as f64 / policy.runs.max(1) as f64;
        progress(by_time.min(by_runs).min(1.0));
        let enough = elapsed >= policy.at_least && n >= policy.runs;
        if enough || (elapsed >= policy.at_most && n >= 3) {
            break;
        }
    }
    Times::of(seconds).ok_or_else(|| anyhow::anyhow!("nothing was measured"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Times::of(vec![]), None);
        let odd = Times::of(vec![0.003, 0.001, 0.010]).unwrap();
        assert_eq!(
            (odd.median, odd.min, odd.max, odd.runs),
            (3.0, 1.0, 10.0, 3)
        );
        assert_eq!(Times::of(vec![0.002, 0.001]).unwrap().median, 1.5);
    }

    #[test]
    fn every_input_is_warmed_up_and_takes_its_turn() {
        let policy = Policy {
            warm_up: Duration::ZERO,
            at_least: Duration::from_nanos(1),
            runs: 5,
            at_most: Duration::from_secs(9),
        };
        let slow = Policy {
            at_least: Duration::from_secs(3600),
            at_most: Duration::ZERO,
            ..policy
        };
        for (policy, expected) in [(policy, 5), (slow, 3)] {
            let mut seen = Vec::new();
            let once = |i| {
                seen.push(i);
                Ok(1.0)
            };
            let times = measure(&policy, 3, once, |_| {}).unwrap();
            assert_eq!(times.runs, expected);
            assert!(seen.iter().enumerate().all(|(n, i)| n % 3 == *i));
            assert!(seen.len() > expected);
        }
        assert!(measure(&policy, 1, |_| anyhow::bail!("no"), |_| {}).is_err());
    }
}
