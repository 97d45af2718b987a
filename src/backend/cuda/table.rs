//! Which kernel serves what: the one table of the CUDA attention kernels, and what is compiled for a
//! row of it.

use super::sources;
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
    /// Element types of Q.
    dtypes: &'static [DType],
    /// Smallest and largest head dim.
    dims: (usize, usize),
    /// Query rows of a tile.
    pub(super) bm: usize,
    /// Keys of a tile.
    pub(super) bn: usize,
    /// Warps down the rows of a tile, and across.
    warps: (usize, usize),
}

const fn portable(dims: (usize, usize), bm: usize, bn: usize, warps: (usize, usize)) -> Row {
    Row {
        text: Text::Portable,
        dtypes: &[DType::BF16, DType::F16],
        dims,
        bm,
        bn,
        warps,
    }
}

const fn fma(dims: (usize, usize), bm: usize, bn: usize) -> Row {
    Row {
        text: Text::Fma,
        dtypes: &[DType::F32],
        dims,
        bm,
        bn,
        warps: (4, 1),
    }
}

/// Every attention kernel; of those that fit, the first is taken.
const ATTENTION: &[Row] = &[
    portable((32, 128), 128, 64, (8, 1)),
    portable((192, 192), 64, 32, (4, 1)),
    portable((256, 256), 64, 32, (4, 2)),
    portable((512, 512), 32, 32, (2, 4)),
    fma((32, 256), 32, 32),
    fma((512, 512), 16, 16),
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

/// The row that serves `needs`.
pub(super) fn attention(needs: Needs) -> Option<&'static Row> {
    ATTENTION.iter().find(|row| {
        row.dtypes.contains(&needs.dtype) && (row.dims.0..=row.dims.1).contains(&needs.head_dim)
    })
}

impl Row {
    pub(super) fn spec(&self, needs: Needs) -> Spec {
        let d = needs.head_dim;
        let mut macros = vec![
            ("D", d as i64),
            ("BM", self.bm as i64),
            ("BN", self.bn as i64),
            ("GENERAL", i64::from(needs.general)),
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
                all.extend(attention(needs).map(|row| row.spec(needs)));
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
        assert_eq!(all.len(), 3 + 8 * (4 * 2 + 3 + 2));
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        for spec in all {
            assert!(spec.shared as usize <= SHARED_BYTES, "{}", spec.name());
            assert!(spec.threads <= 1024 && spec.threads.is_multiple_of(32));
        }
    }

    #[test]
    fn tiles_hold_whole_class_tiles_or_are_parts_of_one() {
        for row in ATTENTION {
            for d in HEAD_DIMS
                .into_iter()
                .filter(|d| (row.dims.0..=row.dims.1).contains(d))
            {
                let class = crate::attention::variant::class_tile(d);
                assert!(row.bm.is_multiple_of(class.bq), "{row:?} {d}");
                assert!(
                    row.bn.is_multiple_of(class.bk) || class.bk.is_multiple_of(row.bn),
                    "{row:?} {d}"
                );
            }
        }
    }

    #[test]
    fn only_hopper_gets_the_suffix() {
        assert_eq!(Capability(9, 0).arch(), "sm_90a");
        assert_eq!(Capability(8, 6).arch(), "sm_86");
        assert_eq!(Capability(12, 0).arch(), "sm_120");
    }
}
