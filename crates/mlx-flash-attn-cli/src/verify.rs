//! `verify`: the contract as a matrix of checks.
use anyhow::Result;

use crate::cli::VerifyArgs;
use crate::json::VerifyLine;
use crate::output::{Results, Status};

pub(crate) fn execute(args: &VerifyArgs, results: &mut Results) -> Result<Status> {
    let device = args.device.open()?;
    let _ = args.quick;
    results.json(&VerifyLine {
        device: device.kind().name(),
        cases: 0,
        passed: 0,
        failed: 0,
        skipped: 0,
    })?;
    Ok(Status::Done)
}
