//! The kernels of each instruction set: the generic ones, inlined into functions that enable its
//! features.

use std::ops::Range;

use super::call::{Call, KernelShape, ScanMask};
use super::kv_rows::StripRows;
use super::mask_map::Panels;
use super::mask_scan;
use super::micro::{self, Kernel, MultiplyAdd};
use super::pack;
use super::packed::Packed;
use super::peak;
use super::portable::Portable;
use super::simd::Simd;
use super::step;
use super::tile::{self, Tile};
use super::types::Float;
use crate::backend::cpu::isa::Isa;

/// Native functions over one packing of K and V. All of them require that the processor has the
/// instruction set, and what the generic function of the same name requires.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) shape: KernelShape,
    pub(super) pack: unsafe fn(&Call<'_>, StripRows, *mut u32, *mut u32),
    pub(super) begin: unsafe fn(&mut Tile<'_>),
    pub(super) step: unsafe fn(&mut Tile<'_>, Packed),
    pub(super) step_in_place: unsafe fn(&mut Tile<'_>, usize, StripRows),
    pub(super) finish: unsafe fn(&mut Tile<'_>),
    pub(super) scan_mask: ScanMask,
    pub(super) rounds: unsafe fn(usize) -> f64,
}

impl Kernels {
    /// These kernels, or those of AVX2 where a row of `dim` elements is no whole number of these kernels'
    /// vectors: only AVX-512 has vectors wider than the 8 elements that every head dim is a multiple of, and
    /// every processor with AVX-512 has AVX2.
    pub(super) fn for_dim(&'static self, dim: usize) -> &'static Self {
        #[cfg(target_arch = "x86_64")]
        if !dim.is_multiple_of(self.shape.lanes) {
            return &avx2::AVX2;
        }
        let _ = dim;
        self
    }
}

/// One table: how its token is had, the micro-kernel's rows and vectors, and the features.
macro_rules! kernels {
    ($name:ident, $module:ident, $kernel:ty, $token:expr, $mr:literal x $nr:literal
        $(, $features:literal)?) => {
        mod $module {
            use super::*;

            const ROWS: usize = $mr;
            const _: () = assert!(ROWS.is_multiple_of(micro::side::<$kernel>()));

            $(#[target_feature(enable = $features)])?
            unsafe fn pack(call: &Call<'_>, rows: StripRows, k: *mut u32, v: *mut u32) {
                // SAFETY: as promised by the caller.
                unsafe { pack::pack::<$kernel, $nr>($token, call, rows, k, v) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn begin(tile: &mut Tile<'_>) {
                // SAFETY: as promised by the caller.
                unsafe { tile::begin::<$kernel>($token, tile) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn step(tile: &mut Tile<'_>, packed: Packed) {
                // SAFETY: as promised by the caller.
                unsafe { step::step::<$kernel, $mr, $nr>($token, tile, packed) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn step_in_place(tile: &mut Tile<'_>, strip: usize, rows: StripRows) {
                // SAFETY: as promised by the caller.
                unsafe { step::step_in_place::<$kernel, $nr>($token, tile, strip, rows) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn scan_mask(call: &Call<'_>, offset: usize, strips: Range<usize>, to: *mut Panels) {
                // SAFETY: as promised by the caller.
                unsafe { mask_scan::scan::<_, $nr>($token.simd(), call, offset, strips, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish(tile: &mut Tile<'_>) {
                // SAFETY: as promised by the caller.
                unsafe { tile::finish::<$kernel>($token, tile) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rounds(rounds: usize) -> f64 {
                // SAFETY: as promised by the caller.
                unsafe { peak::rounds::<$kernel, $mr, $nr>($token, rounds) }
            }

            pub(super) static $name: Kernels = Kernels {
                shape: KernelShape {
                    pair: <$kernel as Kernel>::PAIR,
                    side: micro::side::<$kernel>(),
                    rows: ROWS,
                    lanes: <<$kernel as Kernel>::S as Simd>::LANES,
                },
                pack,
                begin,
                step,
                step_in_place,
                finish,
                scan_mask,
                rounds,
            };
        }
    };
}

#[cfg(test)]
use super::tests::tiles::PlainTiles;
#[cfg(test)]
kernels!(PLAIN_TILES, plain_tiles, PlainTiles, PlainTiles, 16 x 8);

kernels!(PORTABLE, portable, MultiplyAdd<Portable>, MultiplyAdd(Portable), 4 x 2);

#[cfg(target_arch = "x86_64")]
use super::{amxbf16::Bf16Tiles, avx2::Avx2, avx512::Avx512, avx512bf16::Bf16Dot};
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, avx2, MultiplyAdd<Avx2>, MultiplyAdd(Avx2::assume()), 6 x 2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(AVX512, avx512, MultiplyAdd<Avx512>, MultiplyAdd(Avx512::assume()), 12 x 2,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl");
#[cfg(target_arch = "x86_64")]
kernels!(AVX512_BF16, avx512bf16, Bf16Dot, Bf16Dot::assume(), 12 x 2,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");
// Its own features are no part of this: the compiler is told nothing of tiles.
#[cfg(target_arch = "x86_64")]
kernels!(AMX_BF16, amxbf16, Bf16Tiles, Bf16Tiles::assume(), 16 x 2,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");

#[cfg(target_arch = "aarch64")]
use super::{neon::Neon, neonbf16::Bf16Matrix};
#[cfg(target_arch = "aarch64")]
kernels!(NEON, neon, MultiplyAdd<Neon>, MultiplyAdd(Neon::assume()), 6 x 4, "neon");
#[cfg(target_arch = "aarch64")]
kernels!(NEON_BF16, neonbf16, Bf16Matrix, Bf16Matrix::assume(), 6 x 4, "neon,bf16");

/// What tiles do, where nothing has them.
#[cfg(test)]
pub(super) fn plain_tiles() -> &'static Kernels {
    &plain_tiles::PLAIN_TILES
}

/// The kernels for K and V of `float` under `isa`, or under the portable one where this machine
/// lacks it.
pub(super) fn select(isa: Isa, float: Float) -> &'static Kernels {
    if !isa.is_available() {
        return &portable::PORTABLE;
    }
    match (isa, float) {
        #[cfg(target_arch = "x86_64")]
        (Isa::AmxBf16, Float::Bf16) => &amxbf16::AMX_BF16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, Float::Bf16) => &avx512bf16::AVX512_BF16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16, _) => &avx512::AVX512,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => &avx2::AVX2,
        #[cfg(target_arch = "aarch64")]
        (Isa::NeonBf16, Float::Bf16) => &neonbf16::NEON_BF16,
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonBf16, _) => &neon::NEON,
        _ => &portable::PORTABLE,
    }
}
