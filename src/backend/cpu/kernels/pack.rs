//! Packing a strip of K and V into the order in which the micro-kernel reads them, converted on the
//! way. K: panels of `NR` vectors of keys, `[panel][unit of D][keys]`. V: panels of `NR` vectors of
//! columns, then single vectors for what is left, `[panel][unit of keys][columns]`. Units that one
//! multiplication takes together are woven. Keys that are not there are zeros up to the end of their
//! panel, so that nothing past the last key is read.

use std::ops::Range;

use super::call::{Call, Unit, Values};
use super::micro::{Kernel, weave};
use super::simd::{Elem, Simd};
use super::types::{Float, with_elements, with_float};

/// Packs strip `strip` of a unit, with `values` as its V.
///
/// # Safety
/// The job's promises hold; `values` has a row for each key of the strip; `k` and `v` have room for [`Call::strip_units`].
#[inline(always)]
pub(super) unsafe fn pack<K: Kernel, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    unit: &Unit,
    strip: usize,
    values: Values,
    k: *mut u32,
    v: *mut u32,
) {
    // SAFETY: as promised by the caller; the type is the operands'.
    unsafe {
        with_elements!(K, call.kv_float, T => {
            both::<K, T, NR>(kernel, call, unit, strip, values, k, v)
        })
    }
}

/// Asks for the lines of some keys of K and V.
#[inline(always)]
pub(super) fn ask_for<S: Simd>(s: S, call: &Call<'_>, unit: &Unit, keys: Range<usize>) {
    let size = call.kv_float.size_of();
    let row = |base: *const u8, at: usize, stride: usize, key: usize| {
        base.wrapping_add((at + (key - keys.start) * stride) * size)
    };
    let k = call.problem.k_at(&unit.sequence, unit.kv_head, keys.start);
    let v = call.problem.v_at(&unit.sequence, unit.kv_head, keys.start);
    for key in keys.clone() {
        let k = row(call.at.k.cast(), k, call.key_stride, key);
        let v = row(call.at.v.cast(), v, call.value_stride, key);
        for line in (0..call.dim * size).step_by(64) {
            s.prefetch_far(k.wrapping_add(line));
            s.prefetch_far(v.wrapping_add(line));
        }
    }
}

#[inline(always)]
unsafe fn both<K: Kernel, T: Elem, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    unit: &Unit,
    strip: usize,
    values: Values,
    k: *mut u32,
    v: *mut u32,
) {
    let keys = unit.strip_keys(call, strip);
    let k_at = call.problem.k_at(&unit.sequence, unit.kv_head, keys.start);
    // SAFETY: rows `keys` of K and V are there.
    unsafe {
        pack_keys::<K, T, NR>(
            kernel,
            call,
            call.at.k.cast::<T>().add(k_at),
            keys.len(),
            k.cast(),
        );
        pack_values::<K, T, NR>(
            kernel,
            call,
            (values.first.cast::<T>(), values.stride),
            keys.len(),
            v.cast(),
        );
    }
}

#[inline(always)]
unsafe fn pack_keys<K: Kernel, T: Elem, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    rows: *const T,
    count: usize,
    to: *mut f32,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let width = NR * lanes;
    let depth = call.depth;
    for block in 0..count.div_ceil(width) * NR {
        let first = block * lanes;
        let there = count.saturating_sub(first).min(lanes);
        // SAFETY: block `block` lies in a panel of this strip.
        let panel = unsafe { to.add(first / width * depth * width + first % width) };
        for c in (0..depth).step_by(lanes) {
            let columns = (depth - c).min(lanes);
            let held = call.dim_units.saturating_sub(c).min(lanes);
            let mut tile = s.zeros();
            // SAFETY: rows below `there` and units below `depth` exist.
            unsafe {
                if there == lanes {
                    for (r, v) in tile.as_mut().iter_mut().enumerate() {
                        let at = rows.add((first + r) * call.key_stride + c * K::PAIR);
                        s.prefetch_far(at.wrapping_add(lanes * call.key_stride).cast());
                        *v = kernel.row_units(at, held);
                    }
                } else {
                    for (r, v) in tile.as_mut().iter_mut().take(there).enumerate() {
                        let at = rows.add((first + r) * call.key_stride + c * K::PAIR);
                        *v = kernel.row_units(at, held);
                    }
                }
                let mut tile = s.transpose(tile);
                weave(kernel, tile.as_mut());
                for (i, v) in tile.as_ref().iter().take(columns).enumerate() {
                    s.store(panel.add((c + i) * width), *v);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn pack_values<K: Kernel, T: Elem, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    (rows, stride): (*const T, usize),
    count: usize,
    to: *mut f32,
) {
    let lanes = <K::S as Simd>::LANES;
    let width = NR * lanes;
    let height = call.strip / K::PAIR;
    let panelled = call.dim / width * width;
    let row = |key: usize| {
        if key < count {
            // SAFETY: the key exists.
            unsafe { rows.add(key * stride) }
        } else {
            std::ptr::null()
        }
    };
    for step in (0..count.div_ceil(width) * width / K::PAIR).step_by(K::SIDE) {
        let keys = [step, step + 1].map(|step| [row(step * K::PAIR), row(step * K::PAIR + 1)]);
        // SAFETY: the steps lie in the strip, and the columns exist.
        unsafe {
            for column in (0..panelled).step_by(width) {
                let to = to.add(column * height + step * width);
                pack_columns::<K, T, NR>(kernel, keys, column, to);
            }
            for column in (panelled..call.dim).step_by(lanes) {
                let to = to.add(column * height + step * lanes);
                pack_columns::<K, T, 1>(kernel, keys, column, to);
            }
        }
    }
}

/// Packs `NV` vectors of columns of `SIDE` units of keys; null where there is no key.
#[inline(always)]
unsafe fn pack_columns<K: Kernel, T: Elem, const NV: usize>(
    kernel: K,
    keys: [[*const T; 2]; 2],
    column: usize,
    to: *mut f32,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    for j in 0..NV {
        let at = |row: *const T| {
            if row.is_null() {
                row
            } else {
                row.wrapping_add(column + j * lanes)
            }
        };
        let mut block = s.zeros();
        let units = &mut block.as_mut()[..K::SIDE];
        // SAFETY: as promised by the caller.
        unsafe {
            for (units, keys) in units.iter_mut().zip(keys) {
                *units = kernel.value_units(keys.map(at));
            }
            weave(kernel, units);
            for (i, units) in units.iter().enumerate() {
                s.store(to.add((i * NV + j) * lanes), *units);
            }
        }
    }
}
