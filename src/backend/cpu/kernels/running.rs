//! The running maximum and sum of each row's softmax (Milakov and Gimelshein 2018, "Online
//! normalizer calculation for softmax"): rows that are worked on together are brought up to date
//! together, a lane for each.

use std::ops::Range;

use super::buffer::Buffer;
use super::math::LOG2_E;
use super::simd::Simd;

/// Most rows that are worked on together, rounded up to whole vectors.
pub(super) const GROUP: usize = 16;

/// One number for each of some rows.
pub(super) type Lanes = [f32; GROUP];

/// The largest score so far of each row, and the sum of `exp(score - largest)`, in a thread's
/// scratch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    maxima: *mut f32,
    sums: *mut f32,
}

/// Running maxima of some rows after a strip, and how they changed.
#[derive(Debug)]
pub(super) struct MaxUpdate {
    /// The largest score of each row.
    pub(super) maxima: Lanes,
    /// What earlier sums of each row must be multiplied by.
    pub(super) factors: Lanes,
    /// Whether no row had seen a key before.
    pub(super) first: bool,
}

impl Running {
    /// `rows` rows that have seen no key.
    pub(super) fn new(buffer: &mut Buffer, rows: usize) -> Self {
        // A group may begin at any row.
        let room = rows + GROUP;
        let maxima: *mut f32 = buffer.reserve(2 * room).cast();
        // SAFETY: there is room for all of it.
        unsafe {
            std::slice::from_raw_parts_mut(maxima, room).fill(f32::NEG_INFINITY);
            maxima.add(room).write_bytes(0, room);
            Self {
                maxima,
                sums: maxima.add(room),
            }
        }
    }

    /// The maximum and the sum of a row.
    ///
    /// # Safety
    /// There is such a row.
    pub(super) unsafe fn get(self, row: usize) -> (f32, f32) {
        // SAFETY: as promised by the caller.
        unsafe { (*self.maxima.add(row), *self.sums.add(row)) }
    }

    /// Sets the maximum and the sum of a row.
    ///
    /// # Safety
    /// There is such a row.
    pub(super) unsafe fn set(self, row: usize, max: f32, sum: f32) {
        // SAFETY: as promised by the caller.
        unsafe {
            *self.maxima.add(row) = max;
            *self.sums.add(row) = sum;
        }
    }

    /// Takes the largest scores of a strip, `-inf` where a row saw no key of it, into the maxima of
    /// `rows`, at most [`GROUP`] of them. A score that overflowed counts as the largest finite one.
    ///
    /// # Safety
    /// There are such rows, and lanes past the last hold `-inf`.
    #[inline(always)]
    pub(super) unsafe fn update_max<S: Simd>(
        self,
        s: S,
        rows: Range<usize>,
        largest: &Lanes,
    ) -> MaxUpdate {
        let mut update = MaxUpdate {
            maxima: [0.0; GROUP],
            factors: [0.0; GROUP],
            first: true,
        };
        let (zero, hidden) = (s.splat(0.0), s.splat(f32::NEG_INFINITY));
        for lane in (0..rows.len()).step_by(S::LANES) {
            // SAFETY: as promised by the caller.
            unsafe {
                let before = s.load(self.maxima.add(rows.start + lane));
                let max = s.max(s.load(largest.as_ptr().add(lane)), before);
                let max = s.min(max, s.splat(f32::MAX));
                // The difference is taken before the product, so that an unchanged maximum gives 1.
                let top = s.pick(s.gt(max, hidden), max, zero);
                let factor = rescale_factors(s, s.sub(before, top));
                let seen = s.gt(before, hidden) << lane;
                update.first &= seen & ((1 << rows.len()) - 1) == 0;
                s.store(self.maxima.add(rows.start + lane), max);
                s.store(update.maxima.as_mut_ptr().add(lane), max);
                s.store(update.factors.as_mut_ptr().add(lane), factor);
            }
        }
        update
    }

    /// Adds the sums of a strip to those of `rows`.
    ///
    /// # Safety
    /// There are such rows, and lanes past the last of these rows hold 0.
    #[inline(always)]
    pub(super) unsafe fn add_sums<S: Simd>(
        self,
        s: S,
        rows: Range<usize>,
        update: &MaxUpdate,
        sums: &Lanes,
    ) {
        for lane in (0..rows.len()).step_by(S::LANES) {
            // SAFETY: as promised by the caller.
            unsafe {
                let at = self.sums.add(rows.start + lane);
                let factor = s.load(update.factors.as_ptr().add(lane));
                let sum = s.load(sums.as_ptr().add(lane));
                s.store(at, s.fma(s.load(at), factor, sum));
            }
        }
    }
}

/// `exp(difference)`, with what the product with `log2(e)` loses made good: the error of a factor is
/// that of all sums before it.
#[inline(always)]
fn rescale_factors<S: Simd>(s: S, difference: S::V) -> S::V {
    // Far below what is not 0, and finite.
    let d = s.max(difference, s.splat(-1000.0));
    let (high, low) = (s.splat(LOG2_E), s.splat(LOG2_E_REST));
    let t = s.mul(d, high);
    let lost = s.fma(d, low, s.fma(d, high, s.sub(s.splat(0.0), t)));
    let factor = s.exp2::<5>(t);
    s.fma(s.mul(factor, lost), s.splat(std::f32::consts::LN_2), factor)
}

/// `log2(e)` less its f32.
const LOG2_E_REST: f32 = (std::f64::consts::LOG2_E - LOG2_E as f64) as f32;

/// What sums must be multiplied by when the maximum rises from `before` to `max`.
pub(super) fn rescale_factor(before: f32, max: f32) -> f32 {
    ((f64::from(before) - f64::from(max)) * std::f64::consts::LOG2_E).exp2() as f32
}
