//! Runs candle's attention for the benchmark `peers`, on whose protocol it waits.

#[path = "../../src/protocol.rs"]
mod protocol;

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::softmax_last_dim;

use protocol::{Load, Reply, Request, Variant};

/// How candle is asked.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// `candle_nn::attention::flash_attn`.
    Flash,
    /// Products and a softmax as separate operations, as most of candle's models do on CPUs.
    Plain,
}

/// One way, ready to run.
#[derive(Debug)]
struct Runner {
    way: Way,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Tensor>,
    /// Without a window the flash path is told that it is causal; a window is a mask for it too.
    causal: bool,
    scale: f64,
    output: Option<Tensor>,
}

impl Runner {
    /// `q`, `k`, `v` are head-major.
    fn new(way: Way, load: &Load, [q, k, v]: [Tensor; 3]) -> Result<Self> {
        let [_, heads, kv_heads, sq, sk, dim] = load.shape;
        let dtype = q.dtype();
        let seen = |q: usize, k: usize| {
            (!load.causal || k <= q) && load.window.is_none_or(|w| q < k + w as usize)
        };
        let by_mask = match way {
            Way::Flash => load.window.is_some(),
            Way::Plain => load.causal || load.window.is_some(),
        };
        let mask = by_mask
            .then(|| {
                let cells: Vec<f32> = (0..sq)
                    .flat_map(|q| (0..sk).map(move |k| (q, k)))
                    .map(|(q, k)| if seen(q, k) { 0.0 } else { f32::NEG_INFINITY })
                    .collect();
                Tensor::from_vec(cells, (sq, sk), &Device::Cpu)?.to_dtype(dtype)
            })
            .transpose()?;
        let prepared = |x: Tensor, repeats: usize| -> candle_core::Result<Tensor> {
            match way {
                Way::Flash => x.transpose(1, 2)?.contiguous(),
                // Products know no grouped heads; what is repeated is not timed.
                Way::Plain => {
                    let (b, h, s, d) = x.dims4()?;
                    let x = x.unsqueeze(2)?.expand((b, h, repeats, s, d))?;
                    x.contiguous()?.reshape((b, h * repeats, s, d))
                }
            }
        };
        let group = heads / kv_heads;
        Ok(Self {
            way,
            q: prepared(q, 1)?,
            k: prepared(k, group)?,
            v: prepared(v, group)?,
            mask,
            causal: load.causal,
            scale: 1.0 / (dim as f64).sqrt(),
            output: None,
        })
    }

    fn run(&mut self) -> candle_core::Result<()> {
        let output = match self.way {
            Way::Plain => {
                let scores = (self.q.matmul(&self.k.t()?)? * self.scale)?;
                let scores = match &self.mask {
                    Some(mask) => scores.broadcast_add(mask)?,
                    None => scores,
                };
                softmax_last_dim(&scores)?.matmul(&self.v)?
            }
            Way::Flash => {
                let mask = match &self.mask {
                    Some(mask) => AttnMask::Mask(mask.clone()),
                    None if self.causal => AttnMask::causal(),
                    None => AttnMask::None,
                };
                let flash = match self.q.dtype() {
                    DType::BF16 => flash_attn::<half::bf16>,
                    DType::F16 => flash_attn::<half::f16>,
                    _ => flash_attn::<f32>,
                };
                flash(
                    &self.q,
                    &self.k,
                    &self.v,
                    self.scale as f32,
                    mask,
                    None,
                    None,
                )?
            }
        };
        self.output = Some(output);
        Ok(())
    }
}

/// Runners of a row and their names, and what does not run.
fn load(load: &Load) -> Result<(Vec<Runner>, Reply)> {
    let tensors = safetensors::load(&load.path, &Device::Cpu)?;
    let (mut runners, mut reply) = (Vec::new(), Reply::default());
    for dtype in &load.dtypes {
        for (way, name) in [(Way::Flash, "flash"), (Way::Plain, "plain")] {
            let ready = || -> Result<Runner> {
                let operand = |name: &str| -> Result<Tensor> {
                    let name = format!("{name}_{dtype}");
                    Ok(tensors.get(&name).with_context(|| name.clone())?.clone())
                };
                let operands = [operand("q")?, operand("k")?, operand("v")?];
                let seconds = estimate(way, load, &operands)?;
                anyhow::ensure!(seconds <= load.limit_s, "would take about {seconds:.0} s");
                let mut runner = Runner::new(way, load, operands)?;
                runner.run()?;
                Ok(runner)
            };
            match ready() {
                Ok(runner) => {
                    runners.push(runner);
                    reply.variants.push(Variant {
                        name: name.into(),
                        dtype: dtype.clone(),
                    });
                }
                Err(why) => {
                    let why = why.to_string();
                    let why = why.lines().next().unwrap_or_default();
                    reply.skipped.push(format!("{name} {dtype}: {why}"));
                }
            }
        }
    }
    Ok((runners, reply))
}

/// How long a run would take, from one with a single key/value head: some take minutes.
fn estimate(way: Way, load: &Load, operands: &[Tensor; 3]) -> Result<f64> {
    let [batch, heads, kv_heads, sq, sk, dim] = load.shape;
    let [q, k, v] = operands;
    let group = heads / kv_heads;
    let one = |x: &Tensor, heads: usize| x.narrow(0, 0, 1)?.narrow(1, 0, heads)?.contiguous();
    let part = Load {
        path: load.path.clone(),
        shape: [1, group, 1, sq, sk, dim],
        dtypes: Vec::new(),
        ..*load
    };
    let mut runner = Runner::new(way, &part, [one(q, group)?, one(k, 1)?, one(v, 1)?])?;
    let start = Instant::now();
    runner.run()?;
    Ok(start.elapsed().as_secs_f64() * (batch * kv_heads) as f64)
}

fn answer(request: Request, runners: &mut Vec<Runner>) -> Result<Reply> {
    match request {
        Request::Load(row) => {
            // The row before goes first, so that two are never in memory.
            runners.clear();
            let (ready, reply) = load(&row)?;
            *runners = ready;
            Ok(reply)
        }
        Request::Time {
            variant,
            warm,
            iters,
        } => {
            let runner = runners.get_mut(variant).context("no such variant")?;
            for _ in 0..warm {
                runner.run()?;
            }
            let mut reply = Reply::default();
            for _ in 0..iters {
                let start = Instant::now();
                runner.run()?;
                reply.ns.push(start.elapsed().as_nanos() as u64);
            }
            Ok(reply)
        }
        Request::Output { variant, path } => {
            let runner = runners.get(variant).context("no such variant")?;
            let output = runner.output.as_ref().context("nothing ran")?;
            let rows: Vec<f32> = output.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
            std::fs::write(path, bytes)?;
            Ok(Reply::default())
        }
    }
}

fn main() -> Result<()> {
    let mut replies = std::io::stdout().lock();
    let mut tell = |reply: &Reply| -> Result<()> {
        writeln!(replies, "{}", serde_json::to_string(reply)?)?;
        Ok(replies.flush()?)
    };
    tell(&Reply {
        // As pinned in Cargo.toml; candle does not tell.
        version: Some("0.11.1".into()),
        ..Reply::default()
    })?;
    let mut runners = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let answer = serde_json::from_str(&line?)
            .map_err(Into::into)
            .and_then(|request| answer(request, &mut runners));
        let reply = answer.unwrap_or_else(|error| Reply {
            error: Some(format!("{error:#}")),
            ..Reply::default()
        });
        tell(&reply)?;
    }
    Ok(())
}
