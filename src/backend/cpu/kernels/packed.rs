//! Products with a packed strip of K and V.

use std::ops::Range;

use super::call::{Call, STRIP};
use super::kv_rows::StripRows;
use super::micro::{self, Kernel, product};
use super::pack;
use super::products::{Products, Strip};
use super::simd::Simd;

/// Packed K and V of a strip.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packed {
    pub(super) strip: usize,
    pub(super) k: *const u32,
    pub(super) v: *const u32,
    /// The strip that this thread packs next: it is prefetched meanwhile.
    pub(super) next: Option<StripRows>,
}

/// Up to this many elements of K the next strip is prefetched across the whole current strip; above it,
/// only in the last quarter, or the outputs of other rows evict it again.
const EARLY: usize = 16 << 10;

impl Strip for Packed {
    fn side<K: Kernel>() -> usize {
        micro::side::<K>()
    }

    #[inline(always)]
    fn prefetch_next<S: Simd>(self, s: S, call: &Call<'_>, share: Range<usize>, rows: usize) {
        let Some(next) = self.next else {
            return;
        };
        let keys = next.k.len();
        let late = if keys * call.dim <= EARLY {
            0
        } else {
            rows - rows / 4
        };
        let at = |row: usize| row.saturating_sub(late) * keys / (rows - late).max(1);
        pack::prefetch(s, call, next, at(share.start)..at(share.end));
    }

    #[inline(always)]
    unsafe fn scores<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        let s = kernel.simd();
        let lanes = <K::S as Simd>::LANES;
        let width = NR * lanes;
        let depth = of.call.depth;
        let scale = s.splat(of.call.scale);
        for panel in of.all.first..of.all.end {
            // SAFETY: rows and panels are there.
            unsafe {
                let b = self.k.add(panel * depth * width);
                let scores = of.scores.add(panel * width);
                let mut from = 0;
                while from < depth {
                    let chain = of.call.chain.min(depth - from);
                    let (a, b) = (of.queries.add(from), b.add(from * width));
                    let acc = product::<K, MR, NR>(kernel, chain, of.query_row, a, b);
                    let (first, last) = (from == 0, from + chain == depth);
                    for (r, row) in acc.iter().enumerate() {
                        for (j, x) in row.iter().enumerate() {
                            let at = scores.add(r * STRIP + j * lanes);
                            let x = if first { *x } else { s.add(s.load(at), *x) };
                            s.store(at, if last { s.mul(x, scale) } else { x });
                        }
                    }
                    from += chain;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn values<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        let width = NR * <K::S as Simd>::LANES;
        let panelled = of.call.dim / width * width;
        // SAFETY: rows, keys and columns are there.
        unsafe {
            for column in (0..panelled).step_by(width) {
                self.columns::<K, MR, NR>(kernel, of, column);
            }
            for column in (panelled..of.call.dim).step_by(<K::S as Simd>::LANES) {
                self.columns::<K, MR, 1>(kernel, of, column);
            }
        }
    }
}

impl Packed {
    /// `NV` vectors of columns of [`Strip::values`].
    #[inline(always)]
    unsafe fn columns<K: Kernel, const MR: usize, const NV: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
        column: usize,
    ) {
        let s = kernel.simd();
        let lanes = <K::S as Simd>::LANES;
        let [first, end] = of.keys;
        // SAFETY: rows, keys and columns are there.
        unsafe {
            let a = of.scores.cast::<u32>().add(first);
            let b = self
                .v
                .add(column * of.call.strip / K::PAIR + first * NV * lanes);
            // From 0 in each strip: the sum of a long row is the more exact for it.
            let acc = product::<K, MR, NV>(kernel, end - first, STRIP, a, b);
            for (r, row) in acc.iter().enumerate() {
                for (j, x) in row.iter().enumerate() {
                    of.accumulate(s, r, column + j * lanes, *x);
                }
            }
        }
    }
}
