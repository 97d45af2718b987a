//! Names that `mlx-native` keeps private in this module and that its own unit tests use, over this
//! crate's tables.

use crate::backend::metal::table::{PREFILL, Variant};

pub(super) const K_BF16_D64: &str = "flash_attn_prefill_bf16_d64";
pub(super) const K_BF16_D64_BOOLMASK: &str = "flash_attn_prefill_bf16_d64_boolmask";
pub(super) const K_F16_D64: &str = "flash_attn_prefill_f16_d64";
pub(super) const K_F16_D64_BOOLMASK: &str = "flash_attn_prefill_f16_d64_boolmask";
pub(super) const K_BF16_D256: &str = "flash_attn_prefill_bf16_d256";
pub(super) const K_BF16_D256_BOOLMASK: &str = "flash_attn_prefill_bf16_d256_boolmask";
pub(super) const K_F16_D256: &str = "flash_attn_prefill_f16_d256";
pub(super) const K_F16_D256_BOOLMASK: &str = "flash_attn_prefill_f16_d256_boolmask";
pub(super) const K_BF16_D512: &str = "flash_attn_prefill_bf16_d512";
pub(super) const K_BF16_D512_BOOLMASK: &str = "flash_attn_prefill_bf16_d512_boolmask";
pub(super) const K_F16_D512: &str = "flash_attn_prefill_f16_d512";
pub(super) const K_F16_D512_BOOLMASK: &str = "flash_attn_prefill_f16_d512_boolmask";

/// The kernels of this module.
pub(super) const ALL_KERNEL_NAMES: &[&str] = &[
    K_BF16_D64,
    K_BF16_D64_BOOLMASK,
    K_F16_D64,
    K_F16_D64_BOOLMASK,
    K_BF16_D256,
    K_BF16_D256_BOOLMASK,
    K_F16_D256,
    K_F16_D256_BOOLMASK,
    K_BF16_D512,
    K_BF16_D512_BOOLMASK,
    K_F16_D512,
    K_F16_D512_BOOLMASK,
];

/// `[BQ, BK, WM, WN]` of a kernel: its tile, and its simdgroups along queries and along keys. All zero
/// for a name that the table lacks.
const fn geometry(kernel: &str) -> [u32; 4] {
    let mut i = 0;
    while i < PREFILL.len() {
        let Variant {
            kernel: name,
            tile,
            simdgroups,
            ..
        } = PREFILL[i];
        if equal(name.as_bytes(), kernel.as_bytes()) {
            return [tile.bq as u32, tile.bk as u32, simdgroups as u32, 1];
        }
        i += 1;
    }
    [0; 4]
}

const fn equal(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

pub(super) const BQ_D64: u32 = geometry(K_BF16_D64)[0];
pub(super) const BK_D64: u32 = geometry(K_BF16_D64)[1];
pub(super) const WM_D64: u32 = geometry(K_BF16_D64)[2];
pub(super) const WN_D64: u32 = geometry(K_BF16_D64)[3];
pub(super) const BQ_D256: u32 = geometry(K_BF16_D256)[0];
pub(super) const BK_D256: u32 = geometry(K_BF16_D256)[1];
pub(super) const WM_D256: u32 = geometry(K_BF16_D256)[2];
pub(super) const WN_D256: u32 = geometry(K_BF16_D256)[3];

// Programs for `mlx-native` compute grids and class buffers with these.
const _: () = {
    assert!(BQ_D64 == 32 && BK_D64 == 16 && WM_D64 == 4 && WN_D64 == 1);
    assert!(BQ_D256 == 32 && BK_D256 == 16 && WM_D256 == 4 && WN_D256 == 1);
};

#[cfg(test)]
pub(super) use checks::{validate_buffer_size, validate_params};

#[cfg(test)]
mod checks {
    use crate::attention::Problem;
    use crate::compat::flash_attn_prefill::FlashAttnPrefillParams;
    use crate::error::Result;
    use crate::ops::check_buffer;
    use crate::{DType, MlxBuffer};

    /// Whether a problem of these sizes can be built.
    pub(crate) fn validate_params(params: &FlashAttnPrefillParams) -> Result<()> {
        Problem::builder(DType::BF16, params.shape())
            .scale(params.scale)
            .refuse_empty()
            .build()
            .map(|_| ())
    }

    /// Whether a buffer has room for as many elements of its dtype.
    pub(crate) fn validate_buffer_size(
        buffer: &MlxBuffer,
        name: &str,
        elements: usize,
    ) -> Result<()> {
        check_buffer(name, buffer, buffer.dtype(), elements)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::backend::metal::table::{MaskKind, by_name};
    use crate::compat::flash_attn_prefill::FlashAttnPrefillParams;
    use crate::{CpuOptions, DType, MlxDevice, MlxError};

    #[test]
    fn each_name_is_of_the_dtype_head_dim_and_mask_that_it_spells() {
        let (additive, bools) = (MaskKind::Additive, MaskKind::Bool);
        let expected = [
            (K_BF16_D64, DType::BF16, 64, additive),
            (K_BF16_D64_BOOLMASK, DType::BF16, 64, bools),
            (K_F16_D64, DType::F16, 64, additive),
            (K_F16_D64_BOOLMASK, DType::F16, 64, bools),
            (K_BF16_D256, DType::BF16, 256, additive),
            (K_BF16_D256_BOOLMASK, DType::BF16, 256, bools),
            (K_F16_D256, DType::F16, 256, additive),
            (K_F16_D256_BOOLMASK, DType::F16, 256, bools),
            (K_BF16_D512, DType::BF16, 512, additive),
            (K_BF16_D512_BOOLMASK, DType::BF16, 512, bools),
            (K_F16_D512, DType::F16, 512, additive),
            (K_F16_D512_BOOLMASK, DType::F16, 512, bools),
        ];
        for (name, dtype, head_dim, mask) in expected {
            let v = by_name(name).unwrap();
            assert_eq!((v.dtype, v.head_dim, v.mask), (dtype, head_dim, mask));
        }
        let names: HashSet<_> = ALL_KERNEL_NAMES.iter().collect();
        let expected: HashSet<_> = expected.iter().map(|(name, ..)| name).collect();
        assert_eq!(names, expected);
        assert_eq!(names.len(), ALL_KERNEL_NAMES.len());
    }

    #[test]
    fn geometry_is_the_tables_for_both_head_dims_and_masks() {
        let narrow = [BQ_D64, BK_D64, WM_D64, WN_D64];
        let wide = [BQ_D256, BK_D256, WM_D256, WN_D256];
        for name in &ALL_KERNEL_NAMES[..4] {
            assert_eq!(geometry(name), narrow, "{name}");
        }
        for name in &ALL_KERNEL_NAMES[4..8] {
            assert_eq!(geometry(name), wide, "{name}");
        }
        assert_eq!(geometry("flash_attn_prefill_bf16_d6"), [0; 4]);
        let threads = by_name(K_F16_D256).unwrap().threads();
        assert_eq!((32 * WM_D256 * WN_D256) as usize, threads);
    }

    #[test]
    fn params_are_refused_by_the_argument_that_is_wrong() {
        let good = FlashAttnPrefillParams {
            n_heads: 6,
            n_kv_heads: 3,
            head_dim: 64,
            seq_len_q: 5,
            seq_len_k: 7,
            batch: 2,
            scale: 0.125,
            do_causal: false,
        };
        validate_params(&good).unwrap();
        type Spoil = fn(&mut FlashAttnPrefillParams);
        let rows: [(&str, Spoil); 7] = [
            ("heads", |p| p.n_heads = 0),
            ("kv_heads", |p| p.n_kv_heads = 0),
            ("divisible", |p| p.n_kv_heads = 4),
            ("seq_len_q", |p| p.seq_len_q = 0),
            ("seq_len_k", |p| p.seq_len_k = 0),
            ("batch", |p| p.batch = 0),
            ("scale", |p| p.scale = f32::INFINITY),
        ];
        for (what, spoil) in rows {
            let mut params = good;
            spoil(&mut params);
            match validate_params(&params) {
                Err(MlxError::InvalidArgument(text)) => assert!(text.contains(what), "{text}"),
                other => panic!("{what}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_buffer_is_refused_below_its_elements_and_not_above() {
        let device = MlxDevice::cpu(CpuOptions::default()).unwrap();
        let buffer = device.alloc_buffer(12, DType::BF16, vec![6]).unwrap();
        for fits in [0, 5, 6] {
            validate_buffer_size(&buffer, "K", fits).unwrap();
        }
        for too_many in [7, usize::MAX] {
            let error = validate_buffer_size(&buffer, "K", too_many).unwrap_err();
            assert!(
                error.to_string().contains("K: expected at least"),
                "{error}"
            );
        }
    }
}
