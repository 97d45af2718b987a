//! Gemma 3 in float32, written from its definition for the tests: attention one score after another,
//! with the window as a comparison of positions. Products with weights are candle's; nothing else is.

use std::io::{Read, Seek};

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::model::{Config, Weights};

/// Rows of equal width, one after another.
struct Rows {
    cells: Vec<f32>,
    width: usize,
}

impl Rows {
    fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.cells.chunks_exact(self.width)
    }

    fn map(&self, width: usize, each: impl FnMut(&[f32]) -> Vec<f32>) -> Self {
        let cells = self.iter().flat_map(each).collect();
        Self { cells, width }
    }

    /// `x W^T`.
    fn times(&self, weight: &Tensor) -> Result<Self> {
        let x = Tensor::new(self.cells.as_slice(), &Device::Cpu)?;
        let x = x.reshape((self.cells.len() / self.width, self.width))?;
        let cells = x.matmul(&weight.t()?)?.flatten_all()?.to_vec1()?;
        Ok(Self {
            cells,
            width: weight.dim(0)?,
        })
    }

    fn add(&mut self, other: &Self) {
        for (a, b) in self.cells.iter_mut().zip(&other.cells) {
            *a += b;
        }
    }
}

/// A sum in 16 parts, so that it takes no age.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let by = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * by * w).collect()
}

/// A head's row turned to its position: halves are pairs.
fn turned(x: &[f32], position: usize, base: f32) -> Vec<f32> {
    let half = x.len() / 2;
    let mut out = vec![0.0; x.len()];
    for i in 0..half {
        let speed = f64::from(base).powf(-(i as f64) / half as f64);
        let (sin, cos) = (position as f64 * speed).sin_cos();
        let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
        out[i] = (a * cos - b * sin) as f32;
        out[i + half] = (a * sin + b * cos) as f32;
    }
    out
}

fn gelu(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// Attention of a token's heads over the tokens before it, `q` `[H, D]`, `k` and `v` rows of one head.
fn attend(q: &[f32], k: &Rows, v: &Rows, position: usize, window: Option<usize>) -> Vec<f32> {
    let dim = k.width;
    let scale = 1.0 / (dim as f32).sqrt();
    let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
    let row = |x: &'_ Rows, j: usize| x.cells[j * dim..][..dim].to_vec();
    let mut out = Vec::new();
    for q in q.chunks_exact(dim) {
        let scores: Vec<f32> = (first..=position)
            .map(|j| dot(q, &row(k, j)) * scale)
            .collect();
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f32 = weights.iter().sum();
        let mut mixed = vec![0.0; dim];
        for (j, weight) in (first..).zip(weights) {
            for (o, x) in mixed.iter_mut().zip(row(v, j)) {
                *o += weight / sum * x;
            }
        }
        out.extend(mixed);
    }
    out
}

/// The last hidden states of a text from its start, `[1, tokens, hidden]`. One head of K and V.
pub(crate) fn hidden<R: Read + Seek>(
    weights: &mut Weights<'_, R>,
    tokens: &[u32],
) -> Result<Tensor> {
    let c = Config::new(weights.content)?;
    assert_eq!(c.kv_heads, 1);
    let embeddings = weights.tensor("token_embd.weight")?;
    let ids = Tensor::new(tokens, &Device::Cpu)?;
    let cells: Vec<f32> = embeddings.index_select(&ids, 0)?.flatten_all()?.to_vec1()?;
    let root = (c.hidden as f32).sqrt();
    let mut x = Rows {
        cells: cells.iter().map(|x| x * root).collect(),
        width: c.hidden,
    };
    for n in 0..c.layers {
        let mut weight = |part: &str| weights.tensor(&format!("blk.{n}.{part}.weight"));
        let norm = |x: &Rows, w: Tensor| -> Result<Rows> {
            let w: Vec<f32> = w.to_vec1()?;
            Ok(x.map(x.width, |x| normed(x, &w, c.eps)))
        };
        let (window, base) = match (n + 1) % 6 {
            0 => (None, 1e6),
            _ => (Some(512), 1e4),
        };
        // Each head's row is normalised, then turned.
        let placed = |x: Rows, w: Tensor| -> Result<Rows> {
            let w: Vec<f32> = w.to_vec1()?;
            let mut position = 0;
            Ok(x.map(x.width, |x| {
                let heads = x.chunks_exact(c.head_dim);
                let row = heads.flat_map(|x| turned(&normed(x, &w, c.eps), position, base));
                let row = row.collect();
                position += 1;
                row
            }))
        };
        let h = norm(&x, weight("attn_norm")?)?;
        let q = placed(h.times(&weight("attn_q")?)?, weight("attn_q_norm")?)?;
        let k = placed(h.times(&weight("attn_k")?)?, weight("attn_k_norm")?)?;
        let v = h.times(&weight("attn_v")?)?;
        let mut position = 0;
        let y = q.map(q.width, |q| {
            position += 1;
            attend(q, &k, &v, position - 1, window)
        });
        let y = y.times(&weight("attn_output")?)?;
        x.add(&norm(&y, weight("post_attention_norm")?)?);
        let h = norm(&x, weight("ffn_norm")?)?;
        let mut gate = h.times(&weight("ffn_gate")?)?;
        let up = h.times(&weight("ffn_up")?)?;
        for (gate, up) in gate.cells.iter_mut().zip(&up.cells) {
            *gate = gelu(*gate) * up;
        }
        let y = gate.times(&weight("ffn_down")?)?;
        x.add(&norm(&y, weight("post_ffw_norm")?)?);
    }
    Ok(Tensor::new(x.cells.as_slice(), &Device::Cpu)?.reshape((1, tokens.len(), c.hidden))?)
}
