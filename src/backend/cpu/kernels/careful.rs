//! The careful pass: the second computation of rows whose output was not finite. A probability of 0 removes
//! a hidden key from the sum unless the key's V is NaN or infinite, since 0 times either is NaN. So the rows
//! are computed again with 0 in place of every such element, by the same instructions in the same order.
//! Meanwhile this module records which rows see such an element; at the end it writes infinity or NaN over
//! the outputs of those rows.

use half::{bf16, f16};

use super::blocks::{BLOCK, Elements, Scaled};
use super::buffer::Buffer;
use super::call::{Call, HeadTask, STRIP};
use super::kv_rows::KvRows;
use super::mask_lookup::is_shown;
use super::simd::{Elem, Row};
use super::tile::Tile;
use super::types::{Float, Stored, with_float, with_stored};

/// Kinds of elements of V that are not finite, a bit for each: NaN, +infinity (`ABOVE`) and -infinity (`BELOW`).
/// 0 where all elements are finite.
type Kinds = u8;
const NAN: Kinds = 1;
const ABOVE: Kinds = 2;
const BELOW: Kinds = 4;

/// Scratch of a careful pass, beyond that of an ordinary pass.
#[derive(Debug, Default)]
pub(super) struct Careful {
    /// V of one strip, `[key][D]`, with 0 for what is not finite.
    clean: Buffer,
    /// The keys that have such elements.
    keys: Vec<usize>,
    /// Their kinds, `[one of these keys][D]`.
    kinds: Vec<Kinds>,
    /// What reached each output, `[row][D]`.
    pub(super) reached: Vec<Kinds>,
}

/// An element whose kind can be told.
trait Kind: Elem {
    fn is_finite(self) -> bool;
    fn kind(self) -> Kinds;
    fn from_f32(x: f32) -> Self;
}

macro_rules! kind {
    ($ty:ty, $from:expr) => {
        impl Kind for $ty {
            fn is_finite(self) -> bool {
                self.is_finite()
            }
            fn kind(self) -> Kinds {
                if self.is_finite() {
                    0
                } else if self.is_nan() {
                    NAN
                } else if self.is_sign_negative() {
                    BELOW
                } else {
                    ABOVE
                }
            }
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
        }
    };
}
kind!(bf16, bf16::from_f32);
kind!(f16, f16::from_f32);
kind!(f32, std::convert::identity);

/// What a row of V consists of, as the careful pass replaces it: an element, or a block.
trait Part: Row + Copy {
    fn all_finite(&self) -> bool;
    /// The kinds of its elements.
    fn kinds(&self, to: &mut Vec<Kinds>);
    /// Zeros in place of elements that are not finite.
    fn cleaned(self) -> Self;
}

impl<T: Kind> Part for T {
    fn all_finite(&self) -> bool {
        Kind::is_finite(*self)
    }
    fn kinds(&self, to: &mut Vec<Kinds>) {
        to.push(self.kind());
    }
    fn cleaned(self) -> Self {
        if Kind::is_finite(self) { self } else { T::ZERO }
    }
}

/// A block has elements that are not finite where its scale is not: all of them, since 0 times that is NaN.
impl<E: Elements> Part for Scaled<E> {
    fn all_finite(&self) -> bool {
        self.scale().is_finite()
    }
    fn kinds(&self, to: &mut Vec<Kinds>) {
        let scale = self.scale().to_f32();
        to.extend((0..BLOCK).map(|i| (scale * f32::from(self.element(i))).kind()));
    }
    fn cleaned(self) -> Self {
        if self.all_finite() {
            self
        } else {
            self.with_scale(f16::ZERO)
        }
    }
}

impl Careful {
    /// Begins a run of `rows` rows.
    pub(super) fn begin(&mut self, call: &Call<'_>, rows: usize) {
        self.reached.clear();
        self.reached.resize(rows * call.dim, 0);
    }

    /// V of a strip without what is not finite.
    ///
    /// # Safety
    /// The job's promises hold.
    pub(super) unsafe fn clean(
        &mut self,
        call: &Call<'_>,
        task: &HeadTask,
        strip: usize,
    ) -> KvRows {
        // SAFETY: as promised by the caller; the type is V's.
        with_stored!(call.v, T => unsafe { self.clean_as::<T>(call, task, strip) })
    }

    unsafe fn clean_as<T: Part>(
        &mut self,
        call: &Call<'_>,
        task: &HeadTask,
        strip: usize,
    ) -> KvRows {
        let keys = task.strip_keys(call, strip);
        let from = task.strip_rows(call, strip).v;
        let row_bytes = call.v.bytes(call.dim);
        let parts = row_bytes / size_of::<T>();
        let to: *mut T = self.clean.reserve(STRIP * call.dim).cast();
        self.keys.clear();
        self.kinds.clear();
        for (i, key) in keys.enumerate() {
            // SAFETY: V has this key; there is room for a strip of the widest elements.
            let (row, clean) = unsafe {
                let row = from.row::<T>(i);
                let clean = to.add(i * parts);
                row.copy_to_nonoverlapping(clean, parts);
                (
                    std::slice::from_raw_parts(row, parts),
                    std::slice::from_raw_parts_mut(clean, parts),
                )
            };
            // An early exit would keep the compiler from vectorising the loop.
            if row.iter().fold(true, |all, x| all & x.all_finite()) {
                continue;
            }
            self.keys.push(key);
            for (x, clean) in row.iter().zip(clean) {
                x.kinds(&mut self.kinds);
                *clean = x.cleaned();
            }
        }
        KvRows::strided(to.cast_const().cast(), row_bytes, from.len())
    }

    /// Takes note of what the last cleaned strip holds for the rows that see it.
    ///
    /// # Safety
    /// The job's promises hold.
    pub(super) unsafe fn note(&mut self, tile: &Tile<'_>) {
        let dim = tile.call.dim;
        let (keys, kinds) = (&self.keys, &self.kinds);
        for (row, reached) in tile.rows.iter().zip(self.reached.chunks_exact_mut(dim)) {
            let first = keys.partition_point(|key| *key < row.keys.start);
            let seen = keys[first..].iter().take_while(|key| **key < row.keys.end);
            for (key, kinds) in seen.zip(kinds[first * dim..].chunks_exact(dim)) {
                // SAFETY: as promised by the caller; the key is there.
                if unsafe { is_shown(tile.call, row, tile.task.sequence.key_len, *key) } {
                    merge_kinds(reached, kinds);
                }
            }
        }
    }

    /// Overwrites the outputs of rows that see elements of V that are not finite: an infinity where the row sees
    /// infinities of one sign alone and its output is not NaN already, NaN otherwise.
    ///
    /// # Safety
    /// The job's promises hold, and the rows have been written.
    pub(super) unsafe fn write(&self, tile: &Tile<'_>) {
        // SAFETY: as promised by the caller; the type is O's.
        with_float!(tile.call.float, T => unsafe { self.write_as::<T>(tile) });
    }

    unsafe fn write_as<T: Kind>(&self, tile: &Tile<'_>) {
        let call = tile.call;
        for (row, reached) in tile.rows.iter().zip(self.reached.chunks_exact(call.dim)) {
            let sequence = &tile.task.sequence;
            let at = call.problem.o_at(sequence, row.head, row.position);
            for (column, kinds) in reached.iter().enumerate().filter(|(_, kinds)| **kinds != 0) {
                // SAFETY: the row of O is there, and this tile's alone.
                unsafe {
                    let to = call.at.o.cast::<T>().add(at + column);
                    // What else was summed up is finite, or NaN for another reason.
                    let nan = T::kind(to.read()) == NAN;
                    to.write(T::from_f32(match *kinds {
                        ABOVE if !nan => f32::INFINITY,
                        BELOW if !nan => f32::NEG_INFINITY,
                        _ => f32::NAN,
                    }));
                }
            }
        }
    }
}

/// Adds `more` to what reached a row.
pub(super) fn merge_kinds(reached: &mut [Kinds], more: &[Kinds]) {
    reached.iter_mut().zip(more).for_each(|(a, b)| *a |= b);
}
