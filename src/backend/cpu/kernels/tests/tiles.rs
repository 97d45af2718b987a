//! Matrix tiles in plain Rust: few machines have any, and what is around them can be tested on all.

use std::array::from_fn;
use std::cell::Cell;

use half::bf16;

use crate::backend::cpu::kernels::micro::{Kernel, Vector};
use crate::backend::cpu::kernels::portable::Portable;
use crate::backend::cpu::kernels::simd::{Row, Simd};

const LANES: usize = <Portable as Simd>::LANES;
const TILE: usize = 16;

thread_local! {
    static OPEN: Cell<bool> = const { Cell::new(false) };
}

/// What an AMX kernel does with tiles, number by number.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cpu::kernels) struct PlainTiles;

/// The two bf16 of a word.
fn pair(word: u32) -> [f32; 2] {
    [
        f32::from_bits(word << 16),
        f32::from_bits(word & 0xffff_0000),
    ]
}

fn word(low: u16, high: u16) -> f32 {
    f32::from_bits(u32::from(low) | u32::from(high) << 16)
}

fn dot(a: u32, b: u32, sum: f32) -> f32 {
    let ([a, c], [b, d]) = (pair(a), pair(b));
    sum + a * b + c * d
}

impl Kernel for PlainTiles {
    type S = Portable;
    const PAIR: usize = 2;
    const TILE: usize = TILE;
    const DEGREE: usize = 4;

    fn simd(self) -> Portable {
        Portable
    }
    fn multiply(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self> {
        from_fn(|i| dot(a[i].to_bits(), b[i].to_bits(), acc[i]))
    }
    fn open_tiles(self) {
        assert!(!OPEN.replace(true));
    }
    fn close_tiles(self) {
        assert!(OPEN.replace(false));
    }
    unsafe fn product_of_tiles<const NV: usize>(
        self,
        steps: usize,
        row: usize,
        a: *const u32,
        b: *const u32,
        sums: *mut f32,
    ) {
        assert!(OPEN.get() && steps > 0 && steps.is_multiple_of(TILE));
        for r in 0..TILE {
            for column in 0..NV * LANES {
                // SAFETY: as promised by the caller.
                unsafe {
                    *sums.add(r * NV * LANES + column) = (0..steps).fold(0.0, |sum, k| {
                        dot(*a.add(r * row + k), *b.add(k * NV * LANES + column), sum)
                    });
                }
            }
        }
    }
    unsafe fn row_words<T: Row>(self, row: *const T, first: usize, count: usize) -> Vector<Self> {
        from_fn(|i| match i < count {
            // SAFETY: the word is there; T is bf16.
            true => unsafe { row.cast::<f32>().add(first + i).read_unaligned() },
            false => 0.0,
        })
    }
    unsafe fn value_words<T: Row>(self, rows: [*const T; 2], column: usize) -> Vector<Self> {
        from_fn(|i| {
            let [low, high] = rows.map(|row| match row.is_null() {
                true => 0,
                // SAFETY: a row that is there covers a vector; T is bf16.
                false => unsafe { *row.cast::<u16>().add(column + i) },
            });
            word(low, high)
        })
    }
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [Vector<Self>; NR]) {
        let p = p.as_flattened();
        for (i, p) in p.chunks_exact(2).enumerate() {
            let [low, high] = [p[0], p[1]].map(|p| bf16::from_f32(p).to_bits());
            // SAFETY: the caller's address covers `NR / 2` vectors of words.
            unsafe { *at.add(i) = word(low, high).to_bits() };
        }
    }
}
