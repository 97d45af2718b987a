//! Gemma 3 from a GGUF, as `candle_transformers::models::quantized_gemma3` has it, but for: attention,
//! which is a parameter; the cache, which is not copied for each token; and the gate, which is Gemma's
//! GELU (candle's model has SiLU there).

use std::io::{Read, Seek};

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{D, DType, Device, Module, Tensor};
use candle_nn::kv_cache::KvCache;
use candle_nn::ops::rms_norm;
use candle_nn::rotary_emb::rope;

use crate::attention::{Attention, Clock};

/// A layer in so many sees all keys; the others see a window.
const FULL_EVERY: usize = 6;
/// Base of the rotation where a layer sees a window.
const LOCAL_ROPE_BASE: f32 = 10_000.0;

/// Sizes, from the file's metadata.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden: usize,
    pub(crate) window: usize,
    pub(crate) eps: f32,
    pub(crate) rope_base: f32,
}

impl Config {
    pub(crate) fn new(content: &Content) -> Result<Self> {
        let get = |key: &str| {
            let key = format!("gemma3.{key}");
            let value = content.metadata.get(&key);
            value.with_context(|| format!("the file has no {key}"))
        };
        let size = |key: &str| -> Result<usize> { Ok(get(key)?.to_u32()? as usize) };
        Ok(Self {
            layers: size("block_count")?,
            heads: size("attention.head_count")?,
            kv_heads: size("attention.head_count_kv")?,
            head_dim: size("attention.key_length")?,
            hidden: size("embedding_length")?,
            window: size("attention.sliding_window")?,
            eps: get("attention.layer_norm_rms_epsilon")?.to_f32()?,
            rope_base: get("rope.freq_base")?.to_f32()?,
        })
    }

    /// How many keys a token of this layer sees; all of them where `None`.
    pub(crate) fn window_of(&self, layer: usize) -> Option<usize> {
        (!(layer + 1).is_multiple_of(FULL_EVERY)).then_some(self.window)
    }
}

/// Reads tensors, quantized as they are or as f32.
pub(crate) struct Weights<'a, R> {
    pub(crate) content: &'a Content,
    pub(crate) reader: R,
    pub(crate) device: Device,
    pub(crate) dequantize: bool,
}

impl<R: Read + Seek> Weights<'_, R> {
    fn quantized(&mut self, name: &str) -> Result<QTensor> {
        Ok(self.content.tensor(&mut self.reader, name, &self.device)?)
    }

    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        Ok(self.quantized(name)?.dequantize(&self.device)?)
    }

    fn linear(&mut self, name: &str) -> Result<QMatMul> {
        let weight = self.quantized(name)?;
        Ok(match self.dequantize {
            true => QMatMul::Tensor(weight.dequantize(&self.device)?),
            false => QMatMul::from_qtensor(weight)?,
        })
    }
}

#[derive(Debug)]
struct Layer {
    q: QMatMul,
    k: QMatMul,
    v: QMatMul,
    o: QMatMul,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
    q_norm: Tensor,
    k_norm: Tensor,
    before_attention: Tensor,
    after_attention: Tensor,
    before_mlp: Tensor,
    after_mlp: Tensor,
    window: Option<usize>,
    cos: Tensor,
    sin: Tensor,
    cache: KvCache,
}

/// A model with a cache, for one sequence.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) attention: Attention,
    pub(crate) clock: Clock,
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: QMatMul,
    pub(crate) device: Device,
}

/// Cosines and sines of the rotation at each position, `[capacity, D / 2]`.
fn rotation(dim: usize, base: f32, capacity: usize, device: &Device) -> Result<[Tensor; 2]> {
    let speeds: Vec<f32> = (0..dim)
        .step_by(2)
        .map(|i| 1.0 / base.powf(i as f32 / dim as f32))
        .collect();
    let speeds = Tensor::new(speeds, device)?.unsqueeze(0)?;
    let places = Tensor::arange(0_u32, capacity as u32, device)?.to_dtype(DType::F32)?;
    let angles = places.unsqueeze(1)?.matmul(&speeds)?;
    Ok([angles.cos()?, angles.sin()?])
}

impl Model {
    /// A model with room for `capacity` tokens.
    pub(crate) fn new<R: Read + Seek>(
        weights: &mut Weights<'_, R>,
        attention: Attention,
        capacity: usize,
    ) -> Result<Self> {
        let config = Config::new(weights.content)?;
        let device = weights.device.clone();
        let rotations = [LOCAL_ROPE_BASE, config.rope_base]
            .map(|base| rotation(config.head_dim, base, capacity, &device));
        let [local, global] = rotations;
        let (local, global) = (local?, global?);
        let layers = (0..config.layers)
            .map(|n| {
                let window = config.window_of(n);
                let [cos, sin] = if window.is_some() {
                    local.clone()
                } else {
                    global.clone()
                };
                let name = |part: &str| format!("blk.{n}.{part}.weight");
                Ok(Layer {
                    q: weights.linear(&name("attn_q"))?,
                    k: weights.linear(&name("attn_k"))?,
                    v: weights.linear(&name("attn_v"))?,
                    o: weights.linear(&name("attn_output"))?,
                    gate: weights.linear(&name("ffn_gate"))?,
                    up: weights.linear(&name("ffn_up"))?,
                    down: weights.linear(&name("ffn_down"))?,
                    q_norm: weights.tensor(&name("attn_q_norm"))?,
                    k_norm: weights.tensor(&name("attn_k_norm"))?,
                    before_attention: weights.tensor(&name("attn_norm"))?,
                    after_attention: weights.tensor(&name("post_attention_norm"))?,
                    before_mlp: weights.tensor(&name("ffn_norm"))?,
                    after_mlp: weights.tensor(&name("post_ffw_norm"))?,
                    window,
                    cos,
                    sin,
                    cache: KvCache::new(2, capacity),
                })
            })
            .collect::<Result<_>>()?;
        let embeddings = weights.tensor("token_embd.weight")?;
        let head = match weights.dequantize {
            true => QMatMul::Tensor(embeddings.clone()),
            false => weights.linear("token_embd.weight")?,
        };
        Ok(Self {
            config,
            attention,
            clock: Clock::default(),
            embeddings,
            layers,
            norm: weights.tensor("output_norm.weight")?,
            head,
            device,
        })
    }

    /// Empties the cache.
    pub(crate) fn reset(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.cache.reset());
        self.clock = Clock::default();
    }

    /// Takes the next tokens; gives their last hidden states, `[1, tokens, hidden]`.
    pub(crate) fn forward(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let Self {
            config,
            attention,
            clock,
            ..
        } = self;
        let (len, eps) = (tokens.len(), config.eps);
        let ids = Tensor::new(tokens, &self.device)?;
        let mut x = (self.embeddings.index_select(&ids, 0)? * (config.hidden as f64).sqrt())?;
        x = x.unsqueeze(0)?;
        for layer in &mut self.layers {
            let at = layer.cache.k_cache().current_seq_len();
            let normed = rms_norm(&x, &layer.before_attention, eps)?;
            let heads = |x: Tensor, heads: usize| {
                x.reshape((1, len, heads, config.head_dim))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let q = heads(layer.q.forward(&normed)?, config.heads)?;
            let k = heads(layer.k.forward(&normed)?, config.kv_heads)?;
            let v = heads(layer.v.forward(&normed)?, config.kv_heads)?;
            let (cos, sin) = (layer.cos.narrow(0, at, len)?, layer.sin.narrow(0, at, len)?);
            let q = rope(&rms_norm(&q, &layer.q_norm, eps)?, &cos, &sin)?;
            let k = rope(&rms_norm(&k, &layer.k_norm, eps)?, &cos, &sin)?;
            let (k, v) = layer.cache.append(&k, &v)?;
            let y = attention.run([&q, &k, &v], layer.window, clock)?;
            let y = y.transpose(1, 2)?.flatten_from(D::Minus2)?;
            let y = rms_norm(&layer.o.forward(&y)?, &layer.after_attention, eps)?;
            x = (x + y)?;
            let normed = rms_norm(&x, &layer.before_mlp, eps)?;
            let gated = (layer.gate.forward(&normed)?.gelu()? * layer.up.forward(&normed)?)?;
            let y = rms_norm(&layer.down.forward(&gated)?, &layer.after_mlp, eps)?;
            x = (x + y)?;
        }
        Ok(x)
    }

    /// Logits of some hidden states, `[1, tokens, vocabulary]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(&hidden.contiguous()?, &self.norm, self.config.eps)?;
        Ok(self.head.forward(&normed)?)
    }
}
