//! A value for every function constant that the kernels declare. Metal does not build a kernel that
//! has one unset, and ignores values that a kernel does not declare.

use super::bindings::{Constants, constant, names};
use super::table;

/// Value of one function constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    Bool(bool),
    Int(i32),
}

const BOOLS: [usize; 14] = [
    constant::ALIGN_Q,
    constant::ALIGN_K,
    constant::HAS_MASK,
    constant::DO_CAUSAL,
    constant::HAS_SINKS,
    constant::HAS_BLK,
    constant::HAS_WINDOW,
    constant::HAS_SOFTCAP,
    constant::HAS_ALIBI,
    constant::HAS_LSE,
    constant::IS_VARLEN,
    constant::IS_PAGED,
    constant::HAS_KEY_LENGTHS,
    constant::PACKS_QUERIES,
];

const INTS: [usize; 5] = [
    constant::MASK_DTYPE,
    constant::KV_DTYPE,
    constant::NSG,
    constant::BLK_BQ,
    constant::BLK_BK,
];

/// Values by index: what is given, and for a kernel of this crate the default of all else: false, 0,
/// and the variant table's simdgroups.
pub(crate) fn values(kernel: &str, given: &Constants) -> Vec<(usize, Value)> {
    let row = table::by_name(kernel);
    let mut values = std::collections::BTreeMap::new();
    if row.is_some() || names::MASKS.contains(&kernel) || names::DECODE.contains(&kernel) {
        values.extend(BOOLS.map(|index| (index, Value::Bool(false))));
        values.extend(INTS.map(|index| (index, Value::Int(0))));
    }
    if let Some(simdgroups) = row.and_then(|v| i32::try_from(v.simdgroups).ok()) {
        values.insert(constant::NSG, Value::Int(simdgroups));
    }
    let ints = given.ints().iter().map(|(i, v)| (*i, Value::Int(*v)));
    let bools = given.bools().iter().map(|(i, v)| (*i, Value::Bool(*v)));
    values.extend(ints.chain(bools));
    values.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The constants as their module documents them: index and whether it is a bool.
    fn documented() -> Vec<(usize, bool)> {
        let text = include_str!("bindings.rs");
        let module = text
            .split("pub mod constant {")
            .nth(1)
            .and_then(|rest| rest.split("\n}").next())
            .unwrap();
        let lines: Vec<&str> = module.lines().map(str::trim).collect();
        lines
            .windows(2)
            .filter(|pair| pair[1].starts_with("pub const "))
            .map(|pair| {
                let index = pair[1].trim_end_matches(';').rsplit(' ').next().unwrap();
                let is_bool = pair[0].starts_with("/// bool:");
                assert!(is_bool || pair[0].starts_with("/// int:"), "{}", pair[0]);
                (index.parse().unwrap(), is_bool)
            })
            .collect()
    }

    #[test]
    fn every_documented_constant_is_set_with_its_type() {
        let documented = documented();
        assert!(documented.len() >= 16, "{documented:?}");
        for kernel in table::PREFILL
            .iter()
            .map(|v| v.kernel)
            .chain(names::MASKS)
            .chain(names::DECODE)
        {
            let values = values(kernel, &Constants::default());
            assert_eq!(values.len(), documented.len(), "{kernel}");
            for (index, is_bool) in &documented {
                let (_, value) = values.iter().find(|(i, _)| i == index).unwrap();
                assert_eq!(matches!(value, Value::Bool(_)), *is_bool, "{index}");
            }
        }
    }

    #[test]
    fn given_values_replace_defaults_and_the_table_gives_simdgroups() {
        let value = |kernel, given: &Constants, index| {
            let values = values(kernel, given);
            values.into_iter().find(|(i, _)| *i == index).map(|v| v.1)
        };
        let none = Constants::default();
        let wide = "flash_attn_prefill_bf16_d512";
        assert_eq!(value(wide, &none, constant::NSG), Some(Value::Int(8)));
        let given = Constants::new(&[(constant::HAS_MASK, true)], &[(constant::NSG, 4)]);
        assert_eq!(value(wide, &given, constant::NSG), Some(Value::Int(4)));
        assert_eq!(
            value(wide, &given, constant::HAS_MASK),
            Some(Value::Bool(true))
        );
        assert_eq!(
            value(wide, &given, constant::HAS_BLK),
            Some(Value::Bool(false))
        );
    }

    #[test]
    fn a_kernel_of_the_callers_gets_what_is_given_alone() {
        let given = Constants::new(&[(0, true)], &[(7, -3)]);
        assert_eq!(
            values("theirs", &given),
            [(0, Value::Bool(true)), (7, Value::Int(-3))]
        );
    }
}
