//! `bench`: how fast attention is on random inputs.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use indicatif::ProgressBar;
use mlx_flash_attn::attention::{Format, Problem, Role, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxBuffer, MlxDevice};
use serde_json::Value;

use crate::asked;
use crate::cli::BenchArgs;
use crate::files::Target;
use crate::json::{self, BenchLine};
use crate::measure::{self, Times};
use crate::output::{Results, Status};
use crate::plot::{self, Bar, Reference};
use crate::progress;
use crate::random::Random;
use crate::table::{Table, milliseconds, significant};

/// Runs take turns over at least this many bytes of operands, so that no cache holds the keys and
/// values of the next run, ...
const ROTATION_BYTES: usize = 256 << 20;
/// ... but over no more sets than this: inputs so small come from a cache in real use too.
const MAX_SETS: usize = 64;

pub(crate) fn execute(args: &BenchArgs, results: &mut Results) -> Result<Status> {
    let target = args
        .plot
        .as_ref()
        .map(|path| Target::new(path, &[]))
        .transpose()?;
    let device = args.device.open()?;
    let dtype = DType::from(args.dtype);
    // All shapes are checked before the first is measured.
    let problems = args
        .shape
        .iter()
        .map(|shape| Ok((*shape, problem(args, *shape, dtype)?)))
        .collect::<Result<Vec<_>>>()?;
    let peak = measured_peak(&device, dtype);
    let mut lines = Vec::new();
    for (shape, problem) in &problems {
        let bar = progress::bar(1000, &label(*shape), args.json);
        let times =
            time(&device, problem, &bar).with_context(|| format!("--shape {}", label(*shape)));
        bar.finish_and_clear();
        let line = line(args, &device, *shape, problem, &times?, peak);
        if args.json {
            results.json(&line)?;
        }
        lines.push(line);
    }
    let title = title(args, &device, dtype);
    if !args.json {
        results.line(&title)?;
        results.text(&table(&lines).to_string())?;
    }
    if let Some(target) = target {
        target.write(draw(&title, &lines, peak).as_bytes())?;
    }
    Ok(Status::Done)
}

/// TFLOP/s that the device reaches at best in `dtype`, if that has been measured.
fn measured_peak(device: &MlxDevice, dtype: DType) -> Option<f64> {
    device.measured_peak(dtype).map(|peak| peak / 1e12)
}

fn problem(args: &BenchArgs, shape: Shape, dtype: DType) -> Result<Problem> {
    let checked = || {
        let problem = asked::builder(args, shape, dtype)?.build()?;
        let needed = bytes(&problem).saturating_mul(sets(&problem));
        match available_memory() {
            Some(available) if needed > available => bail!(
                "needs {:.1} GB of memory, {:.1} GB are available",
                needed as f64 / 1e9,
                available as f64 / 1e9
            ),
            _ => Ok(problem),
        }
    };
    checked().with_context(|| format!("--shape {}", label(shape)))
}

/// Bytes of one set of operands.
fn bytes(problem: &Problem) -> usize {
    Role::ALL
        .into_iter()
        .filter_map(|role| problem.operand(role))
        .map(|spec| spec.elements.saturating_mul(spec.dtype.size_of()))
        .fold(0, usize::saturating_add)
}

fn sets(problem: &Problem) -> usize {
    ROTATION_BYTES
        .div_ceil(bytes(problem).max(1))
        .clamp(1, MAX_SETS)
}

/// Memory that can be had without swapping, where the system tells.
fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let kilobytes: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

fn time(device: &MlxDevice, problem: &Problem, bar: &ProgressBar) -> Result<Times> {
    let mut random = Random::new(0);
    let sets = (0..sets(problem))
        .map(|_| Set::new(device, problem, &mut random))
        .collect::<Result<Vec<_>>>()?;
    let mut encoder = device.command_encoder()?;
    // `n` runs from set `i` on, in seconds each.
    let mut many = |i: usize, n: usize| {
        let start = Instant::now();
        for set in sets.iter().cycle().skip(i).take(n) {
            ops::attention(&mut encoder, problem, &set.operands())?;
            encoder.memory_barrier();
        }
        let (begin, end) = encoder.commit_wait_with_gpu_time()?;
        // On the CPU the whole call counts, as a caller waits for it.
        let seconds = match device.kind() {
            DeviceKind::Cpu => start.elapsed().as_secs_f64(),
            _ => end - begin,
        };
        anyhow::Ok(seconds / n as f64)
    };
    let together = match device.kind() {
        DeviceKind::Cpu => 1,
        // The first builds the kernel.
        _ => many(0, 1).and_then(|_| many(0, 1)).map(per_command)?,
    };
    let once = |i: usize| many(i * together % sets.len().max(1), together);
    measure::measure(&measure::BENCH, sets.len(), once, |part| {
        bar.set_position((part * 1000.0) as u64);
    })
}

/// How many runs of so many seconds go in one command: a GPU that was idle starts slowly, which is
/// not to count, and a model gives it one after another too.
fn per_command(seconds: f64) -> usize {
    const COMMAND_SECONDS: f64 = 0.005;
    (COMMAND_SECONDS / seconds).clamp(1.0, 64.0) as usize
}

/// Operands of one run.
struct Set {
    q: MlxBuffer,
    k: MlxBuffer,
    v: MlxBuffer,
    out: MlxBuffer,
    mask: Option<MlxBuffer>,
    sinks: Option<MlxBuffer>,
    alibi_slopes: Option<MlxBuffer>,
    block_table: Option<MlxBuffer>,
    lse: Option<MlxBuffer>,
}

impl Set {
    fn new(device: &MlxDevice, problem: &Problem, random: &mut Random) -> Result<Self> {
        let mut optional = |role: Role| -> Result<Option<MlxBuffer>> {
            let Some(spec) = problem.operand(role) else {
                return Ok(None);
            };
            let (dtype, n) = (spec.dtype, spec.elements);
            let Some(bytes) = n.checked_mul(dtype.size_of()) else {
                bail!("{}: {n} elements overflow", role.name())
            };
            let mut buffer = device.alloc_buffer(bytes, dtype, vec![n])?;
            match role {
                Role::Output | Role::Lse => {}
                Role::AlibiSlopes => {
                    let slopes = buffer.as_mut_slice::<f32>()?;
                    for (h, slope) in (1..).zip(slopes) {
                        *slope = (-8.0 * h as f32 / n as f32).exp2();
                    }
                }
                Role::BlockTable => shuffle(buffer.as_mut_slice::<i32>()?, random),
                Role::Key if dtype == DType::U8 => {
                    fill_blocks(&mut buffer, problem.key_format(), random)?
                }
                Role::Value if dtype == DType::U8 => {
                    fill_blocks(&mut buffer, problem.value_format(), random)?
                }
                _ => fill(&mut buffer, random)?,
            }
            Ok(Some(buffer))
        };
        let (mask, sinks) = (optional(Role::Mask)?, optional(Role::Sinks)?);
        let (alibi_slopes, lse) = (optional(Role::AlibiSlopes)?, optional(Role::Lse)?);
        let block_table = optional(Role::BlockTable)?;
        let mut operand = |role: Role| {
            optional(role)?.ok_or_else(|| anyhow::anyhow!("{} has no size", role.name()))
        };
        Ok(Self {
            q: operand(Role::Query)?,
            k: operand(Role::Key)?,
            v: operand(Role::Value)?,
            out: operand(Role::Output)?,
            mask,
            sinks,
            alibi_slopes,
            block_table,
            lse,
        })
    }

    fn operands(&self) -> Operands<'_> {
        Operands {
            mask: self.mask.as_ref(),
            sinks: self.sinks.as_ref(),
            alibi_slopes: self.alibi_slopes.as_ref(),
            block_table: self.block_table.as_ref(),
            lse: self.lse.as_ref(),
            ..Operands::new(&self.q, &self.k, &self.v, &self.out)
        }
    }
}

/// Pages in random order: the pool has one for each entry.
fn shuffle(table: &mut [i32], random: &mut Random) {
    for (entry, page) in table.iter_mut().zip(0..) {
        *entry = page;
    }
    for at in (1..table.len()).rev() {
        table.swap(at, random.below(at + 1));
    }
}

/// Blocks of random elements, of variance 1 or near it.
fn fill_blocks(buffer: &mut MlxBuffer, format: Format, random: &mut Random) -> Result<()> {
    let bytes = buffer.as_mut_slice::<u8>()?;
    bytes.fill_with(|| random.below(256) as u8);
    let scale = if format == Format::Q4_0 { 0.22 } else { 0.0136 };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    }
    Ok(())
}

fn fill(buffer: &mut MlxBuffer, random: &mut Random) -> Result<()> {
    match buffer.dtype() {
        DType::BF16 => {
            let values = buffer.as_mut_slice::<bf16>()?;
            values.fill_with(|| bf16::from_f32(random.normal()));
        }
        DType::F16 => {
            let values = buffer.as_mut_slice::<f16>()?;
            values.fill_with(|| f16::from_f32(random.normal()));
        }
        DType::F32 => buffer.as_mut_slice::<f32>()?.fill_with(|| random.normal()),
        DType::U8 => {
            let values = buffer.as_mut_slice::<u8>()?;
            values.fill_with(|| u8::from(random.normal() > 0.0));
        }
        other => bail!("no random elements of {other}"),
    }
    Ok(())
}

fn line(
    args: &BenchArgs,
    device: &MlxDevice,
    shape: Shape,
    problem: &Problem,
    times: &Times,
    peak: Option<f64>,
) -> BenchLine {
    let tflops = problem.flops() / (times.median * 1e-3) / 1e12;
    BenchLine {
        device: device.kind().name(),
        dtype: problem.dtype().name(),
        shape: json::sizes(shape),
        causal: args.score.causal,
        window: args.score.window,
        ms_median: times.median,
        ms_min: times.min,
        ms_max: times.max,
        tflops,
        peak_tflops: peak,
        share: peak.map(|peak| tflops / peak),
        asked: asked::besides(args),
    }
}

fn label(shape: Shape) -> String {
    json::sizes(shape).map(|n| n.to_string()).join(",")
}

fn title(args: &BenchArgs, device: &MlxDevice, dtype: DType) -> String {
    let mut title = format!("Attention on {}, {dtype}", device.name());
    if args.score.causal {
        title.push_str(", causal");
    }
    if let Some(window) = args.score.window {
        title.push_str(&format!(", window {window}"));
    }
    for (name, value) in asked::besides(args) {
        title.push_str(", ");
        title.push_str(&name.replace('_', " "));
        match value {
            Value::Bool(_) => {}
            Value::String(text) => title.push_str(&format!(" {text}")),
            other => title.push_str(&format!(" {other}")),
        }
    }
    title
}

fn joined(line: &BenchLine) -> String {
    line.shape.map(|n| n.to_string()).join(",")
}

fn table(lines: &[BenchLine]) -> Table {
    let with_share = lines.iter().any(|l| l.share.is_some());
    let mut header = vec!["B,H,Hkv,Sq,Sk,D", "median", "min", "max", "TFLOP/s"];
    header.extend(with_share.then_some("of peak"));
    let mut table = Table::new(header);
    for line in lines {
        let mut row = vec![
            joined(line),
            milliseconds(line.ms_median),
            milliseconds(line.ms_min),
            milliseconds(line.ms_max),
            significant(line.tflops),
        ];
        row.extend(line.share.map(|share| format!("{:.1} %", share * 100.0)));
        table.row(row);
    }
    table
}

fn draw(title: &str, lines: &[BenchLine], peak: Option<f64>) -> String {
    let bars: Vec<Bar> = lines
        .iter()
        .map(|line| Bar {
            label: joined(line),
            value: line.tflops,
            low: line.tflops * line.ms_median / line.ms_max,
            high: line.tflops * line.ms_median / line.ms_min,
            note: format!(
                "{} in {}",
                significant(line.tflops),
                milliseconds(line.ms_median)
            ),
        })
        .collect();
    let peak = peak.map(|value| Reference {
        label: format!("measured peak {}", significant(value)),
        value,
    });
    let axis = "TFLOP/s, median; line: slowest to fastest run";
    plot::bars(title, "B,H,Hkv,Sq,Sk,D", axis, &bars, peak.as_ref())
}
