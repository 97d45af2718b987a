//! Function constants: from what the caller gave to the program's globals.

use super::abi::ConstantRecord;
use super::module::Module;
use super::region::Region;
use crate::dispatch::{Constant, Dispatch};
use crate::error::{Error, Result};
use crate::reflect::{ConstantInfo, KernelInfo};

/// Checks that the kernel's constants are set and typed right.
pub(crate) fn check(
    kernel: &KernelInfo,
    constants: &[ConstantInfo],
    dispatch: &Dispatch<'_>,
) -> Result<()> {
    for info in constants {
        match dispatch.constants.get(&info.index) {
            Some(value) => {
                encode(&info.type_name, *value).ok_or_else(|| Error::ConstantType {
                    kernel: kernel.name.clone(),
                    index: info.index,
                    name: info.name.clone(),
                    expected: info.type_name.clone(),
                    got: match value {
                        Constant::Bool(_) => "bool",
                        Constant::Int(_) => "int",
                        Constant::Uint(_) => "uint",
                        Constant::Float(_) => "float",
                    },
                })?;
            }
            None if kernel.required_constants.contains(&info.name) => {
                return Err(Error::UnsetConstant {
                    kernel: kernel.name.clone(),
                    index: info.index,
                    name: info.name.clone(),
                });
            }
            None => {}
        }
    }
    Ok(())
}

/// Writes them; those without a value are zero and count as not defined.
///
/// # Safety
/// The module's lock is held.
pub(crate) unsafe fn set(module: &Module, constants: &[ConstantInfo], dispatch: &Dispatch<'_>) {
    for (record, info) in module.constants().iter().zip(constants) {
        let value = dispatch.constants.get(&info.index);
        let bytes = value
            .and_then(|v| encode(&info.type_name, *v))
            .unwrap_or_default();
        let len = (record.size as usize).min(bytes.len());
        // SAFETY: the record points to a global of `size` bytes and to a flag, both of this module,
        // which nobody reads while the lock is held.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), record.value, len);
            *record.defined = value.is_some();
        }
    }
}

/// Computes the globals that depend on them, and gives the names of those that are not zero.
///
/// # Safety
/// The module's lock is held, and `set` has run.
pub(crate) unsafe fn derive<'a>(module: &Module, names: &'a [String]) -> Result<Vec<&'a str>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let region = Region::take(1)?;
    // SAFETY: the worker has a stack ready, and the lock lets its globals be written.
    unsafe { (module.table().derive)(region.worker()) };
    region.put_back();
    let is_set = |record: &ConstantRecord| {
        // SAFETY: a global of `size` bytes, which nobody writes while the lock is held.
        let bytes = unsafe { std::slice::from_raw_parts(record.value, record.size as usize) };
        bytes.iter().any(|b| *b != 0)
    };
    let records = module.derived().iter().zip(names);
    Ok(records
        .filter(|(record, _)| is_set(record))
        .map(|(_, name)| name.as_str())
        .collect())
}

/// The bytes of a value as the declared type; `None` when it is of another.
fn encode(type_name: &str, value: Constant) -> Option<[u8; 8]> {
    let wide = match (value, type_name) {
        (Constant::Bool(b), "bool") => u64::from(b),
        (Constant::Int(v), "int" | "short" | "char" | "long") => i64::from(v) as u64,
        (Constant::Uint(v), "uint" | "ushort" | "uchar" | "ulong") => u64::from(v),
        (Constant::Float(v), "float") => u64::from(v.to_bits()),
        (Constant::Float(v), "half") => u64::from(half_bits(v)),
        (Constant::Float(v), "bfloat") => u64::from(bfloat_bits(v)),
        _ => return None,
    };
    Some(wide.to_ne_bytes())
}

fn bfloat_bits(v: f32) -> u16 {
    let bits = v.to_bits();
    if v.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Rounds to nearest even through the exact value scaled to the last place of a half.
fn half_bits(v: f32) -> u16 {
    let sign = ((v.to_bits() >> 16) & 0x8000) as u16;
    let a = v.abs();
    if v.is_nan() {
        return sign | 0x7e00;
    }
    if a >= 65_520.0 {
        return sign | 0x7c00;
    }
    let exponent = if a < 2.0f32.powi(-14) {
        -14
    } else {
        ((a.to_bits() >> 23) as i32) - 127
    };
    let places = (a * 2.0f32.powi(10 - exponent)).round_ties_even() as u32;
    // A mantissa that rounds up to the next power of two carries into the exponent by itself.
    let biased = if exponent == -14 {
        places
    } else {
        (((exponent + 14) as u32) << 10) + places
    };
    sign | biased as u16
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_nearest_even() {
        for (v, bits) in [
            (0.0, 0),
            (1.0, 0x3c00),
            (-2.0, 0xc000),
            (65504.0, 0x7bff),
            (1e-7, 2),
            (0.1, 0x2e66),
        ] {
            assert_eq!(half_bits(v), bits, "{v}");
        }
        for bits in 0..0x7c00u16 {
            let h = half::f16::from_bits(bits);
            assert_eq!(half_bits(h.to_f32()), bits);
        }
    }

    #[test]
    fn types_must_agree() {
        assert!(encode("bool", Constant::Int(1)).is_none());
        assert_eq!(encode("short", Constant::Int(-1)).unwrap()[..2], [255, 255]);
    }
}
