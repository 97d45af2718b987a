//! The text of every Metal kernel, embedded.

use std::borrow::Cow;

use super::bindings::names;
use super::params;
use super::table::{INSTANTIATIONS, PREFILL};
use crate::backend::score::SCORE_TEXT;
use crate::backend::shared_params;
use crate::hash::fnv1a;

/// Joins texts at compile time: `N` is their whole length.
const fn join<const N: usize>(parts: &[&str]) -> [u8; N] {
    let mut out = [0; N];
    let (mut part, mut at) = (0, 0);
    while part < parts.len() {
        let bytes = parts[part].as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            out[at] = bytes[i];
            at += 1;
            i += 1;
        }
        part += 1;
    }
    out
}

const fn length(parts: &[&str]) -> usize {
    let (mut part, mut total) = (0, 0);
    while part < parts.len() {
        total += parts[part].len();
        part += 1;
    }
    total
}

const INCLUDES: &str = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\n\n";
const COMMON: &str = include_str!("../../../kernels/metal/common.metal");

/// Declares the text of one library: the includes, the params' structs, what kernels share, the rule of a
/// score, the kernels, and lines that instantiate them.
macro_rules! library {
    ($(#[$meta:meta])* $name:ident = $($file:literal),+ with $($params:path),+ $(; $lines:path)?) => {
        $(#[$meta])*
        pub(crate) static $name: &str = {
            const PARTS: &[&str] = &[INCLUDES, $($params,)+ COMMON, SCORE_TEXT, $(include_str!($file),)+ $($lines)?];
            const BYTES: [u8; length(PARTS)] = join(PARTS);
            match std::str::from_utf8(&BYTES) {
                Ok(text) => text,
                Err(_) => "",
            }
        };
    };
}

library! {
    /// Text of the prefill kernels.
    PREFILL_TEXT = "../../../kernels/metal/scores.metal", "../../../kernels/metal/tile.metal",
        "../../../kernels/metal/prefill.metal" with
        params::ATTN_PARAMS_TEXT, params::ATTN_MASK_PARAMS_TEXT, params::ATTN_EXTRA_PARAMS_TEXT,
        params::ATTN_PAGES_PARAMS_TEXT;
        INSTANTIATIONS
}
library! {
    /// Text of the mask-fill and tile-class kernels.
    MASK_TEXT = "../../../kernels/metal/masks.metal" with
        shared_params::MASK_FILL_PARAMS_TEXT, shared_params::BLOCK_FILL_PARAMS_TEXT,
        shared_params::BLK_PARAMS_TEXT
}
library! {
    /// Text of the decode kernels.
    VEC_TEXT = "../../../kernels/metal/scores.metal", "../../../kernels/metal/decode.metal" with shared_params::VEC_PARAMS_TEXT
}

/// How a line of a text begins that instantiates the kernels of one dtype and head dim, by the stem of
/// their names.
const INSTANTIATES: &str = "MASKS(\"";
const PREFIX: &str = "flash_attn_prefill_";
const BOOL: &str = "_boolmask";

/// The stem that a line instantiates.
pub(crate) fn stem_of(line: &str) -> Option<&str> {
    line.strip_prefix(INSTANTIATES)?.split('"').next()
}

/// `source` without the instantiations that `kernel` does not need, so that a compiler does not work on
/// all of them before the first runs. A text or a kernel that is not the prefill's stays whole.
#[cfg_attr(not(all(feature = "metal", target_vendor = "apple")), allow(dead_code))]
pub(crate) fn only<'a>(source: &'a str, kernel: &str) -> Cow<'a, str> {
    let stem = kernel.strip_prefix(PREFIX).unwrap_or(kernel);
    let stem = stem.strip_suffix(BOOL).unwrap_or(stem);
    if !source.lines().filter_map(stem_of).any(|s| s == stem) {
        return source.into();
    }
    let kept = |line: &&str| stem_of(line).is_none_or(|s| s == stem);
    let lines: Vec<&str> = source.lines().filter(kept).collect();
    (lines.join("\n") + "\n").into()
}

/// File name of a text's precompiled library: a hash of the text, so that a library of another text
/// is never taken for it (FNV-1a, 64 bits).
pub(crate) fn metallib_name(source: &str) -> String {
    let hash = fnv1a(source.bytes());
    format!("{hash:016x}.metallib")
}

/// Every kernel's name with its text.
pub(crate) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    let prefill = PREFILL.iter().map(|v| (v.kernel, PREFILL_TEXT));
    let masks = names::MASKS.map(|name| (name, MASK_TEXT));
    let decode = names::DECODE.map(|name| (name, VEC_TEXT));
    prefill.chain(masks).chain(decode)
}

/// Whether `source` is this crate's text of `kernel`.
#[allow(dead_code)] // Not every device runs texts.
pub(crate) fn is_own(kernel: &str, source: &str) -> bool {
    all().any(|(name, text)| name == kernel && text == source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::metal::bindings::constant;

    #[test]
    fn every_text_holds_its_structs_and_kernels() {
        for (name, text) in all() {
            assert!(
                text.starts_with(INCLUDES) && text.contains("struct "),
                "{name}"
            );
        }
        for name in names::MASKS.into_iter().chain(names::DECODE) {
            let (_, text) = all().find(|(n, _)| *n == name).unwrap();
            let forms = [format!("void {name}("), format!("host_name(\"{name}\")")];
            assert!(forms.iter().any(|form| text.contains(form)), "{name}");
        }
    }

    /// First use: one dtype and head dim is compiled, not 54 kernels.
    #[test]
    fn a_kernel_is_compiled_with_the_instantiations_that_it_needs_alone() {
        let whole = PREFILL_TEXT.lines().count();
        let lines = PREFILL_TEXT.matches("\nMASKS(").count();
        assert_eq!(2 * lines, PREFILL.len(), "every kernel has a line");
        for variant in PREFILL {
            let text = only(PREFILL_TEXT, variant.kernel);
            assert_eq!(
                text.lines().count(),
                whole - lines + 1,
                "{}",
                variant.kernel
            );
            let (_, rest) = text.split_once("\nMASKS(\"").unwrap();
            let (stem, rest) = rest.split_once("\", ").unwrap();
            let named = [format!("{PREFIX}{stem}"), format!("{PREFIX}{stem}{BOOL}")];
            assert!(named.contains(&variant.kernel.into()), "{stem}");
            let kind = match variant.dtype {
                crate::DType::F32 => "float",
                crate::DType::F16 => "half",
                _ => "bfloat",
            };
            let head = format!("{kind}, {}, ", variant.head_dim);
            assert!(rest.starts_with(&head), "{stem}: {rest}");
        }
        for (name, text) in [(names::BLK, MASK_TEXT), (names::VEC_F32, VEC_TEXT)] {
            assert_eq!(only(text, name), text);
        }
        assert_eq!(only(PREFILL_TEXT, "theirs"), PREFILL_TEXT);
    }

    #[test]
    fn each_text_has_its_own_library() {
        let names = [PREFILL_TEXT, MASK_TEXT, VEC_TEXT].map(metallib_name);
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2]);
        assert_eq!(metallib_name(""), "cbf29ce484222325.metallib");
    }

    #[test]
    fn function_constants_have_the_hosts_indices() {
        let declared = [
            ("bool align_q", constant::ALIGN_Q),
            ("bool align_k", constant::ALIGN_K),
            ("bool has_mask", constant::HAS_MASK),
            ("bool do_causal", constant::DO_CAUSAL),
            ("bool has_sinks", constant::HAS_SINKS),
            ("bool has_blk", constant::HAS_BLK),
            ("bool has_window", constant::HAS_WINDOW),
            ("bool has_softcap", constant::HAS_SOFTCAP),
            ("bool has_alibi", constant::HAS_ALIBI),
            ("bool has_lse", constant::HAS_LSE),
            ("bool is_varlen", constant::IS_VARLEN),
            ("bool is_paged", constant::IS_PAGED),
            ("bool has_key_lengths", constant::HAS_KEY_LENGTHS),
            ("bool packs_queries", constant::PACKS_QUERIES),
            ("int mask_dtype", constant::MASK_DTYPE),
            ("int nsg", constant::NSG),
            ("int blk_bq", constant::BLK_BQ),
            ("int blk_bk", constant::BLK_BK),
        ];
        for (what, index) in declared {
            let line = format!("constant {what} [[function_constant({index})]];");
            assert!(COMMON.contains(&line), "{line}");
        }
        assert_eq!(
            COMMON.matches("[[function_constant(").count(),
            declared.len()
        );
        // Sinks in later versions of `mlx-native`: setting them here must change nothing.
        for index in [304, 305] {
            assert!(!COMMON.contains(&format!("function_constant({index})")));
        }
    }
}
