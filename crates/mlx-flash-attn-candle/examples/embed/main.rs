//! Sentence embeddings with all-mpnet-base-v2: batched, padded, and compared by cosine.
//!
//! ```sh
//! scripts/fetch-models all-mpnet-base-v2
//! cd crates/mlx-flash-attn-candle
//! cargo run --release --example embed
//! cargo run --release --example embed -- "A first sentence." "A second one."
//! ```
#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod model;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Parser;
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::json;
use tokenizers::{Tokenizer, TruncationParams};

use common::Common;
use model::Model;

/// Tokens that the model was trained to take.
const LONGEST: usize = 384;

const SENTENCES: [&str; 7] = [
    "The Analytical Engine weaves algebraical patterns just as the Jacquard loom weaves flowers and leaves.",
    "A machine could work on formulas the way a loom works on cloth.",
    "The cat sleeps on the warm stove.",
    "A kitten naps beside the fire.",
    "Rain is expected in the north tomorrow, with strong winds along the coast and snow on higher ground, \
     before it clears from the west in the evening and a calm, cold and mostly sunny weekend follows.",
    "Storms will reach the shore tomorrow.",
    "Yes.",
];

/// Sentence embeddings with all-mpnet-base-v2, and their cosines.
#[derive(Debug, Parser)]
struct Cli {
    /// What to embed; some sentences when left out.
    sentences: Vec<String>,
    /// Sentences at a time.
    #[arg(long, value_name = "N", default_value = "32")]
    batch: NonZeroUsize,
    #[command(flatten)]
    common: Common,
}

fn tokenizer(path: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_file(path).map_err(|e| anyhow!(e))?;
    // The file pads everything to one length.
    tokenizer.with_padding(None);
    let truncation = TruncationParams {
        max_length: LONGEST,
        ..TruncationParams::default()
    };
    tokenizer
        .with_truncation(Some(truncation))
        .map_err(|e| anyhow!(e))?;
    Ok(tokenizer)
}

fn encode(tokenizer: &Tokenizer, sentences: &[String]) -> Result<Vec<Vec<u32>>> {
    let ids = |s: &String| {
        let encoding = tokenizer.encode(s.as_str(), true).map_err(|e| anyhow!(e))?;
        Ok(encoding.get_ids().to_vec())
    };
    sentences.iter().map(ids).collect()
}

fn table(sentences: &[String], embeddings: &[Vec<f32>]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let numbers = (1..=sentences.len()).map(|n| n.to_string());
    table.set_header(["cosine".to_owned()].into_iter().chain(numbers));
    for (n, (sentence, a)) in sentences.iter().zip(embeddings).enumerate() {
        let short: String = sentence.chars().take(40).collect();
        let cosines = embeddings.iter().map(|b| {
            let cosine: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
            Cell::new(format!("{cosine:.3}")).set_alignment(CellAlignment::Right)
        });
        table.add_row(
            [Cell::new(format!("{} {short}", n + 1))]
                .into_iter()
                .chain(cosines),
        );
    }
    table
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let device = cli.common.device()?;
    let file = |name| cli.common.file("all-mpnet-base-v2", name);
    let spinner = cli.common.spinner("loading");
    let tokenizer = tokenizer(&file("tokenizer.json")?)?;
    let model = Model::load(&file("config.json")?, &file("model.safetensors")?, &device)?;
    spinner.finish_and_clear();
    let sentences = match cli.sentences.is_empty() {
        true => SENTENCES.map(str::to_owned).to_vec(),
        false => cli.sentences.clone(),
    };
    let texts = encode(&tokenizer, &sentences)?;
    let tokens: usize = texts.iter().map(Vec::len).sum();
    if !device.is_cpu() {
        // Kernels are compiled when they first run, which is no part of the time.
        for batch in texts.chunks(cli.batch.into()) {
            model.embed(batch)?;
        }
        device.synchronize()?;
    }
    let bar = cli.common.bar(texts.len(), "embedding");
    let start = Instant::now();
    let mut embeddings: Vec<Vec<f32>> = Vec::new();
    for batch in texts.chunks(cli.batch.into()) {
        embeddings.extend(model.embed(batch)?.to_vec2()?);
        bar.inc(batch.len() as u64);
    }
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    if cli.common.json {
        for (sentence, embedding) in sentences.iter().zip(&embeddings) {
            println!(
                "{}",
                json!({ "sentence": sentence, "embedding": embedding })
            );
        }
        return Ok(());
    }
    println!("{}", table(&sentences, &embeddings));
    println!(
        "{} sentences, {tokens} tokens, {:.0} tokens a second",
        sentences.len(),
        tokens as f64 / seconds
    );
    Ok(())
}
