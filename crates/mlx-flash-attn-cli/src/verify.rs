//! `verify`: the contract as a matrix of checks.

use std::collections::BTreeMap;

use anyhow::Result;
use mlx_flash_attn::verify::{self, Case, Scope};
use mlx_flash_attn::{DeviceKind, KernelRegistry, MlxDevice};

use crate::cli::VerifyArgs;
use crate::json::VerifyLine;
use crate::output::{Results, Status};
use crate::progress;
use crate::table::Table;

/// Most failures that are described one by one.
const DESCRIBED: usize = 100;

pub(crate) fn execute(args: &VerifyArgs, results: &mut Results) -> Result<Status> {
    let device = args.device.open()?;
    let scope = if args.quick {
        Scope::Quick
    } else {
        Scope::Full
    };
    let (part, parts) = args.part;
    let only = args.only.as_deref().unwrap_or_default();
    let asked = |device: &MlxDevice| {
        let cases = verify::cases(scope, device).into_iter();
        cases.filter(|case| case.name().contains(only))
    };
    let cases: Vec<_> = asked(&device).skip(part - 1).step_by(parts).collect();
    // What the device does not serve is counted as skipped, and a part may have none.
    if cases.is_empty() && asked(&MlxDevice::open(DeviceKind::Cpu)?).next().is_none() {
        anyhow::bail!("--only: no case's name has `{only}`");
    }
    let mut report = Report::default();
    // The CPU serves everything, so what its matrix has more of is what this device lacks. Parts of
    // two matrices do not compare.
    if device.kind() != DeviceKind::Cpu && parts == 1 {
        let forms = 1 + i64::from(args.poison);
        for case in asked(&MlxDevice::open(DeviceKind::Cpu)?) {
            report.expect(&case, forms);
        }
        for case in &cases {
            report.expect(case, -forms);
        }
    }
    // The first kernel that does not build is reported by its case.
    #[cfg(feature = "cuda")]
    if device.kind() == DeviceKind::Cuda {
        let problems: Vec<_> = cases
            .iter()
            .filter_map(|case| case.problem().ok())
            .collect();
        device.cuda_warm_up(&problems).unwrap_or(());
    }
    let mut registry = KernelRegistry::new();
    let mut digests = String::new();
    let bar = progress::bar(cases.len() as u64, "verifying", args.json);
    for case in &cases {
        for judged in judge(case, &device, &mut registry, args.poison) {
            if let Some((form, digest)) = judged.digest {
                digests += &format!("{digest:016x} {}{form}\n", case.name());
            }
            report.add(case, judged.wrong);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &args.digests {
        std::fs::write(path, digests)?;
    }
    let line = report.line(&device);
    if args.json {
        results.json(&line)?;
        for (name, reason) in &report.failures {
            crate::output::message(format_args!("{name}: {reason}"));
        }
    } else {
        results.line(format_args!("{}\n", device.name()))?;
        results.text(&report.to_string())?;
        results.line(format_args!(
            "{} cases: {} passed, {} failed, {} skipped",
            line.cases, line.passed, line.failed, line.skipped
        ))?;
    }
    Ok(report.status())
}

/// One form of a case, judged.
struct Judged {
    /// What is wrong; nothing if it passed.
    wrong: Option<String>,
    /// The form's name after the case's, and a hash of the results.
    digest: Option<(&'static str, u64)>,
}

/// A case's plain form, and its poison form if that is asked for.
fn judge(
    case: &Case,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    poison: bool,
) -> Vec<Judged> {
    let judged = |form, digest, failures: Vec<String>| Judged {
        wrong: (!failures.is_empty()).then(|| failures.join("; ")),
        digest: Some((form, digest)),
    };
    let forms = if poison {
        verify::run_poisoned(case, device, registry).map(|(plain, poisoned)| {
            vec![
                judged("", plain.digest, plain.failures),
                judged(" poisoned", poisoned.digest, poisoned.failures),
            ]
        })
    } else {
        verify::run(case, device, registry)
            .map(|plain| vec![judged("", plain.digest, plain.failures)])
    };
    forms.unwrap_or_else(|error| {
        let failed = |_| Judged {
            wrong: Some(error.to_string()),
            digest: None,
        };
        (0..1 + usize::from(poison)).map(failed).collect()
    })
}

/// How many cases of a kind passed, failed, or have no kernel on the device.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: i64,
}

impl Tally {
    fn skipped(&self) -> usize {
        usize::try_from(self.skipped).unwrap_or(0)
    }

    fn cell(&self) -> String {
        let run = self.passed + self.failed;
        match (run, self.skipped()) {
            (0, 0) => String::new(),
            (0, _) => "skip".into(),
            _ => format!("{}/{run}", self.passed),
        }
    }
}

/// Tallies by row and column, both in the order in which they came up.
#[derive(Debug, Default)]
struct Matrix {
    rows: Vec<String>,
    columns: Vec<&'static str>,
    cells: BTreeMap<(usize, usize), Tally>,
}

impl Matrix {
    fn at(&mut self, row: String, column: &'static str) -> &mut Tally {
        fn index<T: PartialEq>(all: &mut Vec<T>, one: T) -> usize {
            all.iter().position(|x| *x == one).unwrap_or_else(|| {
                all.push(one);
                all.len() - 1
            })
        }
        let key = (index(&mut self.rows, row), index(&mut self.columns, column));
        self.cells.entry(key).or_default()
    }

    fn table(&self, corner: &str) -> Table {
        let columns = self.columns.iter().copied();
        let mut table = Table::new([corner].into_iter().chain(columns));
        for (r, row) in self.rows.iter().enumerate() {
            let cells = (0..self.columns.len())
                .map(|c| self.cells.get(&(r, c)).map(Tally::cell).unwrap_or_default());
            table.row([row.clone()].into_iter().chain(cells));
        }
        table
    }
}

/// What came of the cases.
#[derive(Debug, Default)]
struct Report {
    by_head: Matrix,
    by_layout: Matrix,
    total: Tally,
    /// Names and reasons.
    failures: Vec<(String, String)>,
}

impl Report {
    fn tally(&mut self, case: &Case, count: impl Fn(&mut Tally)) {
        let head = format!("{:>3} {}", case.head_dim(), case.dtype());
        count(self.by_head.at(head, case.mask()));
        count(self.by_layout.at(case.layout().into(), case.mask()));
        count(&mut self.total);
    }

    fn expect(&mut self, case: &Case, skipped: i64) {
        self.tally(case, |tally| tally.skipped += skipped);
    }

    fn add(&mut self, case: &Case, wrong: Option<String>) {
        self.tally(case, |tally| match wrong {
            None => tally.passed += 1,
            Some(_) => tally.failed += 1,
        });
        if let Some(reason) = wrong {
            self.failures.push((case.name(), reason));
        }
    }

    fn status(&self) -> Status {
        // A matrix of which nothing ran has shown nothing.
        Status::of_check(self.total.failed == 0 && self.total.passed > 0)
    }

    fn line(&self, device: &MlxDevice) -> VerifyLine {
        let Tally { passed, failed, .. } = self.total;
        let skipped = self.total.skipped();
        VerifyLine {
            device: device.kind().name(),
            cases: passed + failed + skipped,
            passed,
            failed,
            skipped,
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "passed/run by mask:\n")?;
        writeln!(f, "{}", self.by_head.table("head dim"))?;
        writeln!(f, "{}", self.by_layout.table("layout"))?;
        for (name, reason) in self.failures.iter().take(DESCRIBED) {
            writeln!(f, "FAILED {name}\n       {reason}")?;
        }
        match self.failures.len().saturating_sub(DESCRIBED) {
            0 if self.failures.is_empty() => Ok(()),
            0 => writeln!(f),
            more => writeln!(f, "... and {more} more\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_cases() -> (MlxDevice, Vec<Case>) {
        let device = MlxDevice::open(DeviceKind::Cpu).unwrap();
        let mut cases = verify::cases(Scope::Quick, &device);
        cases.truncate(3);
        (device, cases)
    }

    #[test]
    fn failures_are_counted_named_and_end_with_status_1() {
        let (device, cases) = some_cases();
        let mut report = Report::default();
        report.add(&cases[0], None);
        assert_eq!(report.status(), Status::Done);
        report.add(&cases[1], Some("out: far off".into()));
        report.expect(&cases[2], 1);
        assert_eq!(report.status(), Status::CheckFailed);
        assert_eq!(report.status().code(), 1);
        let line = report.line(&device);
        let counts = [line.cases, line.passed, line.failed, line.skipped];
        assert_eq!(counts, [3, 1, 1, 1]);
        let text = report.to_string();
        assert!(text.contains(&cases[1].name()) && text.contains("out: far off"));
        assert!(!text.contains(&cases[0].name()));
    }

    #[test]
    fn nothing_run_is_no_success() {
        let (_, cases) = some_cases();
        let mut report = Report::default();
        assert_eq!(report.status(), Status::CheckFailed);
        report.expect(&cases[0], 1);
        assert_eq!(report.status(), Status::CheckFailed);
    }
}
