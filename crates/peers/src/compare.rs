//! The rows of the table: inputs for all, a race, a check of every result.

use std::path::Path;

use anyhow::{Context, Result};
use mlx_flash_attn::{DType, MlxDevice};
use tempfile::TempDir;

use crate::findings::{Findings, Time, Verdict};
use crate::inputs::{self, Operands};
use crate::ours::Ours;
use crate::protocol::Load;
use crate::race::{self, Contestant, Runner, median};
use crate::report;
use crate::rows::{self, Row};
use crate::worker::Worker;

/// How rows are compared.
#[derive(Debug)]
pub(crate) struct Comparison<'a> {
    pub(crate) device: &'a MlxDevice,
    /// GFLOP/s that the device reaches at best, by dtype.
    pub(crate) peaks: &'a [(String, f64)],
    pub(crate) dtypes: &'a [DType],
    pub(crate) rounds: usize,
    pub(crate) limit_s: f64,
}

impl Comparison<'_> {
    /// Times and prints all rows.
    pub(crate) fn run(
        &self,
        rows: &[Row],
        workers: &mut [Worker],
        findings: &mut Findings,
    ) -> Result<(Vec<Time>, Vec<Verdict>)> {
        let folder = tempfile::tempdir()?;
        let (mut times, mut verdicts) = (Vec::new(), Vec::new());
        for row in rows {
            println!("\nrow {}: {}", row.number, row.label());
            let of_row = self.row(row, workers, findings, &folder)?;
            print!("{}", report::times_table(&of_row));
            verdicts.extend(report::verdicts(row, &of_row));
            times.extend(of_row);
        }
        print!("\n{}", report::verdicts_table(&verdicts));
        let expected = rows.len() * report::VERDICTS;
        println!(
            "\n{}",
            report::summary(&verdicts, expected, findings.skipped())
        );
        Ok((times, verdicts))
    }

    fn row(
        &self,
        row: &Row,
        workers: &mut [Worker],
        findings: &mut Findings,
        folder: &TempDir,
    ) -> Result<Vec<Time>> {
        let operands = inputs::operands(row.shape, self.dtypes);
        let path = folder.path().join("inputs.safetensors");
        inputs::write(&path, row, &operands)?;
        let mut contestants = operands
            .iter()
            .map(|operands| self.ours(row, operands))
            .collect::<Result<Vec<_>>>()?;
        for (index, worker) in workers.iter_mut().enumerate() {
            contestants.extend(self.peer(row, &path, index, worker, findings));
        }
        let raced = race::run(&mut contestants, workers, self.rounds);
        let mut times = Vec::new();
        for (contestant, raced) in contestants.iter().zip(raced) {
            let what = format!("row {}, {}", row.number, contestant.name());
            let ms = match raced {
                Ok(ms) => ms,
                Err(error) => {
                    findings.skip(what, format!("{error:#}"));
                    continue;
                }
            };
            let output = output(contestant, workers, &folder.path().join("output"));
            let error = output.and_then(|output| error(row, contestant, &operands, &output));
            let error = error.map_err(|why| {
                findings.skip(
                    what,
                    format!("timed, but its result is unknown, so it does not count: {why:#}"),
                );
            });
            times.push(self.time(row, contestant, &ms, error.ok())?);
        }
        Ok(times)
    }

    fn ours(&self, row: &Row, operands: &Operands) -> Result<Contestant> {
        let ours = Ours::new(self.device, row.problem(operands.dtype)?, operands)?;
        Ok(Contestant {
            peer: "ours".into(),
            variant: String::new(),
            dtype: operands.dtype.name().into(),
            runner: Runner::Ours(Box::new(ours)),
        })
    }

    /// What a worker can run of a row.
    fn peer(
        &self,
        row: &Row,
        path: &Path,
        index: usize,
        worker: &mut Worker,
        findings: &mut Findings,
    ) -> Vec<Contestant> {
        let load = Load {
            path: path.to_owned(),
            shape: rows::sizes(row.shape),
            causal: row.causal,
            window: row.window,
            dtypes: self.dtypes.iter().map(|d| d.name().into()).collect(),
            limit_s: self.limit_s,
        };
        let what = format!("row {}, {}", row.number, worker.name);
        let reply = match worker.load(load) {
            Ok(reply) => reply,
            Err(error) => {
                findings.skip(what, format!("{error:#}"));
                return Vec::new();
            }
        };
        for skipped in reply.skipped {
            let (of, why) = skipped.split_once(": ").unwrap_or((&skipped, "no reason"));
            findings.skip(format!("{what} {of}"), why);
        }
        let variants = reply.variants.into_iter().enumerate();
        variants
            .map(|(variant, v)| Contestant {
                peer: worker.name.clone(),
                variant: v.name,
                dtype: v.dtype,
                runner: Runner::Peer {
                    worker: index,
                    variant,
                },
            })
            .collect()
    }

    fn time(
        &self,
        row: &Row,
        contestant: &Contestant,
        ms: &[f64],
        relative_error: Option<f64>,
    ) -> Result<Time> {
        // The pairs that count are the visible ones, whatever a peer computes.
        let flops = row.problem(DType::F32)?.flops();
        let ms_median = median(ms.to_vec());
        let gflops = flops / ms_median / 1e6;
        let peak = self.peaks.iter().find(|(of, _)| *of == contestant.dtype);
        Ok(Time {
            row: row.number,
            shape: row.label(),
            peer: contestant.peer.clone(),
            variant: contestant.variant.clone(),
            dtype: contestant.dtype.clone(),
            ms_median,
            ms_min: ms.iter().copied().fold(f64::INFINITY, f64::min),
            ms_max: ms.iter().copied().fold(0.0, f64::max),
            gflops,
            share: peak.map(|(_, peak)| gflops / peak),
            relative_error,
        })
    }
}

/// What a contestant computed last.
fn output(contestant: &Contestant, workers: &mut [Worker], path: &Path) -> Result<Vec<f32>> {
    match &contestant.runner {
        Runner::Ours(ours) => ours.output(),
        Runner::Peer { worker, variant } => workers
            .get_mut(*worker)
            .context("there is no such worker")?
            .output(*variant, path),
    }
}

fn error(row: &Row, contestant: &Contestant, operands: &[Operands], output: &[f32]) -> Result<f64> {
    let same = |o: &&Operands| o.dtype.name() == contestant.dtype;
    let operands = operands
        .iter()
        .find(same)
        .context("no inputs in its dtype")?;
    inputs::relative_error(row, operands, output)
}
