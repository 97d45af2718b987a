//! What the integration tests share: devices, operands, and attention written out plainly, with
//! nothing of the crate's own in it.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr)]

use half::{bf16, f16};
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{Problem, ProblemBuilder, QueryOffset, Shape};
use mlx_flash_attn::encoder::CommandEncoder;
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::verify::Random;
use mlx_flash_attn::{DType, DeviceKind, KernelRegistry, MlxBuffer, MlxDevice, Result};

/// Every device that opens here and that `MLX_FLASH_TEST_DEVICES` does not leave out. The others are
/// named on stderr, so that a skip is seen.
pub(crate) fn devices() -> Vec<MlxDevice> {
    let chosen = std::env::var("MLX_FLASH_TEST_DEVICES").ok();
    let mut open = Vec::new();
    for kind in DeviceKind::ALL {
        let name = kind.to_string();
        if let Some(list) = &chosen
            && !list.split(',').any(|chosen| chosen == name)
        {
            eprintln!("SKIPPED on {name}: MLX_FLASH_TEST_DEVICES is {list}");
            continue;
        }
        match MlxDevice::open(kind) {
            Ok(device) => open.push(device),
            Err(error) => eprintln!("SKIPPED on {kind}: {error}"),
        }
    }
    assert!(
        open.iter().any(|d| d.kind() == DeviceKind::Cpu),
        "the CPU opens everywhere"
    );
    open
}

/// What a problem asks beside its shape.
pub(crate) type Build = fn(ProblemBuilder) -> ProblemBuilder;

/// Bounds that follow each sequence's length, or none; one with a softcap.
pub(crate) const BUILDS: [Build; 4] = [
    |b| b,
    |b| {
        b.causal(true)
            .query_offset(QueryOffset::BottomRight)
            .softcap(3.0)
    },
    |b| {
        b.causal(true)
            .window(37)
            .query_offset(QueryOffset::BottomRight)
    },
    |b| {
        b.query_offset(QueryOffset::BottomRight)
            .window(20)
            .window_right(3)
    },
];

pub(crate) fn shape(
    [batch, heads, kv_heads]: [usize; 3],
    (query_len, key_len): (usize, usize),
    head_dim: usize,
) -> Shape {
    Shape {
        batch,
        heads,
        kv_heads,
        query_len,
        key_len,
        qk_dim: head_dim,
        v_dim: head_dim,
    }
}

/// `n` unit normal numbers, rounded to `dtype`.
pub(crate) fn normal(seed: u64, n: usize, dtype: DType) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n)
        .map(|_| round(random.normal() as f32, dtype))
        .collect()
}

pub(crate) fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

pub(crate) fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    values
        .iter()
        .flat_map(|x| match dtype {
            DType::F32 => x.to_ne_bytes().to_vec(),
            DType::F16 => f16::from_f32(*x).to_ne_bytes().to_vec(),
            DType::BF16 => bf16::from_f32(*x).to_ne_bytes().to_vec(),
            _ => vec![*x as u8],
        })
        .collect()
}

/// A buffer of `dtype` with these values.
pub(crate) fn upload(
    device: &MlxDevice,
    values: &[f32],
    dtype: DType,
    shape: &[usize],
) -> MlxBuffer {
    let bytes = to_bytes(values, dtype);
    let mut buffer = device
        .alloc_buffer(bytes.len(), dtype, shape.to_vec())
        .unwrap();
    buffer.as_mut_slice::<u8>().unwrap().copy_from_slice(&bytes);
    buffer
}

/// As [`upload`], as a view with `guard` NaNs on either side.
pub(crate) fn upload_guarded(
    device: &MlxDevice,
    values: &[f32],
    dtype: DType,
    guard: usize,
) -> MlxBuffer {
    let nans = vec![f32::NAN; guard];
    let all = [&nans, values, &nans].concat();
    let whole = upload(device, &all, dtype, &[all.len()]);
    whole.slice_view((guard * dtype.size_of()) as u64, values.len())
}

/// A buffer of `n` NaNs to be written.
pub(crate) fn output(device: &MlxDevice, n: usize, dtype: DType) -> MlxBuffer {
    upload(device, &vec![f32::NAN; n], dtype, &[n])
}

pub(crate) fn bytes(buffer: &MlxBuffer) -> Vec<u8> {
    buffer.as_slice::<u8>().unwrap().to_vec()
}

pub(crate) fn download(buffer: &MlxBuffer) -> Vec<f32> {
    match buffer.dtype() {
        DType::F32 => buffer.as_slice::<f32>().unwrap().to_vec(),
        DType::F16 => {
            let values = buffer.as_slice::<f16>().unwrap();
            values.iter().map(|x| x.to_f32()).collect()
        }
        DType::BF16 => {
            let values = buffer.as_slice::<bf16>().unwrap();
            values.iter().map(|x| x.to_f32()).collect()
        }
        _ => {
            let values = buffer.as_slice::<u8>().unwrap();
            values.iter().map(|x| f32::from(*x)).collect()
        }
    }
}

/// Encodes with `encode` on a fresh encoder, commits and waits.
pub(crate) fn commit<T>(
    device: &MlxDevice,
    encode: impl FnOnce(&mut CommandEncoder) -> Result<T>,
) -> T {
    let mut encoder = device.command_encoder().unwrap();
    let value = encode(&mut encoder).unwrap();
    encoder.commit_and_wait().unwrap();
    value
}

/// The tiles whose classes kernels of `head_dim` take.
pub(crate) fn tiles(seq_len_q: u32, seq_len_k: u32, head_dim: u32) -> BlkParams {
    let (bq, bk) = if head_dim == 512 { (8, 64) } else { (32, 16) };
    BlkParams {
        seq_len_q,
        seq_len_k,
        bq,
        bk,
    }
}

/// The classes of a mask's tiles, as the device finds them.
pub(crate) fn classify(device: &MlxDevice, mask: &MlxBuffer, tiles: &BlkParams) -> MlxBuffer {
    let blk = alloc_blk_buffer(device, tiles).unwrap();
    commit(device, |encoder| {
        let registry = &mut KernelRegistry::new();
        dispatch_flash_attn_prefill_blk(encoder, device, registry, mask, &blk, tiles)
    });
    blk
}

/// Runs `problem` on its operands.
pub(crate) fn attend(device: &MlxDevice, problem: &Problem, operands: &Operands<'_>) {
    commit(device, |encoder| ops::attention(encoder, problem, operands));
}

/// Dense head-major operands of one dtype, on the host and on a device.
pub(crate) struct Qkv {
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Qkv {
    pub(crate) fn new(seed: u64, dtype: DType, shape: Shape) -> Self {
        let d = shape.qk_dim;
        let q = shape.batch * shape.heads * shape.query_len * d;
        let k = shape.batch * shape.kv_heads * shape.key_len * d;
        Self {
            dtype,
            shape,
            q: normal(seed * 3 + 1, q, dtype),
            k: normal(seed * 3 + 2, k, dtype),
            v: normal(seed * 3 + 3, k, dtype),
        }
    }

    /// A problem over these operands, whose positions count from 0 unless a test says otherwise.
    pub(crate) fn builder(&self) -> ProblemBuilder {
        Problem::builder(self.dtype, self.shape).query_offset(QueryOffset::At(0))
    }

    /// Q, K, V and a poisoned output, Q, K and V between NaNs. They lie on no alignment, but on CUDA,
    /// where some kernels take aligned rows alone.
    pub(crate) fn buffers(&self, device: &MlxDevice) -> [MlxBuffer; 4] {
        let guard = if device.kind() == DeviceKind::Cuda {
            64
        } else {
            41
        };
        [
            upload_guarded(device, &self.q, self.dtype, guard),
            upload_guarded(device, &self.k, self.dtype, guard),
            upload_guarded(device, &self.v, self.dtype, guard),
            output(device, self.q.len(), self.dtype),
        ]
    }

    /// Runs the problem without optional operands and gives the output's bytes and values.
    pub(crate) fn run(&self, device: &MlxDevice, problem: &Problem) -> (Vec<u8>, Vec<f32>) {
        let [q, k, v, out] = self.buffers(device);
        attend(device, problem, &Operands::new(&q, &k, &v, &out));
        (bytes(&out), download(&out))
    }

    /// As [`Qkv::run`], with a mask.
    pub(crate) fn run_masked(
        &self,
        device: &MlxDevice,
        problem: &Problem,
        mask: &MlxBuffer,
    ) -> (Vec<u8>, Vec<f32>) {
        let [q, k, v, out] = self.buffers(device);
        let operands = Operands {
            mask: Some(mask),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(device, problem, &operands);
        (bytes(&out), download(&out))
    }

    /// Attention over dense head-major operands, spelled out; see [`Plain`].
    pub(crate) fn plain(&self, plain: &Plain<'_>) -> Vec<f64> {
        let s = self.shape;
        let (group, d) = (s.heads / s.kv_heads, s.v_dim);
        let scale = plain.scale.unwrap_or(1.0 / (d as f64).sqrt());
        let mut out = Vec::with_capacity(self.q.len());
        for b in 0..s.batch {
            for h in 0..s.heads {
                let kv = (b * s.kv_heads + h / group) * s.key_len * d;
                for i in 0..s.query_len {
                    let row = ((b * s.heads + h) * s.query_len + i) * d;
                    let mut scores = Vec::new();
                    for j in 0..s.key_len {
                        let Some(bias) = (plain.cell)(b * s.heads + h, i, j) else {
                            continue;
                        };
                        let products = (0..d).map(|x| {
                            f64::from(self.q[row + x]) * f64::from(self.k[kv + j * d + x])
                        });
                        let mut score = scale * products.sum::<f64>();
                        if let Some(c) = plain.softcap {
                            score = c * (score / c).tanh();
                        }
                        scores.push((j, score + bias));
                    }
                    let sink = plain.sinks.map_or(f64::NEG_INFINITY, |s| f64::from(s[h]));
                    let top = scores.iter().fold(sink, |m, s| m.max(s.1));
                    let weights = scores.iter().map(|s| (s.1 - top).exp());
                    let sum = weights.sum::<f64>() + (sink - top).exp();
                    out.extend((0..d).map(|x| {
                        let terms = scores.iter().map(|(j, score)| {
                            (score - top).exp() * f64::from(self.v[kv + j * d + x])
                        });
                        if scores.is_empty() {
                            0.0
                        } else {
                            terms.sum::<f64>() / sum
                        }
                    }));
                }
            }
        }
        out
    }
}

/// What [`Qkv::plain`] computes besides the product.
pub(crate) struct Plain<'a> {
    /// `1 / sqrt(D)` when not given.
    pub(crate) scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    pub(crate) sinks: Option<&'a [f32]>,
    /// The bias of (head counted over all batches, query, key); `None` where the key is hidden.
    pub(crate) cell: &'a dyn Fn(usize, usize, usize) -> Option<f64>,
}

impl<'a> Plain<'a> {
    pub(crate) fn new(cell: &'a dyn Fn(usize, usize, usize) -> Option<f64>) -> Self {
        Self {
            scale: None,
            softcap: None,
            sinks: None,
            cell,
        }
    }
}

/// A bias of 0 where a key is visible.
pub(crate) fn seen(visible: bool) -> Option<f64> {
    visible.then_some(0.0)
}

/// `||got - want|| / ||want||`, infinite where a value is not finite or a length differs.
pub(crate) fn distance(got: &[f32], want: &[f64]) -> f64 {
    if got.len() != want.len() || got.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let error = got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g) - w).powi(2));
    let norm: f64 = want.iter().map(|w| w * w).sum();
    (error.sum::<f64>() / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// Fails where a result is further off than its dtype allows.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f64], dtype: DType) {
    let (distance, bound) = (distance(got, want), relative_bound(dtype));
    assert!(
        distance <= bound,
        "{what}: off by {distance:.3e}, {bound:.0e} allowed"
    );
}
