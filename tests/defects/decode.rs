//! Defects of decode and of windows.

use mlx_flash_attn::attention::MaskSpec;
use mlx_flash_attn::ops::flash_attn_prefill_mask::{SdpaMaskParams, build_sdpa_mask_bf16};
use mlx_flash_attn::ops::flash_attn_vec::{FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, KernelRegistry, MlxDevice};

use crate::common::{
    Plain, Qkv, assert_close, commit, devices, distance, download, normal, output, seen, shape,
    upload_guarded,
};

const BF16: DType = DType::BF16;

/// One query over a cache with NaNs past its valid keys.
struct Decode {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    keys: usize,
    capacity: usize,
    kv_dtype: DType,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Decode {
    fn new(kv_dtype: DType, dim: usize, keys: usize, capacity: usize) -> Self {
        let (heads, kv_heads) = (4, 2);
        let cache = |seed| {
            let mut x = normal(seed, kv_heads * capacity * dim, kv_dtype);
            for head in x.chunks_mut(capacity * dim) {
                head[keys * dim..].fill(f32::NAN);
            }
            x
        };
        Self {
            heads,
            kv_heads,
            dim,
            keys,
            capacity,
            kv_dtype,
            q: normal(1, heads * dim, DType::F32),
            k: cache(2),
            v: cache(3),
        }
    }

    fn params(&self) -> FlashAttnVecParams {
        FlashAttnVecParams {
            num_heads: self.heads as u32,
            num_kv_heads: self.kv_heads as u32,
            head_dim: self.dim as u32,
            kv_seq_len: self.keys as u32,
            kv_capacity: self.capacity as u32,
            scale: 1.0 / (self.dim as f32).sqrt(),
            mask_type: 1,
            sliding_window: 0,
            softcap: 0.0,
        }
    }

    fn run(&self, device: &MlxDevice, params: &FlashAttnVecParams) -> Vec<f32> {
        let q = upload_guarded(device, &self.q, DType::F32, 40);
        let k = upload_guarded(device, &self.k, self.kv_dtype, 40);
        let v = upload_guarded(device, &self.v, self.kv_dtype, 40);
        let out = output(device, self.q.len(), DType::F32);
        let tmp = tmp_buffer_bytes(params.num_heads, params.head_dim) / 4;
        let tmp = output(device, tmp, DType::F32);
        commit(device, |e| {
            let registry = &mut KernelRegistry::new();
            flash_attn_vec(e, registry, device, &q, &k, &v, &out, &tmp, params)
        });
        download(&out)
    }

    /// The same as a prefill of one row, over the valid keys alone.
    fn plain(&self, plain: &Plain<'_>) -> Vec<f64> {
        let valid = |x: &[f32]| -> Vec<f32> {
            let head = self.capacity * self.dim;
            x.chunks(head)
                .flat_map(|h| h[..self.keys * self.dim].to_vec())
                .collect()
        };
        let data = Qkv {
            dtype: DType::F32,
            shape: shape([1, self.heads, self.kv_heads], (1, self.keys), self.dim),
            q: self.q.clone(),
            k: valid(&self.k),
            v: valid(&self.v),
        };
        data.plain(plain)
    }
}

#[test]
fn defect_10_decode_stays_inside_the_cache_and_knows_softcap_and_minus_infinity() {
    for device in devices() {
        for kv_dtype in [DType::F32, DType::F16] {
            for (dim, keys, capacity) in [(256, 33, 33), (512, 5, 40), (64, 100, 130), (128, 1, 1)]
            {
                let data = Decode::new(kv_dtype, dim, keys, capacity);
                let what = format!("{kv_dtype} d{dim} {keys} of {capacity}");
                let all = |_: usize, _: usize, _: usize| seen(true);
                let got = data.run(&device, &data.params());
                assert_close(&what, &got, &data.plain(&Plain::new(&all)), DType::F32);

                let params = FlashAttnVecParams {
                    softcap: 1.25,
                    ..data.params()
                };
                let capped = data.plain(&Plain {
                    softcap: Some(1.25),
                    ..Plain::new(&all)
                });
                assert_close(&what, &data.run(&device, &params), &capped, DType::F32);
            }
        }
        // Visible scores far below -65504: a finite mask would let the hidden keys win.
        let mut data = Decode::new(DType::F32, 64, 40, 40);
        data.q
            .iter_mut()
            .enumerate()
            .for_each(|(n, x)| *x = if n % 64 == 0 { -1.0 } else { 0.0 });
        for (n, x) in data.k.iter_mut().enumerate() {
            let key = n / 64 % 40;
            *x = match n % 64 {
                0 if key >= 35 => 131_072.0 + key as f32 / 8.0,
                _ => 0.0,
            };
        }
        let params = FlashAttnVecParams {
            scale: 1.0,
            mask_type: 2,
            sliding_window: 5,
            ..data.params()
        };
        let want = data.plain(&Plain {
            scale: Some(1.0),
            ..Plain::new(&|_, _, j| seen(j >= 35))
        });
        let off = distance(&data.run(&device, &params), &want);
        // Scores of -131,072 leave the exponent 2^-6 of precision at most.
        assert!(off < 2e-2, "off by {off:.2e}");
    }
}

/// How many keys a row saw, from outputs over V of ones at one place a key.
fn keys_seen(row: &[f32]) -> Vec<usize> {
    let top = row.iter().fold(0.0f32, |m, x| m.max(*x));
    let weights = row.iter().enumerate().filter(|(_, x)| **x > top / 2.0);
    weights.map(|(j, _)| j).collect()
}

#[test]
fn defect_12_a_window_keeps_exactly_w_keys() {
    for device in devices() {
        // Equal scores, and V the unit matrix: a row's output shows which keys it saw.
        let (len, dim) = (60usize, 64usize);
        let mut data = Qkv::new(9, BF16, shape([1, 1, 1], (len, len), dim));
        data.q.fill(0.0);
        data.v.iter_mut().enumerate().for_each(|(n, x)| {
            *x = f32::from(u8::from(n / dim == n % dim));
        });
        let expected = |w: usize, i: usize| (i + 1).saturating_sub(w)..i + 1;
        for w in [1usize, 2, 3, 16, 17, 32, 59, 60, 61] {
            let problem = data.builder().causal(true).window(w).build().unwrap();
            let (_, flags) = data.run(&device, &problem);

            let mask_params = SdpaMaskParams {
                seq_len_q: len as u32,
                seq_len_k: len as u32,
                window_size: Some(w as u32),
                causal: true,
                q_abs_offset: 0,
            };
            let [q, k, v, out] = data.buffers(&device);
            let mask = commit(&device, |e| {
                let registry = &mut KernelRegistry::new();
                let mask = build_sdpa_mask_bf16(&device, registry, e, &mask_params)?;
                let problem = data.builder().mask(MaskSpec::plane(BF16, len)).build()?;
                let operands = Operands {
                    mask: Some(&mask),
                    ..Operands::new(&q, &k, &v, &out)
                };
                ops::attention(e, &problem, &operands)?;
                Ok(mask)
            });
            let masked = download(&out);
            let cells = download(&mask);
            for i in 0..len {
                let keys: Vec<usize> = expected(w, i).collect();
                let row = i * dim..i * dim + len;
                assert_eq!(keys_seen(&flags[row.clone()]), keys, "flags, w {w} row {i}");
                assert_eq!(keys_seen(&masked[row]), keys, "mask, w {w} row {i}");
                let open: Vec<usize> = (0..len).filter(|j| cells[i * len + j] == 0.0).collect();
                assert_eq!(open, keys, "cells, w {w} row {i}");
            }
            // Decode, at the last position.
            let mut decode = Decode::new(DType::F32, dim, len, len + 4);
            decode.q.fill(0.0);
            for (n, x) in decode.v.iter_mut().enumerate() {
                let key = n / dim % (len + 4);
                *x = f32::from(u8::from(key == n % dim));
            }
            let params = FlashAttnVecParams {
                mask_type: 2,
                sliding_window: w as u32,
                ..decode.params()
            };
            let got = decode.run(&device, &params);
            let keys: Vec<usize> = expected(w, len - 1).collect();
            assert_eq!(keys_seen(&got[..len]), keys, "decode, w {w}");
        }
    }
}
