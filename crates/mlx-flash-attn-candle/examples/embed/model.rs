//! MPNet, which candle has no model of: a BERT whose scores carry a learned bias for each head and
//! distance, one table for all layers.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Module, Tensor, safetensors};
use candle_nn::{Embedding, LayerNorm, Linear, VarBuilder, embedding, layer_norm, linear};
use mlx_flash_attn_candle::{Layout, Mask, Options, attention};
use serde_json::Value;

#[derive(Debug)]
struct Layer {
    qkv: [Linear; 3],
    out: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

/// An encoder of sentences.
#[derive(Debug)]
pub(crate) struct Model {
    words: Embedding,
    positions: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
    /// Rows for distances, columns for heads.
    distances: Tensor,
    heads: usize,
    padding: u32,
    device: Device,
}

/// The bias table's row for a key `relative` places after the query: half of the rows serve each
/// direction; of a half, the first rows hold one distance each and the rest widen up to 128.
fn bucket(relative: i64, buckets: u32) -> u32 {
    let half = buckets / 2;
    let exact = half / 2;
    let distance = relative.unsigned_abs() as f64;
    let wide = (distance / f64::from(exact)).ln() / (128.0 / f64::from(exact)).ln();
    let row = match distance < f64::from(exact) {
        true => distance as u32,
        // A hair more than the quotient, which falls short of whole numbers by rounding.
        false => (exact + (wide * f64::from(half - exact) + 1e-9) as u32).min(half - 1),
    };
    row + if relative > 0 { half } else { 0 }
}

impl Model {
    pub(crate) fn load(config: &Path, weights: &Path, device: &Device) -> Result<Self> {
        let config: Value = serde_json::from_str(&std::fs::read_to_string(config)?)?;
        let get = |key: &str| {
            let value = config.get(key).and_then(Value::as_u64);
            value
                .map(|v| v as usize)
                .with_context(|| format!("config.json has no {key}"))
        };
        let (hidden, inner) = (get("hidden_size")?, get("intermediate_size")?);
        let heads = get("num_attention_heads")?;
        let eps = config.get("layer_norm_eps").and_then(Value::as_f64);
        let eps = eps.context("config.json has no layer_norm_eps")?;
        let tensors = safetensors::load(weights, device)?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, device);
        let norm = |vb: VarBuilder<'_>| layer_norm(hidden, eps, vb);
        let layers = (0..get("num_hidden_layers")?).map(|n| {
            let vb = vb.pp(format!("encoder.layer.{n}"));
            let attn = vb.pp("attention.attn");
            Ok(Layer {
                qkv: [
                    linear(hidden, hidden, attn.pp("q"))?,
                    linear(hidden, hidden, attn.pp("k"))?,
                    linear(hidden, hidden, attn.pp("v"))?,
                ],
                out: linear(hidden, hidden, attn.pp("o"))?,
                attention_norm: norm(vb.pp("attention.LayerNorm"))?,
                up: linear(hidden, inner, vb.pp("intermediate.dense"))?,
                down: linear(inner, hidden, vb.pp("output.dense"))?,
                norm: norm(vb.pp("output.LayerNorm"))?,
            })
        });
        let e = vb.pp("embeddings");
        let (words, positions) = (get("vocab_size")?, get("max_position_embeddings")?);
        Ok(Self {
            words: embedding(words, hidden, e.pp("word_embeddings"))?,
            positions: embedding(positions, hidden, e.pp("position_embeddings"))?,
            norm: norm(e.pp("LayerNorm"))?,
            layers: layers.collect::<candle_core::Result<_>>()?,
            distances: vb.get(
                (get("relative_attention_num_buckets")?, heads),
                "encoder.relative_attention_bias.weight",
            )?,
            heads,
            padding: get("pad_token_id")? as u32,
            device: device.clone(),
        })
    }

    /// The bias between positions, `[1, H, L, L]`: one plane for each head, for all of a batch.
    fn bias(&self, len: usize) -> Result<Tensor> {
        let buckets = self.distances.dim(0)? as u32;
        let rows: Vec<u32> = (0..len * len)
            .map(|n| bucket((n % len) as i64 - (n / len) as i64, buckets))
            .collect();
        let bias = self
            .distances
            .index_select(&Tensor::new(rows, &self.device)?, 0)?;
        let bias = bias.t()?.contiguous()?;
        Ok(bias.reshape((1, self.heads, len, len))?)
    }

    /// Embeddings of length 1, `[texts, hidden]`, of texts as token ids: padded to the longest.
    pub(crate) fn embed(&self, texts: &[Vec<u32>]) -> Result<Tensor> {
        let (batch, len) = (texts.len(), texts.iter().map(Vec::len).max().unwrap_or(0));
        let each = |f: &dyn Fn(&[u32], usize) -> u32| {
            let cells: Vec<u32> = texts
                .iter()
                .flat_map(|t| (0..len).map(|i| f(t, i)))
                .collect();
            Tensor::from_vec(cells, (batch, len), &self.device)
        };
        let ids = each(&|text, i| text.get(i).copied().unwrap_or(self.padding))?;
        // Positions count from the padding's, which is that of every padding token.
        let places = each(&|text, i| self.padding + if i < text.len() { 1 + i as u32 } else { 0 })?;
        let here = each(&|text, i| u32::from(i < text.len()))?;

        // Every layer adds the same to its scores: the bias `[1, H, L, L]`, and `-inf` for padding,
        // `[B, 1, 1, L]`. Without padding the bias alone serves the whole batch as it is.
        let mut mask = self.bias(len)?;
        if texts.iter().any(|text| text.len() < len) {
            let (zero, hidden) = (here.zeros_like()?.to_dtype(DType::F32)?, f32::NEG_INFINITY);
            let hidden = Tensor::full(hidden, (batch, len), &self.device)?;
            let padding = here
                .where_cond(&zero, &hidden)?
                .reshape((batch, 1, 1, len))?;
            mask = mask.broadcast_add(&padding)?;
        }
        let options = Options {
            layout: Layout::SeqMajor,
            mask: Some(Mask::Add(mask)),
            ..Options::default()
        };

        let x = (self.words.forward(&ids)? + self.positions.forward(&places)?)?;
        let mut x = self.norm.forward(&x)?;
        for layer in &self.layers {
            // `[B, L, H, D]` as the projections leave it: nothing is transposed or copied.
            let [q, k, v] = layer.qkv.each_ref().map(|projection| {
                projection
                    .forward(&x)?
                    .reshape((batch, len, self.heads, ()))
            });
            let y = attention(&q?, &k?, &v?, &options)?.flatten_from(D::Minus2)?;
            x = layer
                .attention_norm
                .forward(&(x + layer.out.forward(&y)?)?)?;
            let y = layer.down.forward(&layer.up.forward(&x)?.gelu_erf()?)?;
            x = layer.norm.forward(&(x + y)?)?;
        }
        let here = here.to_dtype(DType::F32)?.unsqueeze(2)?;
        let mean = x
            .broadcast_mul(&here)?
            .sum(1)?
            .broadcast_div(&here.sum(1)?)?;
        Ok(mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)?)
    }
}
