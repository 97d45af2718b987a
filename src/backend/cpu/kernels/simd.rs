//! Vectors of f32 as the kernels use them. One implementation for each instruction set; everything
//! above is written once, generically, and inlined into a function that enables the features.

use half::{bf16, f16};

/// An instruction set's vectors. A value is a token: it exists only where the set does, so that
/// arithmetic needs no further promise. Loads and stores take addresses of `LANES` elements, at any
/// alignment that suits the element.
pub(super) trait Simd: Copy + 'static {
    /// `LANES` f32.
    type V: Copy;
    /// `LANES` vectors.
    type Block: Copy + AsRef<[Self::V]> + AsMut<[Self::V]>;
    /// Lanes of a vector; divides 16.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::V;
    /// Lane `i` holds `i`.
    fn iota(self) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// `a * b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Bit `i` tells whether `a > b` in lane `i`.
    fn gt(self, a: Self::V, b: Self::V) -> u32;
    /// Bit `i` tells whether `a != b` in lane `i`.
    fn ne(self, a: Self::V, b: Self::V) -> u32;
    /// Lanes of `a` where the bit is set, of `b` elsewhere.
    fn pick(self, bits: u32, a: Self::V, b: Self::V) -> Self::V;
    /// Lanes of `x` where `a != b`, of `y` elsewhere.
    fn pick_ne(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// The largest lane.
    fn hmax(self, a: Self::V) -> f32;
    /// The sum of all lanes, in an order of its own.
    fn hsum(self, a: Self::V) -> f32;
    /// `2^t` for `t` of at most about 0; exactly 0 far below, and at `-inf`; NaN at NaN. See [`super::math`].
    fn exp2<const DEGREE: usize>(self, t: Self::V) -> Self::V;
    /// Exchanges rows and lanes.
    fn transpose(self, block: Self::Block) -> Self::Block;
    fn zeros(self) -> Self::Block;
    /// Asks for the cache line at an address, which need not be there.
    fn prefetch(self, _at: *const u8) {}
    /// The same, for the second-level cache.
    fn prefetch_far(self, _at: *const u8) {}

    unsafe fn load(self, at: *const f32) -> Self::V;
    unsafe fn store(self, at: *mut f32, v: Self::V);
    unsafe fn load_bf16(self, at: *const bf16) -> Self::V;
    unsafe fn load_f16(self, at: *const f16) -> Self::V;
    /// The f16 at any address in every lane.
    #[inline(always)]
    unsafe fn splat_f16(self, at: *const u8) -> Self::V {
        // SAFETY: the caller's address is an f16's.
        let bytes = unsafe { at.cast::<[u8; 2]>().read() };
        self.splat(f16::from_le_bytes(bytes).to_f32())
    }
    /// `LANES` signed bytes.
    #[inline(always)]
    unsafe fn load_i8(self, at: *const i8) -> Self::V {
        // SAFETY: as promised by the caller.
        unsafe { self.widened(|i| f32::from(*at.add(i))) }
    }
    /// The low halves of `LANES` bytes.
    #[inline(always)]
    unsafe fn load_low_halves(self, at: *const u8) -> Self::V {
        // SAFETY: as promised by the caller.
        unsafe { self.widened(|i| f32::from(*at.add(i) & 15)) }
    }
    /// The high halves of `LANES` bytes.
    #[inline(always)]
    unsafe fn load_high_halves(self, at: *const u8) -> Self::V {
        // SAFETY: as promised by the caller.
        unsafe { self.widened(|i| f32::from(*at.add(i) >> 4)) }
    }
    /// Lane `i` holds `element(i)`.
    #[inline(always)]
    fn widened(self, element: impl Fn(usize) -> f32) -> Self::V {
        let mut lanes = [0.0; 16];
        for (i, lane) in lanes.iter_mut().take(Self::LANES).enumerate() {
            *lane = element(i);
        }
        // SAFETY: a vector has at most 16 lanes.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// Nonzero gives 0, zero gives `-inf`.
    unsafe fn load_bool(self, at: *const u8) -> Self::V;
    /// Rounds to nearest, ties to even.
    unsafe fn store_bf16(self, at: *mut bf16, v: Self::V);
    /// Rounds to nearest, ties to even.
    unsafe fn store_f16(self, at: *mut f16, v: Self::V);
}

/// Writes trait methods whose bodies are intrinsics.
macro_rules! intrinsics {
    ($($(#[$attr:meta])* fn $name:ident $(<const $deg:ident>)? (self $(, $arg:ident: $ty:ty)*) $(-> $ret:ty)? = $body:expr;)*) => {
        $($(#[$attr])* #[inline(always)]
        fn $name $(<const $deg: usize>)? (self $(, $arg: $ty)*) $(-> $ret)? {
            // SAFETY: the token exists only where the instruction set does.
            unsafe { $body }
        })*
    };
    (memory: $($(#[$attr:meta])* fn $name:ident (self $(, $arg:ident: $ty:ty)*) $(-> $ret:ty)? = $body:expr;)*) => {
        $($(#[$attr])* #[inline(always)]
        unsafe fn $name (self $(, $arg: $ty)*) $(-> $ret)? {
            // SAFETY: the token exists only where the instruction set does, and the caller's
            // address covers the elements.
            unsafe { $body }
        })*
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use intrinsics;

/// A mask cell as it lies in memory.
pub(super) trait Cell: Copy + 'static {
    /// What stands in lanes past the last cell.
    const ZERO: Self;
    /// `LANES` cells as additive f32.
    unsafe fn load<S: Simd>(s: S, at: *const Self) -> S::V;
}

/// An element of Q, K, V or O.
pub(super) trait Elem: Cell {
    unsafe fn store<S: Simd>(s: S, at: *mut Self, v: S::V);
}

/// What a row of Q, K or V consists of: elements, or blocks of them.
pub(super) trait Row: 'static {
    /// Whether elements lie in blocks, so that each read of them converts and scales.
    const IN_BLOCKS: bool;
    /// `LANES` elements from `column` on, a multiple of `LANES`, of the row that begins at `row`.
    unsafe fn load_at<S: Simd>(s: S, row: *const Self, column: usize) -> S::V;
    /// Bytes that hold so many elements.
    fn bytes(columns: usize) -> usize;
}

impl<T: Elem> Row for T {
    const IN_BLOCKS: bool = false;
    #[inline(always)]
    unsafe fn load_at<S: Simd>(s: S, row: *const Self, column: usize) -> S::V {
        // SAFETY: as promised by the caller.
        unsafe { T::load(s, row.add(column)) }
    }
    #[inline(always)]
    fn bytes(columns: usize) -> usize {
        columns * size_of::<T>()
    }
}

macro_rules! elem {
    ($ty:ty, $zero:expr, $load:ident, $store:ident) => {
        impl Cell for $ty {
            const ZERO: Self = $zero;
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, at: *const Self) -> S::V {
                // SAFETY: as promised by the caller.
                unsafe { s.$load(at) }
            }
        }
        impl Elem for $ty {
            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, at: *mut Self, v: S::V) {
                // SAFETY: as promised by the caller.
                unsafe { s.$store(at, v) }
            }
        }
    };
}
elem!(f32, 0.0, load, store);
elem!(f16, f16::ZERO, load_f16, store_f16);
elem!(bf16, bf16::ZERO, load_bf16, store_bf16);

impl Cell for u8 {
    const ZERO: Self = 0;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const Self) -> S::V {
        // SAFETY: as promised by the caller.
        unsafe { s.load_bool(at) }
    }
}

/// The first `count` of `LANES` cells; the others are not read and come as zero cells.
#[inline(always)]
pub(super) unsafe fn load_first<S: Simd, T: Cell>(s: S, at: *const T, count: usize) -> S::V {
    if count >= S::LANES {
        // SAFETY: as promised by the caller.
        return unsafe { T::load(s, at) };
    }
    let mut cells = [T::ZERO; 16];
    // SAFETY: `count < LANES <= 16` cells are there to read, and `cells` has room for a vector.
    unsafe {
        std::ptr::copy_nonoverlapping(at, cells.as_mut_ptr(), count);
        T::load(s, cells.as_ptr())
    }
}
