//! Which kernel serves what: the one table of the CUDA attention kernels, and what is compiled for a
//! row of it.

use std::collections::HashSet;

use super::sources;
use super::spec::Spec;
use crate::attention::{HEAD_DIMS, Keys, Problem};
use crate::dtype::DType;

/// A GPU's compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Capability(pub(crate) u32, pub(crate) u32);

impl Capability {
    /// The oldest that is served.
    pub(super) const OLDEST: Self = Self(8, 0);
    pub(super) const HOPPER: Self = Self(9, 0);
    const NEWEST: Self = Self(u32::MAX, 0);

    /// Shared memory that a threadblock may ask for, and that a processor has for all of its threadblocks
    /// (CUDA programming guide, compute capabilities).
    pub(super) fn shared_bytes(self) -> (usize, usize) {
        let (block, processor) = match (self.0, self.1) {
            (8, 0 | 7) => (163, 164),
            (9..=11, _) => (227, 228),
            _ => (99, 100),
        };
        (block << 10, processor << 10)
    }

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
    pub(crate) const RIGHT: u16 = 1;
    /// Keys before a row's position may be hidden.
    pub(crate) const LEFT: u16 = 2;
    pub(crate) const MASK: u16 = 4;
    pub(crate) const CLASSES: u16 = 8;
    pub(crate) const SOFTCAP: u16 = 16;
    /// Queries and keys are packed.
    pub(crate) const PACKED: u16 = 32;
    pub(crate) const ALIBI: u16 = 64;
    /// K and V lie in pages.
    pub(crate) const PAGED: u16 = 128;
    /// Sequences may differ in their counts of queries or keys, which are not packed both.
    pub(crate) const LENGTHS: u16 = 256;
    /// One of the three, or more.
    pub(crate) const SEQUENCES: u16 = PACKED | PAGED | LENGTHS;
    /// One of the two, or both.
    pub(crate) const SCORES: u16 = SOFTCAP | ALIBI;
}
use feature::{
    ALIBI, CLASSES, LEFT, LENGTHS, MASK, PACKED, PAGED, RIGHT, SCORES, SEQUENCES, SOFTCAP,
};

/// What a problem needs of an attention kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Needs {
    pub(super) dtype: DType,
    pub(super) kv_dtype: DType,
    pub(super) head_dim: usize,
    /// The mask's element type, where there is one.
    pub(super) mask: Option<DType>,
    /// Of [`feature`].
    pub(super) features: u16,
}

impl Needs {
    pub(super) fn of(problem: &Problem) -> Self {
        let shape = problem.shape();
        let visibility = problem.visibility(shape.query_len, shape.key_len);
        let windowed = visibility.window.is_some() || visibility.window_right.is_some();
        let packed = problem.cu_seqlens().is_some();
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
                | scores(problem)
                | on(packed, PACKED)
                | on(problem.has_own_lengths() && !packed, LENGTHS)
                | on(matches!(problem.keys(), Keys::Paged(_)), PAGED),
        }
    }

    fn has(&self, features: u16) -> bool {
        self.features & features != 0
    }

    /// The macros `MASK`, `SOFTCAP` and `ALIBI` of a text that has a kernel for each step of a score, where `one`, and one
    /// for any steps together. Over pages that alone does, and where sequences have lengths of their own, so that they have
    /// the same bits at strides.
    fn steps(&self, one: bool) -> [(&'static str, i64); 3] {
        const ANY_TYPE: i64 = 2;
        let alone = match self.features & (MASK | SCORES) {
            0 => Some([0, 0, 0]),
            _ if !one || self.has(PAGED | LENGTHS) => None,
            MASK if self.mask == Some(self.dtype) => Some([1, 0, 0]),
            SOFTCAP => Some([0, 1, 0]),
            ALIBI => Some([0, 0, 1]),
            _ => None,
        };
        let [mask, softcap, alibi] = alone.unwrap_or([ANY_TYPE, 1, 1]);
        [("MASK", mask), ("SOFTCAP", softcap), ("ALIBI", alibi)]
    }
}

/// The features that a problem's softcap and ALiBi slopes ask for. Kernels of one of them alone keep scores in a unit of
/// theirs, which is exact enough up to a cap of 256 and overflows for scales that are out of all proportion: the other
/// problems ask for both.
fn scores(problem: &Problem) -> u16 {
    let ordinary = |x: f32, most: f32| (1.0e-18..=most).contains(&x);
    let features = match (problem.softcap(), problem.has_alibi()) {
        (None, false) => return 0,
        (Some(cap), false) if ordinary(cap, 256.0) => SOFTCAP,
        (None, true) => ALIBI,
        _ => SCORES,
    };
    if ordinary(problem.scale(), 1.0e18) {
        features
    } else {
        SCORES
    }
}

/// Which of the texts a row compiles, and what is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    /// Warps of `16 * high` rows down a tile, and so many across.
    Portable {
        high: usize,
        across: usize,
    },
    /// So many warps, of which `across` walk the keys together, with `stages` key tiles on the way.
    Few {
        warps: usize,
        across: usize,
        stages: usize,
    },
    /// Warps of `16 * high` rows. `packs`: the heads of one key/value head can share a tile.
    Tf32 {
        high: usize,
        packs: bool,
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
    features: &'static [u16],
    /// Most query rows of all heads of one key/value head.
    pub(super) rows: usize,
    /// Most keys.
    pub(super) keys: usize,
    /// Query rows of a tile.
    pub(super) bm: usize,
    /// Keys of a tile.
    pub(super) bn: usize,
    /// Threadblocks of a processor at once. A GPU whose shared memory does not hold them has no such row.
    pub(super) blocks: usize,
}

const HALVES: &[DType] = &[DType::BF16, DType::F16];
const ANY: u16 = RIGHT | LEFT | MASK | CLASSES | SCORES | SEQUENCES;

const fn portable(dims: &'static [usize], bm: usize, bn: usize, text: Text, blocks: usize) -> Row {
    Row {
        text,
        gpus: (Capability::OLDEST, Capability::NEWEST),
        dtypes: HALVES,
        dims,
        features: &[ANY],
        rows: usize::MAX,
        keys: usize::MAX,
        bm,
        bn,
        blocks,
    }
}

/// For as many query rows of all heads of a key/value head as one tile has.
const fn few(dims: &'static [usize], bm: usize, bn: usize, text: Text, blocks: usize) -> Row {
    Row {
        rows: bm,
        ..portable(dims, bm, bn, text, blocks)
    }
}

/// Warps with a tile of keys each.
const fn alone(warps: usize, stages: usize) -> Text {
    Text::Few {
        warps,
        across: 1,
        stages,
    }
}

/// Warps in pairs, which share key tiles.
const fn pairs(warps: usize, stages: usize) -> Text {
    Text::Few {
        warps,
        across: 2,
        stages,
    }
}

/// Warps with 16 times as many rows each.
const fn high(high: usize) -> Text {
    Text::Portable { high, across: 1 }
}

/// Sets of features without a mask and with one step of a score at most.
const ONE_STEP: &[u16] = &[BOUNDS | PACKED | SOFTCAP, BOUNDS | PACKED | ALIBI];

/// Four warps for the same rows.
const fn shared_rows(high: usize) -> Text {
    Text::Portable { high, across: 4 }
}

const fn tf32(dims: &'static [usize], bm: usize, bn: usize, high: usize, blocks: usize) -> Row {
    Row {
        dtypes: &[DType::F32],
        ..portable(dims, bm, bn, Text::Tf32 { high, packs: false }, blocks)
    }
}

/// For so few query rows of all heads of a key/value head that what tiles share counts for more than the row's division.
const fn few_tf32(dims: &'static [usize], bm: usize, bn: usize, blocks: usize) -> Row {
    let text = Text::Tf32 {
        high: 1,
        packs: true,
    };
    Row {
        text,
        rows: 512,
        ..tf32(dims, bm, bn, 1, blocks)
    }
}

const fn fma(dims: &'static [usize], bm: usize, bn: usize) -> Row {
    Row {
        dtypes: &[DType::F32],
        ..portable(dims, bm, bn, Text::Fma, 2)
    }
}

const fn hopper(
    dims: &'static [usize],
    bm: usize,
    bn: usize,
    registers: (u32, u32),
    features: &'static [u16],
) -> Row {
    Row {
        gpus: (Capability::HOPPER, Capability::HOPPER),
        features,
        ..portable(dims, bm, bn, Text::Hopper { registers }, 1)
    }
}

/// Sets of features that the Hopper kernels are built for; masks where sequences have lengths of their own or
/// keys lie in pages are left to the portable ones.
const BOUNDS: u16 = RIGHT | LEFT;
const NO_STEP: u16 = BOUNDS | SEQUENCES;
const NO_MASK: u16 = NO_STEP | SCORES;
const CLASSED: u16 = BOUNDS | SCORES | MASK | CLASSES;

/// Head dims up to 64, and up to 128.
const NARROW: &[usize] = &[32, 40, 48, 64];
const MIDDLE: &[usize] = &[72, 80, 96, 112, 128];

/// Every attention kernel; of those that fit, the first is taken. The last that serves a dtype and
/// head dim serves it whatever the shape.
static ATTENTION: &[Row] = &[
    few(NARROW, 16, 32, alone(8, 3), 1),
    few(NARROW, 16, 32, alone(4, 2), 1),
    few(MIDDLE, 16, 16, alone(8, 3), 1),
    few(MIDDLE, 16, 16, alone(4, 2), 1),
    few(&[192], 16, 16, alone(4, 3), 1),
    few(&[192], 16, 16, alone(2, 3), 1),
    few(&[256], 16, 16, pairs(8, 3), 1),
    few(&[256], 16, 16, pairs(8, 2), 1),
    few(&[256], 16, 16, pairs(4, 2), 1),
    few(&[512], 16, 16, pairs(4, 3), 1),
    few(&[512], 16, 16, pairs(4, 2), 1),
    few(&[512], 16, 16, pairs(2, 2), 1),
    few(NARROW, 32, 32, alone(8, 3), 1),
    few(NARROW, 32, 32, alone(4, 2), 1),
    few(MIDDLE, 32, 16, alone(8, 3), 1),
    few(MIDDLE, 32, 16, alone(4, 2), 1),
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
    // Where sequences differ or lie in pages, the warps that copy need more than 24 registers.
    hopper(&[128], 128, 128, (40, 232), &[NO_STEP, CLASSED & !SCORES]),
    hopper(&[128], 128, 128, (24, 240), &[BOUNDS | SCORES]),
    hopper(&[128], 128, 128, (40, 232), &[NO_MASK]),
    hopper(&[128], 128, 96, (40, 232), &[CLASSED]),
    hopper(&[192], 128, 96, (24, 240), &[BOUNDS, BOUNDS | MASK]),
    hopper(&[192], 128, 96, (40, 232), &[NO_STEP, CLASSED & !SCORES]),
    hopper(&[192], 128, 80, (24, 240), &[BOUNDS | SCORES]),
    hopper(&[192], 128, 80, (40, 232), &[NO_MASK, CLASSED]),
    hopper(
        &[256],
        128,
        64,
        (24, 240),
        &[BOUNDS | SCORES, CLASSED & !CLASSES],
    ),
    hopper(&[256], 128, 64, (40, 232), &[CLASSED]),
    hopper(&[256], 128, 48, (40, 232), &[NO_MASK]),
    // It takes no pages, and so no lengths of their own, which have the bits of pages.
    Row {
        text: Text::HopperWide,
        ..hopper(
            &[512],
            128,
            64,
            (40, 232),
            &[BOUNDS | SCORES | PACKED, CLASSED],
        )
    },
    Row {
        features: ONE_STEP,
        ..portable(NARROW, 128, 128, high(2), 2)
    },
    portable(NARROW, 128, 96, high(2), 2),
    portable(MIDDLE, 128, 64, high(2), 2),
    portable(MIDDLE, 256, 64, high(2), 1),
    portable(&[192], 96, 64, high(1), 2),
    portable(&[192], 64, 64, high(1), 1),
    portable(&[256], 64, 64, high(1), 2),
    portable(&[256], 64, 64, high(1), 1),
    portable(&[512], 32, 64, shared_rows(2), 1),
    portable(&[512], 32, 32, shared_rows(2), 1),
    portable(&[512], 16, 32, shared_rows(1), 1),
    few_tf32(NARROW, 64, 32, 2),
    few_tf32(MIDDLE, 64, 32, 2),
    few_tf32(MIDDLE, 64, 32, 1),
    few_tf32(&[192], 64, 32, 2),
    few_tf32(&[192], 64, 32, 1),
    few_tf32(&[256], 64, 16, 2),
    few_tf32(&[256], 64, 16, 1),
    tf32(NARROW, 128, 32, 2, 2),
    tf32(NARROW, 64, 32, 1, 2),
    tf32(MIDDLE, 64, 32, 1, 2),
    tf32(MIDDLE, 64, 32, 1, 1),
    tf32(&[192], 64, 32, 1, 2),
    tf32(&[192], 64, 32, 1, 1),
    tf32(&[256], 128, 32, 1, 1),
    tf32(&[256], 128, 16, 1, 1),
    tf32(&[256], 64, 16, 1, 1),
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
            && row.holds(needs, gpu)
            && row.features.iter().any(|set| needs.features & !set == 0)
            && claims.insert((row.maps(), row.rows, row.keys))
    })
}

impl Row {
    /// Whether a processor's shared memory holds its threadblocks, each with what the driver adds.
    fn holds(&self, needs: Needs, gpu: Capability) -> bool {
        if self.maps() || self.text == Text::Fma {
            return true;
        }
        let (block, processor) = gpu.shared_bytes();
        let bytes = self.shared_bytes(needs) + self.fixed_bytes();
        bytes <= block && self.blocks * (bytes + 1024) <= processor
    }

    /// Shared memory of fixed size, which the kernel's text declares.
    fn fixed_bytes(&self) -> usize {
        match self.text {
            // A maximum and a sum of each row for all warps that walk together.
            Text::Few { warps, across, .. } => warps / across * self.bm * 8 + 128,
            _ => 128,
        }
    }

    /// Whether the heads of one key/value head can share a tile.
    pub(super) fn packs(&self) -> bool {
        match self.text {
            Text::Portable { .. } | Text::Few { .. } => true,
            Text::Tf32 { packs, .. } => packs,
            _ => false,
        }
    }

    /// The fewest key tiles that are worth a part of their own, and those whose time a part takes besides.
    pub(super) fn part(&self) -> (usize, usize) {
        match self.text {
            Text::Few { warps, across, .. } => (2 * warps / across, 2 * warps / across),
            _ => (4, 1),
        }
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
            Text::Portable { high, across } => {
                macros.extend(self.general(needs, true));
                macros.push(("WM", (self.bm / 16 / high) as i64));
                macros.push(("WN", across as i64));
                macros.push(("MT", high as i64));
                macros.push(("KEYS", (self.bn / across) as i64));
                macros.push(("BLOCKS", self.blocks as i64));
                macros.push(("BF16", i64::from(needs.dtype == DType::BF16)));
                (sources::PORTABLE, 2 * self.bm / high * across)
            }
            Text::Few {
                warps,
                across,
                stages,
            } => {
                macros.extend(self.general(needs, false));
                macros.push(("WARPS", warps as i64));
                macros.push(("WN", across as i64));
                macros.push(("KEYS", self.bn as i64));
                macros.push(("STAGES", stages as i64));
                macros.push(("BLOCKS", self.blocks as i64));
                macros.push(("BF16", i64::from(needs.dtype == DType::BF16)));
                (sources::FEW, 32 * warps)
            }
            Text::Tf32 { high, .. } => {
                let warps = self.bm / 16 / high;
                macros.extend(self.general(needs, false));
                macros.push(("MT", high as i64));
                macros.push(("WARPS", warps as i64));
                macros.push(("BLOCKS", self.blocks as i64));
                macros.push(("KV_F16", i64::from(needs.kv_dtype == DType::F16)));
                (sources::TF32, 32 * warps)
            }
            Text::Fma => {
                macros.extend(self.general(needs, false));
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
            waits: self.text != Text::Fma,
            crowded: matches!(self.text, Text::Portable { .. } | Text::Tf32 { .. }),
        }
    }

    fn general(&self, needs: Needs, one_step: bool) -> Vec<(&'static str, i64)> {
        let tile = [
            ("BM", self.bm as i64),
            ("PACK", i64::from(self.packs())),
            ("PAGED", i64::from(needs.has(PAGED))),
        ];
        [&tile[..], &needs.steps(one_step)].concat()
    }

    /// Bounds that are not there cost little where there is much else, so fewer kernels are built.
    fn hopper(&self, needs: Needs) -> [(&'static str, i64); 9] {
        let both = needs.has(SCORES | SEQUENCES) || needs.has(MASK) && needs.has(BOUNDS);
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
            ("VARLEN", i64::from(needs.has(SEQUENCES))),
            ("PAGED", i64::from(needs.has(PAGED))),
        ]
    }

    /// Dynamic shared memory, laid out as the kernel's text lays it out.
    fn shared_bytes(&self, needs: Needs) -> usize {
        let (d, bm, bn) = (needs.head_dim, self.bm, self.bn);
        match self.text {
            Text::Portable { across, .. } => {
                let shares = if across > 1 {
                    bm * (2 * bn + 16) + across * bm * 4
                } else {
                    0
                };
                (bm + 2 * bn) * row_bytes(d) + shares
            }
            Text::Few {
                warps,
                across,
                stages,
            } => {
                let ring = stages * 2 * bn * row_bytes(d);
                let results = bm * (d.next_multiple_of(16) + 8) * 4;
                bm * row_bytes(d) + warps / across * ring.max(results)
            }
            Text::Tf32 { .. } => 4 * (bm + 2 * bn) * (d + 4),
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

/// A row of Q, K or V in the shared memory of the portable kernels: columns in steps of 16, and a chunk of padding
/// where that keeps rows apart.
fn row_bytes(head_dim: usize) -> usize {
    let chunks = head_dim.next_multiple_of(16) / 8;
    16 * if chunks.is_multiple_of(8) {
        chunks
    } else {
        chunks + (chunks + 1) % 2
    }
}

/// What Hopper gives a threadblock.
const HOPPER_SHARED_BYTES: usize = 227 * 1024;

/// Key tiles that a Hopper kernel can list where there are tile classes.
pub(super) const MOST_LISTED: usize = 1024;

/// Everything that problems may need.
fn every_needs() -> Vec<Needs> {
    let dtypes = [
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
        (DType::F32, DType::F32),
        (DType::F32, DType::F16),
    ];
    let masks = [DType::BF16, DType::F16, DType::F32, DType::U8].map(Some);
    let mut all = Vec::new();
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
            all.extend(masks.iter().map(|mask| Needs {
                dtype,
                kv_dtype,
                head_dim,
                mask: *mask,
                features,
            }));
        }
    }
    all
}

/// Everything that a GPU may be asked to run.
pub(crate) fn every_spec(gpu: Capability) -> Vec<Spec> {
    let mut all = super::spec::others();
    for needs in every_needs() {
        all.extend(attention(needs, gpu).map(|row| row.spec(needs)));
    }
    let mut seen = HashSet::new();
    all.retain(|spec| seen.insert(spec.clone()));
    all
}

/// The rows that a GPU takes for some problem.
#[cfg(test)]
pub(super) fn every_row(gpu: Capability) -> impl Iterator<Item = &'static Row> {
    let taken = move |row: &&Row| {
        let needs = every_needs();
        let mut rows = needs.iter().flat_map(|needs| attention(*needs, gpu));
        rows.any(|taken| std::ptr::eq(taken, *row))
    };
    ATTENTION.iter().filter(taken)
}

#[cfg(test)]
mod tests;
