//! The CPU device of `mlx-flash-attn` against other implementations of attention: the same inputs,
//! one run, all taking turns. `scripts/cpu-bench` builds it, installs the peers and starts it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod compare;
mod findings;
mod forms;
mod inputs;
mod ours;
#[allow(dead_code)]
#[path = "../../mlx-flash-attn-cli/src/plot.rs"]
mod plot;
mod protocol;
mod race;
mod report;
mod rows;
#[allow(dead_code)]
#[path = "../../mlx-flash-attn-cli/src/svg.rs"]
mod svg;
#[allow(dead_code)]
#[path = "../../mlx-flash-attn-cli/src/table.rs"]
mod table;
mod worker;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Parser;
use mlx_flash_attn::{CpuOptions, DType, MlxDevice};

use compare::Comparison;
use findings::{Findings, Line, Run};
use rows::{ROWS, Row};
use worker::Worker;

/// The peers, as `--without` names them.
const PEERS: [&str; 4] = ["torch", "ort", "ggml", "candle"];

/// Compare attention on this machine's processors: mlx-flash-attn against ONNX Runtime, torch, ggml
/// and candle, on the same inputs, taking turns.
#[derive(Debug, Parser)]
struct Options {
    /// Rows of the table, by number
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = row,
          default_value = "1,2,3,4,5,6,7")]
    rows: Vec<Row>,
    /// Element types
    #[arg(long, value_name = "TYPE,..", value_delimiter = ',', value_parser = dtype,
          default_value = "bf16,f16,f32")]
    dtypes: Vec<DType>,
    /// How often each takes its turn
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,
    /// Threads of each; all processors when not given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Peers to leave out
    #[arg(long, value_name = "PEER,..", value_delimiter = ',', value_parser = PEERS)]
    without: Vec<String>,
    /// Peers' variants that take longer for one run are left out
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    limit: f64,
    /// Compare our own forms of asking with each other, instead of the rows with the peers
    #[arg(long)]
    forms: bool,
    /// Write all numbers, a JSON object a line
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw GFLOP/s of each peer by row
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Python that has torch, onnxruntime and ggml
    #[arg(long, value_name = "FILE", default_value = "python3")]
    python: PathBuf,
    /// The program `candle-worker`
    #[arg(long, value_name = "FILE", default_value = "candle-worker")]
    candle_worker: PathBuf,
}

fn row(number: &str) -> Result<Row> {
    match ROWS.iter().find(|row| row.number.to_string() == number) {
        Some(row) => Ok(*row),
        None => bail!("expected 1 to {}", ROWS.len()),
    }
}

fn dtype(name: &str) -> Result<DType> {
    match [DType::BF16, DType::F16, DType::F32]
        .into_iter()
        .find(|dtype| dtype.name() == name)
    {
        Some(dtype) => Ok(dtype),
        None => bail!("expected bf16, f16 or f32"),
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let threads = match options.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?.get(),
    };
    let device = MlxDevice::cpu(CpuOptions {
        threads: Some(threads),
        ..CpuOptions::default()
    })?;
    let peaks: Vec<(String, f64)> = options
        .dtypes
        .iter()
        .filter_map(|dtype| {
            let peak = device.measured_peak(*dtype)?;
            Some((dtype.name().to_owned(), peak / 1e9))
        })
        .collect();
    let mut findings = Findings::default();
    let mut workers = match options.forms {
        true => Vec::new(),
        false => start(&options, threads, &mut findings),
    };
    let run = Run {
        machine: machine(),
        device: device.name(),
        threads,
        rounds: options.rounds,
        versions: workers
            .iter()
            .map(|w| (w.name.clone(), w.version.clone()))
            .collect(),
        peaks: peaks.clone(),
    };
    let title = title(&run);
    println!("{title}");
    for (dtype, peak) in &run.peaks {
        println!("measured peak, {dtype}: {peak:.0} GFLOP/s");
    }
    findings.0.insert(0, Line::Run(run));
    if options.forms {
        let progress = |what: &str| eprintln!("{what} ...");
        let forms = forms::run(&device, &options.dtypes, threads, options.rounds, progress)?;
        print!("\n{}", report::forms_table(&forms));
        findings.0.extend(forms.into_iter().map(Line::Form));
    } else {
        let comparison = Comparison {
            device: &device,
            peaks: &peaks,
            dtypes: &options.dtypes,
            rounds: options.rounds,
            limit_s: options.limit,
        };
        let (times, verdicts) = comparison.run(&options.rows, &mut workers, &mut findings)?;
        if let Some(path) = &options.svg {
            write(path, &report::picture(&device.name(), &times, &peaks))?;
        }
        findings.0.extend(times.into_iter().map(Line::Time));
        findings.0.extend(verdicts.into_iter().map(Line::Bar));
    }
    if let Some(path) = &options.json {
        let lines = findings.0.iter().map(serde_json::to_string);
        let text: String = lines
            .map(|line| line.map(|line| line + "\n"))
            .collect::<Result<_, _>>()?;
        write(path, &text)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Starts the peers that are there.
fn start(options: &Options, threads: usize, findings: &mut Findings) -> Vec<Worker> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/worker.py");
    let mut workers = Vec::new();
    for peer in PEERS {
        if options.without.iter().any(|name| name == peer) {
            continue;
        }
        let (program, arguments) = match peer {
            "candle" => (&options.candle_worker, vec![]),
            _ => (
                &options.python,
                vec![script.into(), peer.into(), threads.to_string()],
            ),
        };
        match Worker::start(peer, program, &arguments, threads) {
            Ok(worker) => workers.push(worker),
            Err(error) => findings.skip(peer, format!("{error:#}")),
        }
    }
    workers
}

fn title(run: &Run) -> String {
    let versions: Vec<String> = run
        .versions
        .iter()
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    let peers = match versions.is_empty() {
        true => String::new(),
        false => format!("; peers: {}", versions.join(", ")),
    };
    format!("{} on {}{peers}", run.device, run.machine)
}

/// The processor's name, where the system tells.
fn machine() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name)
        .to_owned()
}
