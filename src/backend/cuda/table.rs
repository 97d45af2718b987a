//! Which kernel serves what: the one table of the CUDA attention kernels, and what is compiled for a
//! row of it.

use std::collections::HashSet;

use super::sources;
use super::spec::Spec;
use crate::attention::{HEAD_DIMS, Problem};
use crate::dtype::DType;

/// A GPU's compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Capability(pub(crate) u32, pub(crate) u32);

impl Capability {
    /// The oldest that is served.
    pub(super) const OLDEST: Self = Self(8, 0);
    const HOPPER: Self = Self(9, 0);
    const NEWEST: Self = Self(u32::MAX, 0);

    /// The compiler's name for it. Hopper's own instructions need the suffix, and images with it run
    /// nowhere else.
    pub(super) fn arch(self) -> String {
        let suffix = if self == Self::HOPPER { "a" } else { "" };
        format!("sm_{}{}{suffix}", self.0, self.1)
    }

    /// The capability that a name of the compiler's, such as `sm_90a`, stands for.
    pub(crate) fn of_arch(arch: &str) -> Option<Self> {
        let digits = arch.strip_prefix("sm_")?.trim_end_matches(['a', 'f']);
        let (major, minor) = digits.split_at_checked(digits.len().checked_sub(1)?)?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }
}

/// What a problem may ask of an attention kernel, a bit each.
pub(super) mod feature {
    /// Keys after a row's position are hidden.
    pub(crate) const RIGHT: u8 = 1;
    /// Keys before a row's position may be hidden.
    pub(crate) const LEFT: u8 = 2;
    pub(crate) const MASK: u8 = 4;
    pub(crate) const CLASSES: u8 = 8;
    /// Softcap or ALiBi.
    pub(crate) const SCORES: u8 = 16;
    pub(crate) const PACKED: u8 = 32;
}
use feature::{CLASSES, LEFT, MASK, PACKED, RIGHT, SCORES};

/// What a problem needs of an attention kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Needs {
    pub(super) dtype: DType,
    pub(super) kv_dtype: DType,
    pub(super) head_dim: usize,
    /// The mask's element type, where there is one.
    pub(super) mask: Option<DType>,
    /// Of [`feature`].
    pub(super) features: u8,
}

impl Needs {
    pub(super) fn of(problem: &Problem) -> Self {
        let shape = problem.shape();
        let visibility = problem.visibility(shape.query_len, shape.key_len);
        let windowed = visibility.window.is_some() || visibility.window_right.is_some();
        let on = |condition, feature| if condition { feature } else { 0 };
        Self {
            dtype: problem.dtype(),
            kv_dtype: problem.kv_dtype(),
            head_dim: shape.qk_dim,
            mask: problem.mask().map(|mask| mask.dtype),
            features: on(visibility.causal, RIGHT)
                | on(windowed, LEFT | RIGHT)
                | on(problem.mask().is_some(), MASK)
                | on(problem.has_tile_classes(), CLASSES)
                | on(problem.softcap().is_some() || problem.has_alibi(), SCORES)
                | on(problem.cu_seqlens().is_some(), PACKED),
        }
    }

    fn has(&self, features: u8) -> bool {
        self.features & features != 0
    }
}

/// Which of the texts a row compiles, and what is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    /// `bm / 16` warps down the rows of a tile, and so many across.
    Portable {
        across: usize,
    },
    Fma,
    /// A warpgroup for each 64 rows of a tile. Registers of the producer's threads and of the others'.
    Hopper {
        registers: (u32, u32),
    },
    HopperWide,
}

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    text: Text,
    /// Oldest and newest GPUs.
    gpus: (Capability, Capability),
    /// Element types of Q.
    dtypes: &'static [DType],
    /// Head dims.
    dims: &'static [usize],
    /// Sets of features that it has together.
    features: &'static [u8],
    /// Most query rows of all heads of one key/value head.
    pub(super) rows: usize,
    /// Most keys.
    pub(super) keys: usize,
    /// Query rows of a tile.
    pub(super) bm: usize,
    /// Keys of a tile.
    pub(super) bn: usize,
    /// Threadblocks that keep a processor busy.
    pub(super) blocks: usize,
}

const HALVES: &[DType] = &[DType::BF16, DType::F16];
const ANY: u8 = RIGHT | LEFT | MASK | CLASSES | SCORES | PACKED;

const fn portable(dims: &'static [usize], bm: usize, bn: usize, across: usize) -> Row {
    Row {
        text: Text::Portable { across },
        gpus: (Capability::OLDEST, Capability::NEWEST),
        dtypes: HALVES,
        dims,
        features: &[ANY],
        rows: usize::MAX,
        keys: usize::MAX,
        bm,
        bn,
        blocks: 1,
    }
}

/// For decode: a tile is one warp's rows, and warps share its keys.
const fn short(dims: &'static [usize], bn: usize, across: usize) -> Row {
    Row {
        rows: 16,
        blocks: 4,
        ..portable(dims, 16, bn, across)
    }
}

const fn fma(dims: &'static [usize], bm: usize, bn: usize) -> Row {
    Row {
        text: Text::Fma,
        dtypes: &[DType::F32],
        blocks: 2,
        ..portable(dims, bm, bn, 1)
    }
}

const fn hopper(
    dims: &'static [usize],
    bm: usize,
    bn: usize,
    registers: (u32, u32),
    features: &'static [u8],
) -> Row {
    Row {
        text: Text::Hopper { registers },
        gpus: (Capability::HOPPER, Capability::HOPPER),
        features,
        ..portable(dims, bm, bn, 1)
    }
}

/// Sets of features that the Hopper kernels are built for; masks of packed sequences are left to the
/// portable ones.
const BOUNDS: u8 = RIGHT | LEFT;
const NO_MASK: u8 = BOUNDS | SCORES | PACKED;
const CLASSED: u8 = BOUNDS | SCORES | MASK | CLASSES;

/// Every attention kernel; of those that fit, the first is taken. The last that serves a dtype and
/// head dim serves it whatever the shape.
const ATTENTION: &[Row] = &[
    short(&[32, 96], 64, 2),
    short(&[64, 128, 192], 64, 4),
    short(&[256, 512], 32, 4),
    Row {
        keys: 2048,
        ..hopper(&[32, 64], 256, 64, (32, 112), &[0])
    },
    hopper(&[32, 64], 192, 128, (32, 160), &[RIGHT]),
    hopper(&[32, 64], 256, 64, (32, 112), &[BOUNDS]),
    hopper(
        &[32, 64],
        256,
        64,
        (32, 112),
        &[BOUNDS | MASK, MASK | CLASSES],
    ),
    hopper(&[32, 64], 192, 64, (32, 160), &[CLASSED & !SCORES]),
    hopper(&[32, 64], 128, 128, (40, 232), &[NO_MASK, CLASSED]),
    hopper(&[80, 96], 192, 112, (32, 160), &[0]),
    hopper(
        &[80, 96],
        128,
        128,
        (40, 232),
        &[NO_MASK, CLASSED & !SCORES],
    ),
    hopper(&[80, 96], 128, 112, (40, 232), &[CLASSED]),
    hopper(&[128], 128, 128, (40, 232), &[BOUNDS, CLASSED & !SCORES]),
    hopper(&[128], 128, 128, (24, 240), &[NO_MASK]),
    hopper(&[128], 128, 96, (40, 232), &[CLASSED]),
    hopper(
        &[192],
        128,
        96,
        (24, 240),
        &[BOUNDS | PACKED, BOUNDS | MASK],
    ),
    hopper(&[192], 128, 96, (40, 232), &[CLASSED & !SCORES]),
    hopper(&[192], 128, 80, (24, 240), &[NO_MASK]),
    hopper(&[192], 128, 80, (40, 232), &[CLASSED]),
    hopper(
        &[256],
        128,
        64,
        (24, 240),
        &[BOUNDS | SCORES, CLASSED & !CLASSES],
    ),
    hopper(&[256], 128, 64, (40, 232), &[CLASSED]),
    hopper(&[256], 128, 48, (40, 232), &[NO_MASK]),
    Row {
        text: Text::HopperWide,
        ..hopper(&[512], 128, 64, (40, 232), &[NO_MASK, CLASSED])
    },
    portable(&[32, 40, 48, 64, 72, 80, 96, 112, 128], 128, 64, 1),
    portable(&[192], 64, 32, 1),
    portable(&[256], 64, 32, 2),
    portable(&[512], 32, 32, 4),
    fma(&[32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256], 32, 32),
    fma(&[512], 16, 16),
];

/// The rows that serve `needs` on a GPU, best first. Where several have the same claim, the first
/// stands for them.
pub(super) fn attention(needs: Needs, gpu: Capability) -> impl Iterator<Item = &'static Row> {
    let mut claims = HashSet::new();
    ATTENTION.iter().filter(move |row| {
        row.dtypes.contains(&needs.dtype)
            && row.dims.contains(&needs.head_dim)
            && (row.gpus.0..=row.gpus.1).contains(&gpu)
            && row.features.iter().any(|set| needs.features & !set == 0)
            && claims.insert((row.maps(), row.rows, row.keys))
    })
}

impl Row {
    /// Whether the heads of one key/value head can share a tile.
    pub(super) fn packs(&self) -> bool {
        matches!(self.text, Text::Portable { .. })
    }

    /// Whether it reads and writes through tensor maps.
    pub(super) fn maps(&self) -> bool {
        matches!(self.text, Text::Hopper { .. } | Text::HopperWide)
    }

    /// Whether V comes in halves of 16 keys.
    pub(super) fn halves(&self) -> bool {
        self.text == Text::HopperWide
    }

    /// Threadblocks that share a tile.
    pub(super) fn ctas(&self) -> usize {
        if self.text == Text::HopperWide { 2 } else { 1 }
    }

    pub(super) fn spec(&self, needs: Needs) -> Spec {
        let mut macros = vec![("D", needs.head_dim as i64), ("BN", self.bn as i64)];
        let (parts, threads) = match self.text {
            Text::Portable { across } => {
                macros.extend(self.general(needs));
                macros.push(("WM", self.bm as i64 / 16));
                macros.push(("WN", across as i64));
                macros.push(("BF16", i64::from(needs.dtype == DType::BF16)));
                (sources::PORTABLE, 2 * self.bm * across)
            }
            Text::Fma => {
                macros.extend(self.general(needs));
                macros.push(("KV_F16", i64::from(needs.kv_dtype == DType::F16)));
                (sources::FMA, 128)
            }
            Text::Hopper { registers } => {
                macros.extend(self.hopper(needs));
                macros.push(("STAGES", stages(needs) as i64));
                macros.push(("QBUF", self.buffers(needs) as i64));
                macros.push(("REGS_PRODUCER", registers.0.into()));
                macros.push(("REGS_CONSUMER", registers.1.into()));
                (sources::HOPPER, 128 + 2 * self.bm)
            }
            Text::HopperWide => {
                macros.extend(self.hopper(needs));
                (sources::HOPPER_WIDE, 384)
            }
        };
        Spec {
            parts,
            macros,
            entry: "attention",
            threads: threads as u32,
            shared: self.shared_bytes(needs) as u32,
            flush: self.maps(),
            waits: self.maps(),
        }
    }

    fn general(&self, needs: Needs) -> [(&'static str, i64); 3] {
        [
            ("BM", self.bm as i64),
            ("GENERAL", i64::from(needs.has(MASK | SCORES))),
            ("PACK", i64::from(self.packs())),
        ]
    }

    /// Bounds that are not there cost little where there is much else, so fewer kernels are built.
    fn hopper(&self, needs: Needs) -> [(&'static str, i64); 8] {
        let both = needs.has(SCORES | PACKED) || needs.has(MASK) && needs.has(BOUNDS);
        let mask = match needs.mask {
            None => 0,
            Some(DType::BF16) => 1,
            Some(DType::F16) => 2,
            Some(DType::F32) => 3,
            Some(_) => 4,
        };
        [
            ("WGS", self.bm as i64 / 64),
            ("F16", i64::from(needs.dtype == DType::F16)),
            ("RIGHT", i64::from(both || needs.has(BOUNDS))),
            ("LEFT", i64::from(both || needs.has(LEFT))),
            ("MASK", mask),
            ("CLASSES", i64::from(needs.has(CLASSES))),
            ("SCORE_MOD", i64::from(needs.has(SCORES))),
            ("VARLEN", i64::from(needs.has(PACKED))),
        ]
    }

    /// Dynamic shared memory, laid out as the kernel's text lays it out.
    fn shared_bytes(&self, needs: Needs) -> usize {
        let (d, bm, bn) = (needs.head_dim, self.bm, self.bn);
        match self.text {
            Text::Portable { across } => {
                // Columns come in steps of 16.
                let columns = d.next_multiple_of(16);
                let swizzled = columns.is_multiple_of(64);
                let row = 2 * columns + if swizzled { 0 } else { 16 };
                let shares = if across > 1 {
                    bm * (2 * bn + 16) + across * bm * 4
                } else {
                    0
                };
                (bm + 2 * bn) * row + shares
            }
            Text::Fma => 4 * ((bm + bn) * (d + 4) + bm * (bn + 4)),
            Text::Hopper { .. } => self.hopper_bytes(needs, self.buffers(needs)),
            Text::HopperWide => 208 * 1024 + 1200 + 4096 + self.list_bytes(needs) + 8,
        }
    }

    fn hopper_bytes(&self, needs: Needs, buffers: usize) -> usize {
        let row = needs.head_dim.next_multiple_of(64) * 2;
        let held = buffers * self.bm + 2 * stages(needs) * self.bn;
        let barriers = 56 * buffers * (self.bm / 64) + 56 + 40 * stages(needs);
        let parked = match needs.head_dim {
            ..=64 if self.bm == 256 => 16,
            192.. => 28,
            _ => 0,
        };
        held * row + barriers + 8 * self.bm * parked + buffers * self.list_bytes(needs) + 8
    }

    /// Tiles of Q that a Hopper kernel holds: the next one too, where there is room for it.
    fn buffers(&self, needs: Needs) -> usize {
        let fits = self.hopper_bytes(needs, 2) <= HOPPER_SHARED_BYTES;
        if needs.head_dim <= 128 && fits { 2 } else { 1 }
    }

    /// With tile classes: a barrier, a length, as many tiles as fit, and where each 64 rows' begin and
    /// end.
    fn list_bytes(&self, needs: Needs) -> usize {
        if needs.has(CLASSES) {
            12 + 2 * MOST_LISTED + self.bm / 8
        } else {
            0
        }
    }

    /// Whether each processor has one threadblock with a share of the tiles, not each tile its own.
    pub(super) fn shares(&self, needs: Needs, query_len: usize) -> bool {
        let causal = needs.features == RIGHT;
        matches!(self.text, Text::Hopper { .. })
            && (!causal || (needs.head_dim <= 128 && query_len <= 4096))
    }
}

/// Tiles of K and of V that a Hopper kernel holds.
fn stages(needs: Needs) -> usize {
    if needs.head_dim <= 64 { 4 } else { 2 }
}

/// What Hopper gives a threadblock.
const HOPPER_SHARED_BYTES: usize = 227 * 1024;

/// Key tiles that a Hopper kernel can list where there are tile classes.
pub(super) const MOST_LISTED: usize = 1024;

/// Everything that a GPU may be asked to run.
pub(crate) fn every_spec(gpu: Capability) -> Vec<Spec> {
    let dtypes = [
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
        (DType::F32, DType::F32),
        (DType::F32, DType::F16),
    ];
    let masks = [DType::BF16, DType::F16, DType::F32, DType::U8].map(Some);
    let mut all = super::spec::others();
    for (head_dim, (dtype, kv_dtype)) in HEAD_DIMS
        .into_iter()
        .flat_map(|d| dtypes.map(|pair| (d, pair)))
    {
        for features in 0..=ANY {
            // Only a mask in bf16 is ever classified here.
            let masks = match (features & MASK != 0, features & CLASSES != 0) {
                (true, true) => &masks[..1],
                (true, false) => &masks[..],
                (false, true) => continue,
                (false, false) => &[None],
            };
            for mask in masks {
                let needs = Needs {
                    dtype,
                    kv_dtype,
                    head_dim,
                    mask: *mask,
                    features,
                };
                all.extend(attention(needs, gpu).map(|row| row.spec(needs)));
            }
        }
    }
    let mut seen = HashSet::new();
    all.retain(|spec| seen.insert(spec.clone()));
    all
}

/// The rows for a GPU.
#[cfg(test)]
pub(super) fn every_row(gpu: Capability) -> impl Iterator<Item = &'static Row> {
    let serves = move |row: &&Row| (row.gpus.0..=row.gpus.1).contains(&gpu);
    ATTENTION.iter().filter(serves)
}

#[cfg(test)]
mod tests;
