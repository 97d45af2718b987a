//! Sizes past what 16 and 32 bits count.

use cudarc::driver::result;
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{Problem, QueryOffset, Shape};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{CpuOptions, MlxDevice};

use crate::common::{Qkv, attend, bytes, normal, output, shape, to_bytes, upload};
use crate::{BF16, cuda, distance};

#[test]
fn a_head_of_131072_tokens_runs() {
    let Some(device) = cuda() else { return };
    let n = 131_072;
    let data = Qkv::new(4, BF16, shape([1, 1, 1], (n, n), 64));
    let (_, got) = data.run(&device, &data.builder().causal(true).build().unwrap());
    // The last rows alone, on the CPU.
    let (rows, from) = (64, (n - 64) * 64);
    let last = Qkv {
        shape: Shape {
            query_len: rows,
            ..data.shape
        },
        q: data.q[from..].to_vec(),
        k: data.k.clone(),
        v: data.v.clone(),
        dtype: BF16,
    };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let problem = last
        .builder()
        .causal(true)
        .query_offset(QueryOffset::BottomRight);
    let (_, want) = last.run(&cpu, &problem.build().unwrap());
    assert!(distance(&got[from..], &want) < 2.0 * relative_bound(BF16));
    // Row 0 sees key 0 alone.
    assert_eq!(got[..64], data.v[..64]);
}

/// Device memory of the driver's, freed when dropped.
struct Raw(u64);

impl Raw {
    fn zeroed(bytes: usize) -> Self {
        // SAFETY: the device is open and its context current; the memory has as many bytes.
        unsafe {
            let at = result::malloc_sync(bytes).unwrap();
            result::memset_d8_sync(at, 0, bytes).unwrap();
            Self(at)
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once, after the last use.
        unsafe { result::free_sync(self.0).unwrap() };
    }
}

#[test]
fn more_than_2_to_the_31_elements_are_reached() {
    let Some(device) = cuda() else { return };
    let dim = 128;
    // The last row of a long cache, and the last of many heads.
    for (heads, rows, keys) in [(1, 1, (1 << 24) + 1_000), (64, 200, 270_000)] {
        let s = shape([1, heads, heads], (rows, keys), dim);
        let elements = heads * keys * dim;
        assert!(elements > 1 << 31);
        // SAFETY: the device is open, so the driver is there; released below.
        unsafe {
            let gpu = result::device::get(0).unwrap();
            result::ctx::set_current(result::primary_ctx::retain(gpu).unwrap()).unwrap();
        }
        let (k, v) = (Raw::zeroed(2 * elements), Raw::zeroed(2 * elements));
        let key = to_bytes(&vec![8.0; dim], BF16);
        let value = to_bytes(&normal(3, dim, BF16), BF16);
        let at = 2 * (elements - dim) as u64;
        // SAFETY: the last row of either.
        unsafe {
            result::memcpy_htod_sync(k.0 + at, &key).unwrap();
            result::memcpy_htod_sync(v.0 + at, &value).unwrap();
        }
        // SAFETY: the memory is there until the buffers are dropped.
        let wrap = |raw: &Raw| unsafe {
            device
                .cuda_wrap(raw.0, 2 * elements, BF16, vec![elements])
                .unwrap()
        };
        let (kb, vb) = (wrap(&k), wrap(&v));
        let q = upload(
            &device,
            &vec![1.0; heads * rows * dim],
            BF16,
            &[heads * rows * dim],
        );
        let out = output(&device, heads * rows * dim, BF16);
        let problem = Problem::builder(BF16, s).build().unwrap();
        attend(&device, &problem, &Operands::new(&q, &kb, &vb, &out));
        let last = 2 * (heads * rows - 1) * dim;
        assert!(bytes(&out)[last..] == value, "{heads} heads");
        drop((kb, vb));
        drop((k, v));
        // SAFETY: retained above.
        unsafe { result::primary_ctx::release(result::device::get(0).unwrap()).unwrap() };
    }
}
