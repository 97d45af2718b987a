//! Seeded tensors, and attention in float64 straight from its definition.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr)]

use candle_core::{DType, Device, Tensor};

/// The devices to test: the CPU and, with the feature `cuda`, a GPU. Without one the test says that it
/// is skipped there; with `MLX_FLASH_DEVICE=cuda` it fails, and the CPU is left out.
pub(crate) fn devices() -> Vec<Device> {
    if !cfg!(feature = "cuda") {
        return vec![Device::Cpu];
    }
    let only = std::env::var("MLX_FLASH_DEVICE").is_ok_and(|device| device == "cuda");
    // One for each test: candle's stream is the thread's own.
    match Device::new_cuda(0) {
        Ok(cuda) if only => vec![cuda],
        Ok(cuda) => vec![Device::Cpu, cuda],
        Err(error) => {
            let message = error.to_string();
            let reason = message.lines().next().unwrap_or_default();
            assert!(!only, "MLX_FLASH_DEVICE=cuda: {reason}");
            eprintln!("SKIPPED on CUDA: {reason}");
            vec![Device::Cpu]
        }
    }
}

/// Standard-normal-like cells that depend on the seed alone.
pub(crate) fn random(seed: u64, dims: &[usize], dtype: DType, device: &Device) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let cells: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            // Twelve uniform numbers sum to a variance of 1.
            let sum: f32 = (0..12)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 40) as f32 / (1_u64 << 24) as f32
                })
                .sum();
            sum - 6.0
        })
        .collect();
    let x = Tensor::from_vec(cells, dims, &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

/// The cells of a tensor, in the order of its shape.
pub(crate) fn cells(x: &Tensor) -> Vec<f64> {
    let x = x.to_device(&Device::Cpu).unwrap();
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// What a query does with a key before the softmax; `None` hides the key.
pub(crate) type Score<'a> = &'a dyn Fn(f64, [usize; 4]) -> Option<f64>;

/// Output and log-sum-exp of head-major operands. `score` gets the scaled product and `[b, h, i, j]`.
pub(crate) fn reference(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sink: Option<&[f64]>,
    score: Score<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let (b, h, ql, d) = q.dims4().unwrap();
    let (_, hkv, kl, _) = k.dims4().unwrap();
    let scale = 1.0 / (d as f64).sqrt();
    let (q, k, v) = (cells(q), cells(k), cells(v));
    let (mut out, mut lse) = (vec![0.0; b * h * ql * d], vec![0.0; b * h * ql]);
    for row in 0..b * h * ql {
        let (batch, head, i) = (row / (h * ql), row / ql % h, row % ql);
        let kv = batch * hkv + head / (h / hkv);
        let keys = |x: &[f64], j: usize| x[(kv * kl + j) * d..][..d].to_vec();
        let scores: Vec<Option<f64>> = (0..kl)
            .map(|j| {
                let products = q[row * d..][..d].iter().zip(keys(&k, j));
                score(
                    products.map(|(a, b)| a * b).sum::<f64>() * scale,
                    [batch, head, i, j],
                )
            })
            .collect();
        let sink = sink.map(|s| s[head]);
        let most = scores.iter().flatten().copied().chain(sink);
        let most = most.fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores
            .iter()
            .map(|s| s.map_or(0.0, |s| (s - most).exp()))
            .collect();
        let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| (s - most).exp());
        lse[row] = if most == f64::NEG_INFINITY {
            most
        } else {
            most + sum.ln()
        };
        for (j, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
            for (o, x) in out[row * d..][..d].iter_mut().zip(keys(&v, j)) {
                *o += weight / sum * x;
            }
        }
    }
    (out, lse)
}

/// The most that the relative Frobenius error may be in a dtype.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 4e-3,
        DType::F16 => 6e-4,
        _ => 2e-6,
    }
}

/// Relative Frobenius error.
pub(crate) fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    let all: f64 = want.iter().copied().map(square).sum();
    (off / all).sqrt()
}

/// Fails where `got`, head-major, is not `want` within its dtype's tolerance.
#[track_caller]
pub(crate) fn check(what: &str, got: &Tensor, want: &[f64]) {
    let off = error(&cells(got), want);
    let most = tolerance(got.dtype());
    assert!(
        off <= most,
        "{what}: relative error {off:.2e}, at most {most:.1e}"
    );
}
