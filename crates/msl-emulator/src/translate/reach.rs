//! Which function constants a kernel cannot run without: those that it, or what it calls, names.

use std::collections::{BTreeMap, HashSet};

use super::constants::Constants;
use super::declarations::Declaration;
use super::kernels::Kernels;
use crate::lex::Text;

/// Fills `required_constants` of every kernel.
pub(crate) fn required_constants(
    text: &Text<'_>,
    declarations: &[Declaration],
    constants: &Constants,
    kernels: &mut Kernels,
) {
    let mut by_name: BTreeMap<&str, Vec<&Declaration>> = BTreeMap::new();
    for d in declarations.iter().filter(|d| !d.instantiation) {
        let is_constant = |name: &str| {
            constants.declared.iter().any(|c| c.info.name == name)
                || constants.derived_value(name).is_some()
        };
        if let Some(name) = d.name.map(|n| text.get(n)).filter(|n| !is_constant(n)) {
            by_name.entry(name).or_default().push(d);
        }
    }
    for entry in &mut kernels.entries {
        let mut seen: HashSet<&str> = HashSet::new();
        let mut queue: Vec<&str> = vec![&entry.base];
        let mut found: HashSet<&str> = HashSet::new();
        while let Some(name) = queue.pop() {
            if !seen.insert(name) {
                continue;
            }
            let mut ranges: Vec<_> = by_name
                .get(name)
                .into_iter()
                .flatten()
                .map(|d| d.tokens.clone())
                .collect();
            ranges.extend(constants.derived_value(name));
            for i in ranges.into_iter().flatten().filter(|&i| text.is_ident(i)) {
                let word = text.get(i);
                if i > 0 && matches!(text.get(i - 1), "." | "->") {
                    continue;
                }
                if let Some(c) = constants.declared.iter().find(|c| c.info.name == word) {
                    if !constants.optional.contains(word) {
                        found.insert(&c.info.name);
                    }
                } else if by_name.contains_key(word) || constants.derived_value(word).is_some() {
                    queue.push(word);
                }
            }
        }
        entry.info.required_constants = constants
            .declared
            .iter()
            .filter(|c| found.contains(c.info.name.as_str()))
            .map(|c| c.info.name.clone())
            .collect();
    }
}
