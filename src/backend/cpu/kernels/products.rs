//! The two matrix products of some query rows with a strip of keys, whatever form K and V are in.

use std::ops::Range;

use super::call::Call;
use super::micro::Kernel;
use super::running::Lanes;
use super::simd::Simd;
use super::span::Span;

/// K and V of a strip, in some form.
pub(super) trait Strip: Copy {
    /// What the rows of a micro-kernel must be a multiple of.
    fn side<K: Kernel>() -> usize {
        1
    }
    /// Prefetches the part of the next strip that falls to rows `share` of all `rows`.
    fn prefetch_next<S: Simd>(self, _s: S, _call: &Call<'_>, _share: Range<usize>, _rows: usize) {}
    /// Writes the scaled scores of `MR` rows.
    unsafe fn scores<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    );
    /// Adds the probabilities' product with V to the outputs of `MR` rows.
    unsafe fn values<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    );
}

/// The two matrix products of some rows with a strip.
#[derive(Debug, Clone, Copy)]
pub(super) struct Products<'a> {
    pub(super) call: &'a Call<'a>,
    /// The panels to compute.
    pub(super) all: Span,
    /// Of their words of keys, the first that some row sees, and one past the last.
    pub(super) keys: [usize; 2],
    pub(super) queries: *const u32,
    /// Words from one row of Q to the next.
    pub(super) query_row: usize,
    pub(super) scores: *mut f32,
    pub(super) outputs: *mut f32,
    /// What the outputs so far are multiplied by; nothing where there are none yet.
    pub(super) rescale: Option<&'a Lanes>,
}

impl Products<'_> {
    /// Adds a vector of row `r` to the outputs.
    #[inline(always)]
    pub(super) unsafe fn accumulate<S: Simd>(&self, s: S, r: usize, column: usize, x: S::V) {
        // SAFETY: the outputs are there.
        unsafe {
            let at = self.outputs.add(r * self.call.dim + column);
            let x = match self.rescale {
                Some(factors) => s.fma(s.load(at), s.splat(factors[r]), x),
                None => x,
            };
            s.store(at, x);
        }
    }
}
