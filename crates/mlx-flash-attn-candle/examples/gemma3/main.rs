//! Gemma 3 270M from its GGUF: reads a long prompt and goes on with it.
//!
//! ```sh
//! scripts/fetch-models gemma3-270m
//! cd crates/mlx-flash-attn-candle
//! cargo run --release --example gemma3 -- "The capital of France is"
//! cargo run --release --example gemma3 -- --tokens 4096 --attention both
//! ```
#![allow(clippy::print_stdout)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod gpu_memory;
mod model;
mod tokenizer;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{BufReader, Write};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use candle_core::quantized::gguf_file::Content;
use clap::{Parser, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use peak_alloc::PeakAlloc;
use serde_json::json;

use attention::{Attention, Clock, keys_seen};
use common::Common;
use model::{Model, Weights};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// A text that is long, English and always the same.
const LONG_TEXT: &str = include_str!("../../../../LICENSE-APACHE");

/// Whose attention, or one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Whose {
    Ours,
    Candle,
    Both,
}

/// Gemma 3 270M: reads a prompt and goes on with it.
#[derive(Debug, Parser)]
struct Cli {
    /// What to go on with.
    #[arg(default_value = "The Analytical Engine weaves algebraical patterns just as")]
    prompt: String,
    /// Take this many tokens of a long text instead, from its start, over and over.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// How many tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 40)]
    generate: usize,
    /// Read the prompt this many tokens at a time; all at once when left out.
    #[arg(long, value_name = "N")]
    chunk: Option<std::num::NonZeroUsize>,
    /// Whose attention; `both` runs one after the other and compares them.
    #[arg(long, value_enum, default_value = "ours")]
    attention: Whose,
    /// Turn the quantized weights to f32 first.
    #[arg(long)]
    dequantize: bool,
    #[command(flatten)]
    common: Common,
}

/// One run.
struct Run {
    whose: Attention,
    prefill_s: f64,
    decode_s: f64,
    /// Of the prefill.
    clock: Clock,
    /// Bytes on the host at the peak of the prefill, above the weights and the empty cache.
    peak: usize,
    /// The same on a GPU, of the whole run.
    gpu_peak: Option<usize>,
    generated: Vec<u32>,
}

fn best(logits: &Tensor) -> Result<u32> {
    Ok(logits.flatten_all()?.argmax(0)?.to_scalar()?)
}

fn run(
    cli: &Cli,
    model: &mut Model,
    whose: Attention,
    prompt: &[u32],
    mut tell: impl FnMut(&[u32]) -> Result<()>,
) -> Result<Run> {
    model.reset();
    model.attention = whose;
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let bar = cli.common.bar(prompt.len(), "reading");
    let start = Instant::now();
    let mut hidden = None;
    for chunk in prompt.chunks(cli.chunk.map_or(prompt.len(), Into::into)) {
        hidden = Some(model.forward(chunk)?);
        bar.inc(chunk.len() as u64);
    }
    let hidden = hidden.context("the prompt is empty")?;
    let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?;
    let mut next = best(&model.logits(&last)?)?;
    let prefill_s = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let (peak, clock) = (MEMORY.peak_usage().saturating_sub(before), model.clock);

    let start = Instant::now();
    let mut generated = Vec::new();
    while generated.len() < cli.generate {
        generated.push(next);
        tell(&generated)?;
        if generated.len() < cli.generate {
            let hidden = model.forward(&[next])?;
            next = best(&model.logits(&hidden)?)?;
        }
    }
    let decode_s = start.elapsed().as_secs_f64();
    Ok(Run {
        whose,
        prefill_s,
        decode_s,
        clock,
        peak,
        gpu_peak: None,
        generated,
    })
}

/// A run as it is meant to be measured.
fn measured(
    cli: &Cli,
    model: &mut Model,
    whose: Attention,
    prompt: &[u32],
    tell: impl FnMut(&[u32]) -> Result<()>,
) -> Result<Run> {
    let device = model.device.clone();
    let mut gpu_peak = None;
    if !device.is_cpu() {
        // Kernels are compiled when they first run, and looking at memory takes time: neither is a part of
        // the times.
        let mut quiet = || run(cli, model, whose, prompt, |_| Ok(()));
        quiet()?;
        (_, gpu_peak) = gpu_memory::peak(&device, quiet)?;
    }
    let measured = run(cli, model, whose, prompt, tell)?;
    Ok(Run {
        gpu_peak,
        ..measured
    })
}

impl Run {
    /// The first token comes with the prefill.
    fn decode_rate(&self) -> f64 {
        self.generated.len().saturating_sub(1) as f64 / self.decode_s
    }
}

fn table(runs: &[Run], prompt: usize, seen: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let row = |name: &str, value: &dyn Fn(&Run) -> String| {
        std::iter::once(name.to_owned())
            .chain(runs.iter().map(value))
            .collect::<Vec<_>>()
    };
    table.set_header(row("attention", &|r| {
        format!("{:?}", r.whose).to_lowercase()
    }));
    table.add_rows([
        row("prefill, tokens a second", &|r| {
            format!("{:.0}", prompt as f64 / r.prefill_s)
        }),
        row("decode, tokens a second", &|r| {
            format!("{:.1}", r.decode_rate())
        }),
        row("attention in prefill, ms", &|r| {
            format!("{:.0}", r.clock.attention.as_secs_f64() * 1e3)
        }),
        row("of it making masks, ms", &|r| {
            format!("{:.0}", r.clock.masks.as_secs_f64() * 1e3)
        }),
        row("peak of prefill on the host, MB", &|r| {
            format!("{:.0}", r.peak as f64 / 1e6)
        }),
    ]);
    if runs.iter().any(|r| r.gpu_peak.is_some()) {
        table.add_row(row("peak on the GPU, MB", &|r| {
            r.gpu_peak
                .map_or_else(String::new, |peak| format!("{:.0}", peak as f64 / 1e6))
        }));
    }
    let mut keys = vec!["keys that a token of a window layer sees".to_owned()];
    keys.extend(seen.iter().map(ToString::to_string));
    table.add_row(keys);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let device = cli.common.device()?;
    let path = cli.common.file("gemma3-270m", "gemma-3-270m-q4_k_m.gguf")?;
    let spinner = cli.common.spinner("loading");
    let mut reader = BufReader::new(File::open(&path)?);
    let content = Content::read(&mut reader).with_context(|| path.display().to_string())?;
    let tokenizer = tokenizer::from_gguf(&content)?;
    let prompt = match cli.tokens {
        None => tokenizer::encode(&tokenizer, &cli.prompt)?,
        Some(n) => {
            let text = tokenizer::encode(&tokenizer, LONG_TEXT)?;
            text.iter().copied().cycle().take(n).collect()
        }
    };
    ensure!(!prompt.is_empty(), "--tokens: expected at least 1");
    let mut weights = Weights {
        content: &content,
        reader,
        device,
        dequantize: cli.dequantize,
    };
    let capacity = prompt.len() + cli.generate;
    let mut model = Model::new(&mut weights, Attention::Ours, capacity)?;
    spinner.finish_and_clear();

    let order: &[Attention] = match cli.attention {
        Whose::Ours => &[Attention::Ours],
        Whose::Candle => &[Attention::Candle],
        Whose::Both => &[Attention::Candle, Attention::Ours],
    };
    let text = |ids: &[u32]| tokenizer.decode(ids, true).map_err(|e| anyhow::anyhow!(e));
    if !cli.common.json && cli.tokens.is_none() {
        print!("{}", cli.prompt);
    }
    let mut runs = Vec::new();
    for (n, whose) in order.iter().enumerate() {
        let mut told = String::new();
        let tell = |ids: &[u32]| {
            if n == 0 && !cli.common.json {
                let all = text(ids)?;
                // A character may take several tokens.
                if let Some(more) = all.strip_prefix(&told).filter(|m| !m.ends_with('\u{fffd}')) {
                    print!("{more}");
                    std::io::stdout().flush()?;
                    told = all;
                }
            }
            Ok(())
        };
        runs.push(measured(&cli, &mut model, *whose, &prompt, tell)?);
    }
    let window = model.config.window;
    let seen = order
        .iter()
        .map(|whose| Ok(keys_seen(*whose, window + 88, window, &weights.device)?))
        .collect::<Result<Vec<_>>>()?;
    if cli.common.json {
        for (run, seen) in runs.iter().zip(seen) {
            let object = json!({
                "attention": format!("{:?}", run.whose).to_lowercase(),
                "device": format!("{:?}", cli.common.device).to_lowercase(),
                "prompt_tokens": prompt.len(),
                "prefill_tokens_s": prompt.len() as f64 / run.prefill_s,
                "decode_tokens_s": run.decode_rate(),
                "attention_ms": run.clock.attention.as_secs_f64() * 1e3,
                "masks_ms": run.clock.masks.as_secs_f64() * 1e3,
                "peak_bytes": run.peak,
                "gpu_peak_bytes": run.gpu_peak,
                "keys_seen_in_window": seen,
                "generated": run.generated,
                "text": text(&run.generated)?,
            });
            println!("{object}");
        }
        return Ok(());
    }
    println!(
        "\n\n{} tokens read, {} generated\n{}",
        prompt.len(),
        cli.generate,
        table(&runs, prompt.len(), &seen)
    );
    if let [candle, ours] = runs.as_slice() {
        let same = candle
            .generated
            .iter()
            .zip(&ours.generated)
            .take_while(|(a, b)| a == b)
            .count();
        println!(
            "{same} of {} generated tokens are the same",
            ours.generated.len()
        );
        let edge = window.saturating_sub(prompt.len());
        println!(
            "candle's mask is wrong by one key from token {window} on, and its single tokens see every \
             key: the same text is due for the first {} tokens",
            edge.min(cli.generate)
        );
    }
    Ok(())
}
