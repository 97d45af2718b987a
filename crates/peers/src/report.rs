//! What was found, for people: tables and a picture.

use std::fmt::Write;

use crate::findings::{Form, Time, Verdict};
use crate::plot::{self, Bar, Reference};
use crate::rows::{BAR_F16, Row};
use crate::table::{Table, milliseconds, significant};

/// Verdicts of a row in which everything was timed.
pub(crate) const VERDICTS: usize = 3;

/// The verdicts of one row: bf16 against any peer, f32 against peers in f32, f16 against our f32.
/// A dtype that was not timed, or has nothing to be held against, has none.
pub(crate) fn verdicts(row: &Row, times: &[Time]) -> Vec<Verdict> {
    let times = || times.iter().filter(|t| t.row == row.number && t.counts());
    let fastest = |of: &dyn Fn(&&Time) -> bool| {
        times()
            .filter(|t| of(t))
            .min_by(|a, b| a.ms_median.total_cmp(&b.ms_median))
    };
    let ours = |dtype: &'static str| fastest(&|t| t.peer == "ours" && t.dtype == dtype);
    let any = fastest(&|t| t.peer != "ours");
    let f32_peer = fastest(&|t| t.peer != "ours" && t.dtype == "f32");
    [
        ("bf16", any, row.bar_bf16),
        ("f32", f32_peer, row.bar_f32),
        ("f16", ours("f32"), BAR_F16),
    ]
    .into_iter()
    .filter_map(|(dtype, against, bar)| {
        let (ours, against) = (ours(dtype)?, against?);
        let ratio = against.ms_median / ours.ms_median;
        Some(Verdict {
            row: row.number,
            dtype,
            ms: ours.ms_median,
            against: against.name(),
            against_ms: against.ms_median,
            ratio,
            bar,
            pass: ratio >= bar,
        })
    })
    .collect()
}

/// The times of one row, fastest first.
pub(crate) fn times_table(times: &[Time]) -> String {
    let mut times: Vec<&Time> = times.iter().collect();
    times.sort_by(|a, b| a.ms_median.total_cmp(&b.ms_median));
    let header = [
        "peer", "dtype", "median", "min", "max", "GFLOP/s", "of peak", "error",
    ];
    let mut table = Table::new(header);
    for t in times {
        table.row([
            t.way(),
            t.dtype.clone(),
            milliseconds(t.ms_median),
            milliseconds(t.ms_min),
            milliseconds(t.ms_max),
            significant(t.gflops),
            t.share
                .map_or("-".into(), |share| format!("{:.1} %", share * 100.0)),
            match t.relative_error {
                Some(error) if t.counts() => format!("{error:.1e}"),
                Some(error) => format!("{error:.1e} WRONG"),
                None => "unknown".into(),
            },
        ]);
    }
    table.to_string()
}

/// All verdicts, a line each.
pub(crate) fn verdicts_table(verdicts: &[Verdict]) -> String {
    let header = ["row", "ours", "", "against", "", "ratio", "bar", ""];
    let mut table = Table::new(header);
    for v in verdicts {
        table.row([
            v.row.to_string(),
            v.dtype.to_owned(),
            milliseconds(v.ms),
            v.against.clone(),
            milliseconds(v.against_ms),
            format!("{:.2}x", v.ratio),
            format!("{:.2}x", v.bar),
            if v.pass { "PASS" } else { "short" }.to_owned(),
        ]);
    }
    table.to_string()
}

/// All comparisons of our own forms.
pub(crate) fn forms_table(forms: &[Form]) -> String {
    let mut table = Table::new(["what", "form", "dtype", "median", "rate", "", "time"]);
    for f in forms {
        table.row([
            f.what.clone(),
            f.form.clone(),
            f.dtype.clone(),
            milliseconds(f.ms_median),
            significant(f.rate),
            f.unit.to_owned(),
            format!("{:.2}x of {}", f.ratio, f.against),
        ]);
    }
    table.to_string()
}

/// Counts of all that matters, for the last line.
pub(crate) fn summary(verdicts: &[Verdict], expected: usize, skipped: usize) -> String {
    let passed = verdicts.iter().filter(|v| v.pass).count();
    let mut text = format!("bars: {passed} passed, {} short", verdicts.len() - passed);
    // Writing to a string does not fail.
    let missing = expected.saturating_sub(verdicts.len());
    let _ = write!(
        text,
        ", {missing} not measured; {skipped} contestants skipped"
    );
    text
}

/// Ours and the fastest variant of each peer in each dtype, row by row.
pub(crate) fn picture(device: &str, times: &[Time], peaks: &[(String, f64)]) -> String {
    let mut shown: Vec<&Time> = Vec::new();
    for t in times.iter().filter(|t| t.counts()) {
        let same = |o: &&mut &Time| (o.row, &o.peer, &o.dtype) == (t.row, &t.peer, &t.dtype);
        match shown.iter_mut().find(same) {
            Some(other) if other.ms_median > t.ms_median => *other = t,
            Some(_) => {}
            None => shown.push(t),
        }
    }
    shown.sort_by(|a, b| {
        let by_row = a.row.cmp(&b.row);
        by_row.then(a.ms_median.total_cmp(&b.ms_median))
    });
    let bars: Vec<Bar> = shown
        .iter()
        .map(|t| Bar {
            label: format!("row {}: {} {}", t.row, t.peer, t.dtype),
            value: t.gflops,
            low: t.gflops * t.ms_median / t.ms_max,
            high: t.gflops * t.ms_median / t.ms_min,
            note: format!("{} in {}", significant(t.gflops), milliseconds(t.ms_median)),
        })
        .collect();
    let peak = peaks.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let peak = peak.map(|(dtype, peak)| Reference {
        label: format!("measured peak, {dtype}: {}", significant(*peak)),
        value: *peak,
    });
    let axis = "GFLOP/s of visible pairs, median; line: slowest to fastest round";
    let title = format!("Attention on {device} and by its peers");
    plot::bars(&title, "row, peer, dtype", axis, &bars, peak.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    fn time(peer: &str, dtype: &str, ms: f64, error: f64) -> Time {
        Time {
            row: 1,
            shape: String::new(),
            peer: peer.into(),
            variant: "x".into(),
            dtype: dtype.into(),
            ms_median: ms,
            ms_min: ms,
            ms_max: ms,
            gflops: 1.0,
            share: None,
            relative_error: Some(error),
        }
    }

    #[test]
    fn bars_are_held_against_the_right_peer() {
        let times = [
            time("ours", "bf16", 4.0, 1e-3),
            time("ours", "f32", 8.0, 1e-7),
            time("ours", "f16", 9.0, 1e-4),
            time("a", "f16", 6.0, 1e-4),
            time("a", "f32", 10.0, 1e-7),
            time("b", "f32", 1.0, 0.5),
        ];
        let verdicts = verdicts(&ROWS[0], &times);
        let found: Vec<_> = verdicts
            .iter()
            .map(|v| (v.dtype, v.against.as_str(), v.ratio, v.pass))
            .collect();
        let expected = [
            ("bf16", "a x f16", 1.5, false),
            ("f32", "a x f32", 1.25, true),
            ("f16", "ours x f32", 8.0 / 9.0, false),
        ];
        assert_eq!(found, expected);
        assert!(times_table(&times).contains("WRONG"));
    }
}
