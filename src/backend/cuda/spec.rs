//! What is compiled: a text, its macros, and what a launch of it takes.

use std::hash::{Hash, Hasher};

use super::sources;
use crate::attention::HEAD_DIMS;
use crate::dtype::DType;

/// A kernel to compile: text, macros, entry point and what a launch of it takes.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    /// One of the lists in `sources`, told from others by its address: texts are long.
    pub(super) parts: &'static [&'static str],
    pub(super) macros: Vec<(&'static str, i64)>,
    pub(super) entry: &'static str,
    pub(super) threads: u32,
    pub(super) shared: u32,
    /// Numbers too small for full precision count as zero.
    pub(super) flush: bool,
    /// Waits by itself for the kernel before it, on GPUs that can tell it to.
    pub(super) waits: bool,
    /// Has tiles for which the registers are hardly enough: measured faster than smaller ones, though it may spill.
    pub(super) crowded: bool,
}

impl Spec {
    fn key(&self) -> (*const &'static str, &[(&'static str, i64)], &'static str) {
        (self.parts.as_ptr(), &self.macros, self.entry)
    }

    pub(crate) fn may_spill(&self) -> bool {
        self.crowded
    }

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

impl PartialEq for Spec {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Spec {}

impl Hash for Spec {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
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

fn spec(
    parts: &'static [&'static str],
    macros: Vec<(&'static str, i64)>,
    entry: &'static str,
    threads: u32,
) -> Spec {
    Spec {
        parts,
        macros,
        entry,
        threads,
        shared: 0,
        flush: false,
        waits: false,
        crowded: false,
    }
}

/// The join of decode's partial results.
pub(super) fn combine(head_dim: usize) -> Spec {
    let steps = ["MASK", "SOFTCAP", "ALIBI"].map(|step| (step, 0));
    let macros = [&[("D", head_dim as i64)][..], &steps].concat();
    spec(sources::COMBINE, macros, "combine", 128)
}

/// The partial results of decode.
pub(super) fn decode(head_dim: usize, kv: DType) -> Spec {
    let macros = vec![("D", head_dim as i64), ("KV", type_code(kv).into())];
    spec(sources::DECODE, macros, "partials", 32)
}

fn masks(dtype: DType, entry: &'static str, threads: u32) -> Spec {
    let macros = vec![("MASK_F16", (dtype == DType::F16).into())];
    spec(sources::MASKS, macros, entry, threads)
}

/// The fill of a mask of `dtype`, bf16 or f16.
pub(super) fn fill(dtype: DType) -> Spec {
    masks(dtype, "fill", 256)
}

/// The fill of a bf16 mask of several sequences.
pub(super) fn fill_blocks() -> Spec {
    masks(DType::BF16, "fill_blocks", 256)
}

/// The tile classes of a mask of `dtype`, bf16 or f16; `wide` for rows on 16 bytes and tiles of 8 to 64 keys.
pub(super) fn classify(dtype: DType, wide: bool) -> Spec {
    if wide {
        Spec {
            waits: true,
            ..masks(dtype, "classify_wide", 128)
        }
    } else {
        masks(dtype, "classify", 32)
    }
}

/// Every kernel but those of attention.
pub(super) fn others() -> Vec<Spec> {
    let mut all = vec![fill_blocks()];
    for dtype in [DType::BF16, DType::F16] {
        all.extend([fill(dtype), classify(dtype, true), classify(dtype, false)]);
    }
    for head_dim in HEAD_DIMS {
        all.push(combine(head_dim));
        all.extend([DType::F16, DType::F32].map(|kv| decode(head_dim, kv)));
    }
    all
}
