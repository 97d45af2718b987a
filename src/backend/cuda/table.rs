//! Which kernel serves what: the one table of the CUDA attention kernels, and what is compiled for a
//! row of it.

use super::sources;
use crate::attention::Problem;
use crate::attention::variant::HEAD_DIMS;
use crate::dtype::DType;

/// A GPU's compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Capability(pub(crate) u32, pub(crate) u32);

impl Capability {
    /// The oldest that is served.
    pub(super) const OLDEST: Self = Self(8, 0);

    /// The compiler's name for it. Hopper's own instructions need the suffix, and images with it run
    /// nowhere else.
    pub(super) fn arch(self) -> String {
        let suffix = if self == Self(9, 0) { "a" } else { "" };
        format!("sm_{}{}{suffix}", self.0, self.1)
    }
}

/// Which of the texts a row compiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    Portable,
    Fma,
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
    /// Most query rows of all heads of one key/value head.
    rows: usize,
    /// Query rows of a tile.
    pub(super) bm: usize,
    /// Keys of a tile.
    pub(super) bn: usize,
    /// Warps down the rows of a tile, and across.
    warps: (usize, usize),
    /// Threadblocks that keep a processor busy.
    pub(super) blocks: usize,
}

const ANY: (Capability, Capability) = (Capability::OLDEST, Capability(u32::MAX, 0));

const fn portable(dims: &'static [usize], bm: usize, bn: usize, across: usize) -> Row {
    Row {
        text: Text::Portable,
        gpus: ANY,
        dtypes: &[DType::BF16, DType::F16],
        dims,
        rows: usize::MAX,
        bm,
        bn,
        warps: (bm / 16, across),
        blocks: 1,
    }
}

/// For decode: a tile is one warp's rows, and warps share its keys.
const fn short(dims: &'static [usize], across: usize) -> Row {
    Row {
        rows: 16,
        blocks: 4,
        ..portable(dims, 16, 64, across)
    }
}

const fn fma(dims: &'static [usize], bm: usize, bn: usize) -> Row {
    Row {
        text: Text::Fma,
        gpus: ANY,
        dtypes: &[DType::F32],
        dims,
        rows: usize::MAX,
        bm,
        bn,
        warps: (4, 1),
        blocks: 2,
    }
}

/// Every attention kernel; of those that fit, the first is taken. The last that serves a dtype and
/// head dim serves it whatever the shape.
const ATTENTION: &[Row] = &[
    short(&[32, 96], 2),
    short(&[64, 128, 192], 4),
    Row {
        bn: 32,
        ..short(&[256, 512], 4)
    },
    portable(&[32, 64, 80, 96, 128], 128, 64, 1),
    portable(&[192], 64, 32, 1),
    portable(&[256], 64, 32, 2),
    portable(&[512], 32, 32, 4),
    fma(&[32, 64, 80, 96, 128, 192, 256], 32, 32),
    fma(&[512], 16, 16),
];

/// What a problem needs of an attention kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Needs {
    pub(super) dtype: DType,
    pub(super) kv_dtype: DType,
    pub(super) head_dim: usize,
    /// Mask, softcap or ALiBi.
    pub(super) general: bool,
}

/// A kernel to compile: text, macros, entry point and what a launch of it takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Spec {
    pub(super) parts: &'static [&'static str],
    pub(super) macros: Vec<(&'static str, i64)>,
    pub(super) entry: &'static str,
    pub(super) threads: u32,
    pub(super) shared: u32,
}

impl Spec {
    /// Text, macros and entry point, for messages.
    pub(crate) fn name(&self) -> String {
        let macros: Vec<String> = self
            .macros
            .iter()
            .map(|(n, v)| format!("{n}={v}"))
            .collect();
        format!("{}({})", self.entry, macros.join(" "))
    }
}

/// The rows that serve `needs` on a GPU, best first.
pub(super) fn attention(
    needs: Needs,
    gpu: Option<Capability>,
) -> impl Iterator<Item = &'static Row> {
    ATTENTION.iter().filter(move |row| {
        row.dtypes.contains(&needs.dtype)
            && row.dims.contains(&needs.head_dim)
            && gpu.is_none_or(|gpu| (row.gpus.0..=row.gpus.1).contains(&gpu))
    })
}

impl Row {
    /// Whether it serves a problem of this shape, given that it serves what the problem needs.
    pub(super) fn takes(&self, problem: &Problem) -> bool {
        problem.shape().query_len.saturating_mul(problem.group()) <= self.rows
    }

    /// Whether the heads of one key/value head can share a tile.
    pub(super) fn packs(&self) -> bool {
        self.text == Text::Portable
    }

    pub(super) fn spec(&self, needs: Needs) -> Spec {
        let d = needs.head_dim;
        let mut macros = vec![
            ("D", d as i64),
            ("BM", self.bm as i64),
            ("BN", self.bn as i64),
            ("GENERAL", i64::from(needs.general)),
            ("PACK", i64::from(self.packs())),
        ];
        let parts = match self.text {
            Text::Portable => {
                macros.push(("WM", self.warps.0 as i64));
                macros.push(("WN", self.warps.1 as i64));
                macros.push(("BF16", i64::from(needs.dtype == DType::BF16)));
                sources::PORTABLE
            }
            Text::Fma => {
                macros.push(("KV_F16", i64::from(needs.kv_dtype == DType::F16)));
                sources::FMA
            }
        };
        Spec {
            parts,
            macros,
            entry: "attention",
            threads: (32 * self.warps.0 * self.warps.1) as u32,
            shared: self.shared_bytes(d) as u32,
        }
    }

    /// Dynamic shared memory, laid out as the kernel's text lays it out.
    fn shared_bytes(&self, d: usize) -> usize {
        let (bm, bn) = (self.bm, self.bn);
        match self.text {
            Text::Portable => {
                let row = 2 * d + if d.is_multiple_of(64) { 0 } else { 16 };
                let shares = if self.warps.1 > 1 {
                    bm * (2 * bn + 16) + self.warps.1 * bm * 4
                } else {
                    0
                };
                (bm + 2 * bn) * row + shares
            }
            Text::Fma => 4 * ((bm + bn) * (d + 4) + bm * (bn + 4)),
        }
    }
}

/// The code of an element type, as the kernels' `TYPE_` macros give it.
pub(super) fn type_code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
        _ => 4,
    }
}

/// The join of partial results.
pub(super) fn combine(head_dim: usize, out: DType) -> Spec {
    Spec {
        parts: sources::COMBINE,
        macros: vec![
            ("D", head_dim as i64),
            ("OUT", type_code(out).into()),
            ("GENERAL", 0),
        ],
        entry: "combine",
        threads: 128,
        shared: 0,
    }
}

/// The partial results of decode.
pub(super) fn decode(head_dim: usize, kv: DType) -> Spec {
    Spec {
        parts: sources::DECODE,
        macros: vec![("D", head_dim as i64), ("KV", type_code(kv).into())],
        entry: "partials",
        threads: 32,
        shared: 0,
    }
}

/// The mask fill.
pub(super) fn fill() -> Spec {
    masks("fill", 256)
}

/// The tile classes; `wide` for rows on 16 bytes and tiles of 8 to 64 keys.
pub(super) fn classify(wide: bool) -> Spec {
    if wide {
        masks("classify_wide", 128)
    } else {
        masks("classify", 32)
    }
}

fn masks(entry: &'static str, threads: u32) -> Spec {
    Spec {
        parts: sources::MASKS,
        macros: Vec::new(),
        entry,
        threads,
        shared: 0,
    }
}

/// Everything that can be compiled.
pub(crate) fn every_spec() -> Vec<Spec> {
    let mut all = vec![fill(), classify(true), classify(false)];
    for head_dim in HEAD_DIMS {
        for (dtype, kv_dtype) in [
            (DType::BF16, DType::BF16),
            (DType::F16, DType::F16),
            (DType::F32, DType::F32),
            (DType::F32, DType::F16),
        ] {
            for general in [false, true] {
                let needs = Needs {
                    dtype,
                    kv_dtype,
                    head_dim,
                    general,
                };
                all.extend(attention(needs, None).map(|row| row.spec(needs)));
            }
        }
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            all.push(combine(head_dim, dtype));
        }
        for kv in [DType::F16, DType::F32] {
            all.push(decode(head_dim, kv));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Shared memory that every GPU of compute capability 8.0 and later gives a threadblock.
    const SHARED_BYTES: usize = 99 * 1024;

    #[test]
    fn every_dtype_and_head_dim_has_a_kernel_that_fits_any_gpu() {
        let all = every_spec();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        for spec in all {
            assert!(spec.shared as usize <= SHARED_BYTES, "{}", spec.name());
            assert!(spec.threads <= 1024 && spec.threads.is_multiple_of(32));
        }
        for (dtype, head_dim) in [DType::BF16, DType::F16, DType::F32]
            .into_iter()
            .flat_map(|t| HEAD_DIMS.map(|d| (t, d)))
        {
            let needs = Needs {
                dtype,
                kv_dtype: dtype,
                head_dim,
                general: true,
            };
            let last = attention(needs, Some(Capability::OLDEST)).last().unwrap();
            assert_eq!(last.rows, usize::MAX, "{needs:?}");
        }
    }

    #[test]
    fn tiles_hold_whole_class_tiles_or_are_parts_of_one() {
        for row in ATTENTION {
            for d in row.dims.iter().copied() {
                let class = crate::attention::variant::class_tile(d);
                assert!(
                    row.bm.is_multiple_of(class.bq) || class.bq.is_multiple_of(row.bm),
                    "{row:?} {d}"
                );
                assert!(
                    row.bn.is_multiple_of(class.bk) || class.bk.is_multiple_of(row.bn),
                    "{row:?} {d}"
                );
            }
        }
    }

    #[test]
    fn warps_share_a_tile_in_parts_that_the_instructions_take() {
        for row in ATTENTION.iter().filter(|row| row.text == Text::Portable) {
            assert_eq!(row.bm, 16 * row.warps.0);
            let keys = row.bn / row.warps.1;
            assert!(keys == 8 || keys.is_multiple_of(16), "{row:?}");
            assert!(
                row.dims
                    .iter()
                    .all(|d| (d / row.warps.1).is_multiple_of(16)),
                "{row:?}"
            );
        }
    }

    #[test]
    fn only_hopper_gets_the_suffix() {
        assert_eq!(Capability(9, 0).arch(), "sm_90a");
        assert_eq!(Capability(8, 6).arch(), "sm_86");
        assert_eq!(Capability(12, 0).arch(), "sm_120");
    }
}
