//! One tensor of a file, held against the dtypes that it may have.

use anyhow::{Result, anyhow, bail};
use mlx_flash_attn::DType;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// One operand: its element type and its bytes, dense.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: &'a [u8],
}

/// The tensor of a name, if it is there.
pub(crate) fn optional<'a>(tensors: &SafeTensors<'a>, name: &str) -> Option<TensorView<'a>> {
    tensors.tensor(name).ok()
}

/// The same, which must be there.
pub(crate) fn required<'a>(tensors: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>> {
    optional(tensors, name).ok_or_else(|| {
        let mut there: Vec<String> = tensors.names().iter().map(|n| format!("`{n}`")).collect();
        there.sort();
        let there = match there.len() {
            0 => "no tensors".into(),
            1..=8 => there.join(", "),
            n => format!("{} and {} more", there[..8].join(", "), n - 8),
        };
        anyhow!("tensor `{name}`: expected to be there, found {there}")
    })
}

/// A tensor of one of the dtypes that are allowed.
pub(crate) fn tensor<'a>(
    name: &str,
    view: &TensorView<'a>,
    allowed: &[Dtype],
) -> Result<Tensor<'a>> {
    let dtype = match view.dtype() {
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        Dtype::F32 => Some(DType::F32),
        Dtype::BOOL | Dtype::U8 => Some(DType::U8),
        Dtype::I32 => Some(DType::I32),
        _ => None,
    };
    match dtype.filter(|_| allowed.contains(&view.dtype())) {
        Some(dtype) => Ok(Tensor {
            dtype,
            shape: view.shape().to_vec(),
            bytes: view.data(),
        }),
        None => {
            let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            bail!(
                "tensor `{name}`: expected dtype {}, found {}",
                allowed.join(" or "),
                view.dtype()
            )
        }
    }
}

/// The numbers of a tensor of one axis.
pub(crate) fn integers(name: &str, view: &TensorView<'_>) -> Result<Vec<u32>> {
    if view.shape().len() != 1 {
        bail!("tensor `{name}`: expected rank 1, found {:?}", view.shape());
    }
    let number: fn(&[u8]) -> Option<i128> = match view.dtype() {
        Dtype::I32 => |x| Some(i32::from_le_bytes(x.try_into().ok()?).into()),
        Dtype::U32 => |x| Some(u32::from_le_bytes(x.try_into().ok()?).into()),
        Dtype::I64 => |x| Some(i64::from_le_bytes(x.try_into().ok()?).into()),
        Dtype::U64 => |x| Some(u64::from_le_bytes(x.try_into().ok()?).into()),
        other => bail!("tensor `{name}`: expected dtype I32, U32, I64 or U64, found {other}"),
    };
    let wide = view.data().chunks_exact(view.dtype().bitsize() / 8);
    wide.map(|bytes| {
        let found = number(bytes).unwrap_or(-1);
        u32::try_from(found)
            .map_err(|_| anyhow!("tensor `{name}`: expected 0 to 4294967295, found {found}"))
    })
    .collect()
}
