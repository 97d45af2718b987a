//! The text of every kernel, embedded.

use crate::attention::bindings::names;
use crate::attention::params;
use crate::attention::variant::PREFILL;

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

const PREFILL_PARTS: &[&str] = params::ALL_TEXT;
const PREFILL_BYTES: [u8; length(PREFILL_PARTS)] = join(PREFILL_PARTS);

/// Text of the prefill kernels.
pub(crate) static PREFILL_TEXT: &str = match std::str::from_utf8(&PREFILL_BYTES) {
    Ok(text) => text,
    Err(_) => "",
};

/// Text of the mask-fill and tile-class kernels.
pub(crate) static MASK_TEXT: &str = PREFILL_TEXT;

/// Text of the decode kernels.
pub(crate) static VEC_TEXT: &str = PREFILL_TEXT;

/// Every kernel's name with its text.
pub(crate) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    let prefill = PREFILL.iter().map(|v| (v.kernel, PREFILL_TEXT));
    let masks = [names::MASK_FILL, names::BLK].map(|name| (name, MASK_TEXT));
    let decode = [names::VEC_F32, names::VEC_F16, names::VEC_REDUCE].map(|name| (name, VEC_TEXT));
    prefill.chain(masks).chain(decode)
}
