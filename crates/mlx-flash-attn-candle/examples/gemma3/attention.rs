//! The one line that differs: attention as candle's own model does it, or through this library.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use clap::ValueEnum;
use mlx_flash_attn_candle::{Options, QueryOffset, attention};

/// Whose attention a model uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attention {
    /// This library's.
    Ours,
    /// What `candle_transformers::models::quantized_gemma3` does.
    Candle,
    /// The same, each cell of its result off by a rounding or by nothing.
    #[cfg(test)]
    Nudged,
}

/// Time spent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Clock {
    /// In attention, masks included.
    pub(crate) attention: Duration,
    /// Of it, in making masks.
    pub(crate) masks: Duration,
}

impl Attention {
    /// `q` `[1, H, qL, D]`, `k` and `v` `[1, Hkv, kL, D]`; the last query sees the last key.
    pub(crate) fn run(
        self,
        [q, k, v]: [&Tensor; 3],
        window: Option<usize>,
        clock: &mut Clock,
    ) -> Result<Tensor> {
        // What is still running on a GPU is not attention.
        let device = q.device();
        device.synchronize()?;
        let start = Instant::now();
        let out = match self {
            Self::Ours => attention(
                q,
                k,
                v,
                &Options {
                    causal: true,
                    offset: Some(QueryOffset::BottomRight),
                    window,
                    ..Options::default()
                },
            )?,
            Self::Candle => {
                let mask = match q.dim(2)? {
                    1 => None,
                    rows => Some(candles_mask(rows, k.dim(2)? - rows, window, device)?),
                };
                device.synchronize()?;
                clock.masks += start.elapsed();
                candles([q, k, v], mask.as_ref())?
            }
            #[cfg(test)]
            Self::Nudged => return nudged(&Self::Candle.run([q, k, v], window, clock)?),
        };
        device.synchronize()?;
        clock.attention += start.elapsed();
        Ok(out)
    }
}

/// The mask of candle's model. In a window of `w` it leaves `w + 1` keys visible, `j + w < i` being
/// false for `j = i - w`. candle has none for a chunk after others: there it fails, as it does here.
fn candles_mask(
    rows: usize,
    before: usize,
    window: Option<usize>,
    device: &Device,
) -> Result<Tensor> {
    if before > 0 {
        candle_core::bail!("candle's model takes a prompt in one piece: leave --chunk out")
    }
    let hidden = |i: usize, j: usize| i < j || window.is_some_and(|w| j + w < i);
    let cells: Vec<u32> = (0..rows)
        .flat_map(|i| (0..rows).map(move |j| u32::from(!hidden(i, j))))
        .collect();
    Tensor::from_slice(&cells, (rows, rows), device)
}

/// Attention of candle's model: K and V repeated for each head, scores in memory. One token alone sees
/// every key of the cache, whatever the window.
fn candles([q, k, v]: [&Tensor; 3], mask: Option<&Tensor>) -> Result<Tensor> {
    let repeats = q.dim(1)? / k.dim(1)?;
    let repeated = |x: &Tensor| -> Result<Tensor> {
        let (b, h, len, d) = x.dims4()?;
        Tensor::cat(&vec![x; repeats], 2)?.reshape((b, h * repeats, len, d))
    };
    let (k, v) = (repeated(k)?, repeated(v)?);
    let scale = 1.0 / (q.dim(3)? as f64).sqrt();
    let mut weights = (q.matmul(&k.transpose(2, 3)?)? * scale)?;
    if let Some(mask) = mask {
        let mask = mask.broadcast_as(weights.shape())?;
        let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(weights.dims())?;
        weights = mask.eq(0_u32)?.where_cond(&hidden, &weights)?;
    }
    candle_nn::ops::softmax_last_dim(&weights)?.matmul(&v)
}

/// Each cell times 1, or times one of f32's numbers beside it.
#[cfg(test)]
fn nudged(x: &Tensor) -> Result<Tensor> {
    let places = Tensor::arange(0_u32, x.elem_count() as u32, x.device())?;
    let by = ((places.to_dtype(DType::F32)?.sin()? * f64::from(f32::EPSILON))? + 1.0)?;
    x * by.reshape(x.shape())?
}

/// How many keys the last of `rows` sees in a window: with queries of zeros it weighs them all alike,
/// so that what it takes from itself is one over their number.
pub(crate) fn keys_seen(
    whose: Attention,
    rows: usize,
    window: usize,
    device: &Device,
) -> Result<usize> {
    let zeros = Tensor::zeros((1, 1, rows, 256), DType::F32, device)?;
    let others = Tensor::zeros((1, 1, rows - 1, 256), DType::F32, device)?;
    let itself = Tensor::ones((1, 1, 1, 256), DType::F32, device)?;
    let v = Tensor::cat(&[others, itself], 2)?;
    let out = whose.run([&zeros, &zeros, &v], Some(window), &mut Clock::default())?;
    let share: f32 = out
        .narrow(2, rows - 1, 1)?
        .narrow(3, 0, 1)?
        .flatten_all()?
        .to_vec1()?[0];
    Ok((1.0 / share).round() as usize)
}
