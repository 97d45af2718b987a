//! AVX-512 with tiles of bf16 (AMX). The compiler knows no tiles without its unstable features, so a
//! whole product is one piece of assembly; all else is that of [`super::avx512bf16`].

use std::arch::asm;

use super::avx512::Avx512;
use super::avx512bf16::Bf16Dot;
use super::micro::{Kernel, Vector};
use super::simd::Row;

/// Products of 16 x 16 words of two bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Tiles(Bf16Dot);

impl Bf16Tiles {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ, VL and BF16, and AMX-BF16, which the process may use.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        // SAFETY: as promised by the caller.
        Self(unsafe { Bf16Dot::assume() })
    }
}

/// Shapes of the eight tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All whole: 0 and 1 are sums, 2 is rows of A, 3 and 4 are columns of B.
static SHAPES: Shapes = Shapes {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// An assembly block that leaves nothing in the tiles.
macro_rules! tiles {
    ($($part:tt)*) => {
        asm!($($part)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack))
    };
}

impl Kernel for Bf16Tiles {
    type S = Avx512;
    const PAIR: usize = 2;
    const TILE: usize = 16;
    const DEGREE: usize = Bf16Dot::DEGREE;

    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0.simd()
    }
    #[inline(always)]
    fn multiply(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self> {
        self.0.multiply(a, b, acc)
    }
    #[inline(always)]
    fn open_tiles(self) {
        // SAFETY: the token proves the features; the shapes are ones that the processor takes.
        unsafe { tiles!("ldtilecfg [{shapes}]", shapes = in(reg) &raw const SHAPES) }
    }
    #[inline(always)]
    fn close_tiles(self) {
        // SAFETY: the token proves the features.
        unsafe { tiles!("tilerelease") }
    }
    #[inline(always)]
    unsafe fn product_of_tiles<const NV: usize>(
        self,
        steps: usize,
        row: usize,
        a: *const u32,
        b: *const u32,
        sums: *mut f32,
    ) {
        const { assert!(NV == 1 || NV == 2) };
        // SAFETY: the caller's addresses cover 16 rows of `steps` words of A, `steps` rows of `NV`
        // vectors of B and 16 of the sums, 16 divides `steps`, and the tiles are open.
        unsafe {
            tiles!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm2, [{a} + {row} * 1]",
                "tileloadd tmm3, [{b} + {width} * 1]",
                "tdpbf16ps tmm0, tmm2, tmm3",
                ".if {wide}",
                "tileloadd tmm4, [{b} + {width} * 1 + 64]",
                "tdpbf16ps tmm1, tmm2, tmm4",
                ".endif",
                "add {a}, 64",
                "add {b}, 1024 + 1024 * {wide}",
                "sub {steps}, 16",
                "ja 2b",
                "tilestored [{sums} + {width} * 1], tmm0",
                ".if {wide}",
                "tilestored [{sums} + {width} * 1 + 64], tmm1",
                ".endif",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                steps = inout(reg) steps => _,
                row = in(reg) 4 * row,
                width = in(reg) 64 * NV,
                sums = in(reg) sums,
                wide = const NV / 2
            );
        }
    }
    #[inline(always)]
    unsafe fn row_words<T: Row>(self, row: *const T, first: usize, count: usize) -> Vector<Self> {
        // SAFETY: as promised by the caller.
        unsafe { self.0.row_words(row, first, count) }
    }
    #[inline(always)]
    unsafe fn value_words<T: Row>(self, rows: [*const T; 2], column: usize) -> Vector<Self> {
        // SAFETY: as promised by the caller.
        unsafe { self.0.value_words(rows, column) }
    }
    #[inline(always)]
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [Vector<Self>; NR]) {
        // SAFETY: as promised by the caller.
        unsafe { self.0.store_probabilities(at, p) }
    }
}
