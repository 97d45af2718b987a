//! Inputs that every contestant gets, and the check of what comes out.

use std::path::Path;

use anyhow::{Result, ensure};
use half::{bf16, f16};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{Problem, QueryOffset, Role, Shape, Strides};
use mlx_flash_attn::verify::Random;
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::rows::Row;

/// Query rows of each head whose results are checked, spread over all of them.
const CHECKED_ROWS: usize = 12;

/// Numbers in one of the dtypes.
#[derive(Debug)]
pub(crate) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Numbers {
    fn rounded(dtype: DType, exact: &[f32]) -> Self {
        let exact = exact.iter().copied();
        match dtype {
            DType::BF16 => Self::BF16(exact.map(bf16::from_f32).collect()),
            DType::F16 => Self::F16(exact.map(f16::from_f32).collect()),
            _ => Self::F32(exact.collect()),
        }
    }

    fn bytes(&self) -> (Dtype, &[u8]) {
        match self {
            Self::F32(x) => (Dtype::F32, bytemuck::cast_slice(x)),
            Self::F16(x) => (Dtype::F16, bytemuck::cast_slice(x)),
            Self::BF16(x) => (Dtype::BF16, bytemuck::cast_slice(x)),
        }
    }

    fn values(&self, from: usize) -> Values<'_> {
        match self {
            Self::F32(x) => Values::F32(x.get(from..).unwrap_or_default()),
            Self::F16(x) => Values::F16(x.get(from..).unwrap_or_default()),
            Self::BF16(x) => Values::BF16(x.get(from..).unwrap_or_default()),
        }
    }

    /// A copy on the device.
    pub(crate) fn buffer(&self, device: &MlxDevice) -> mlx_flash_attn::Result<MlxBuffer> {
        match self {
            Self::F32(x) => device.buffer_from_slice(x, DType::F32, vec![x.len()]),
            Self::F16(x) => device.buffer_from_slice(x, DType::F16, vec![x.len()]),
            Self::BF16(x) => device.buffer_from_slice(x, DType::BF16, vec![x.len()]),
        }
    }
}

/// Q, K and V of one row, head-major, in one dtype.
#[derive(Debug)]
pub(crate) struct Operands {
    pub(crate) dtype: DType,
    pub(crate) q: Numbers,
    pub(crate) k: Numbers,
    pub(crate) v: Numbers,
}

/// Normal numbers, the same for every dtype until they are rounded: scores then spread by 1.
pub(crate) fn operands(shape: Shape, dtypes: &[DType]) -> Vec<Operands> {
    let mut random = Random::new(1);
    let mut exact = |heads: usize, len: usize| -> Vec<f32> {
        let n = shape.batch * heads * len * shape.qk_dim;
        (0..n).map(|_| random.normal() as f32).collect()
    };
    let q = exact(shape.heads, shape.query_len);
    let k = exact(shape.kv_heads, shape.key_len);
    let v = exact(shape.kv_heads, shape.key_len);
    let rounded = |dtype: &DType| Operands {
        dtype: *dtype,
        q: Numbers::rounded(*dtype, &q),
        k: Numbers::rounded(*dtype, &k),
        v: Numbers::rounded(*dtype, &v),
    };
    dtypes.iter().map(rounded).collect()
}

/// Writes the inputs for the workers: `q_f32` and so on.
pub(crate) fn write(path: &Path, row: &Row, all: &[Operands]) -> Result<()> {
    let s = row.shape;
    let queries = [s.batch, s.heads, s.query_len, s.qk_dim];
    let keys = [s.batch, s.kv_heads, s.key_len, s.qk_dim];
    let mut tensors = Vec::new();
    for operands in all {
        let parts = [
            ("q", &operands.q, queries),
            ("k", &operands.k, keys),
            ("v", &operands.v, keys),
        ];
        for (name, numbers, shape) in parts {
            let (dtype, bytes) = numbers.bytes();
            let view = TensorView::new(dtype, shape.to_vec(), bytes)?;
            tensors.push((format!("{name}_{}", operands.dtype), view));
        }
    }
    safetensors::serialize_to_file(tensors, None, path)?;
    Ok(())
}

/// Relative error of `output`, f32 `[B, H, Sq, D]`, against the f64 reference: the root mean square
/// over a sample of query rows of every head. Each row counts for itself, as the first rows of a
/// causal head, means of few values, are so much longer than the others.
pub(crate) fn relative_error(row: &Row, operands: &Operands, output: &[f32]) -> Result<f64> {
    let Shape {
        batch,
        heads,
        query_len,
        v_dim: head_dim,
        ..
    } = row.shape;
    ensure!(
        output.len() == batch * heads * query_len * head_dim,
        "the output has {} elements",
        output.len()
    );
    let (mut sum, mut rows) = (0.0, 0.0);
    for sample in 0..CHECKED_ROWS {
        let i = sample * (query_len - 1) / (CHECKED_ROWS - 1);
        // One query row at its own position among the keys, read where it lies in Q.
        let shape = Shape {
            query_len: 1,
            ..row.shape
        };
        let strides = Strides {
            batch: heads * query_len * head_dim,
            head: query_len * head_dim,
            seq: head_dim,
        };
        let mut builder = Problem::builder(operands.dtype, shape)
            .causal(row.causal)
            .query_offset(QueryOffset::At(i as i64))
            .strides(Role::Query, strides);
        if let Some(window) = row.window {
            builder = builder.window(window);
        }
        let inputs = Inputs::new(
            operands.q.values(i * head_dim),
            operands.k.values(0),
            operands.v.values(0),
        );
        let reference = oracle::attention(&builder.build()?, &inputs, Precision::Exact)?.o;
        for (head, expected) in reference.chunks(head_dim).enumerate() {
            let got = output.iter().skip((head * query_len + i) * head_dim);
            let (mut error, mut norm) = (0.0, 0.0);
            for (expected, got) in expected.iter().zip(got) {
                error += (f64::from(*got) - expected).powi(2);
                norm += expected * expected;
            }
            sum += error / norm;
            rows += 1.0;
        }
    }
    Ok((sum / f64::max(rows, 1.0)).sqrt())
}
