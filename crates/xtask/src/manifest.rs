//! What the compiler made of each CUDA kernel, kept in a file, so that a kernel whose text and options
//! are unchanged need not be compiled again to know its registers and spills.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::resources::Resources;

/// One kernel of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) arch: String,
    pub(crate) name: String,
    pub(crate) resources: Resources,
}

/// The file: the compiler, then a line a kernel, by its fingerprint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Major and minor version of the compiler, as in `13.0`.
    pub(crate) compiler: String,
    pub(crate) entries: BTreeMap<String, Entry>,
}

const HEAD: &str = "# Written by `cargo xtask-cuda cubins --update`: architecture, fingerprint of text \
                    and options, registers, bytes of stack, bytes spilled, serialized or warned, name.";

impl Manifest {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut manifest = Self::default();
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(compiler) = line.strip_prefix("nvrtc ") {
                manifest.compiler = compiler.into();
                continue;
            }
            let (fingerprint, entry) =
                parse_line(line).ok_or_else(|| format!("line {}: {line}", n + 1))?;
            if manifest.entries.insert(fingerprint, entry).is_some() {
                return Err(format!("line {}: a fingerprint that came before", n + 1));
            }
        }
        Ok(manifest)
    }

    /// By architecture and name, so that a change of one kernel changes its own lines only.
    pub(crate) fn text(&self) -> String {
        let mut lines: Vec<_> = self.entries.iter().collect();
        lines.sort_by_key(|(fingerprint, e)| (&e.arch, &e.name, *fingerprint));
        let mut text = format!("{HEAD}\nnvrtc {}\n", self.compiler);
        for (fingerprint, entry) in lines {
            let Resources {
                registers,
                stack,
                spills,
                complaints,
            } = &entry.resources;
            let bad = if complaints.is_empty() { "no" } else { "yes" };
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{} {fingerprint} {registers} {stack} {spills} {bad} {}",
                entry.arch, entry.name
            );
        }
        text
    }
}

fn parse_line(line: &str) -> Option<(String, Entry)> {
    let mut words = line.splitn(7, ' ');
    let mut next = || words.next();
    let (arch, fingerprint) = (next()?, next()?);
    let mut number = || next()?.parse().ok();
    let (registers, stack, spills) = (number()?, number()?, number()?);
    let complaints = match next()? {
        "no" => Vec::new(),
        "yes" => vec!["the compiler complained of it".into()],
        _ => return None,
    };
    let entry = Entry {
        arch: arch.into(),
        name: next()?.into(),
        resources: Resources {
            registers,
            stack,
            spills,
            complaints,
        },
    };
    Some((fingerprint.into(), entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(arch: &str, name: &str, spills: u64, complaints: &[&str]) -> Entry {
        Entry {
            arch: arch.into(),
            name: name.into(),
            resources: Resources {
                registers: 213,
                stack: 0,
                spills,
                complaints: complaints.iter().map(|c| (*c).into()).collect(),
            },
        }
    }

    #[test]
    fn what_is_written_is_read_again_and_a_bad_line_is_an_error() {
        let complaint = "the compiler complained of it";
        let manifest = Manifest {
            compiler: "13.0".into(),
            entries: BTreeMap::from([
                ("b1".into(), entry("sm_80", "attention(D=64 T=1)", 0, &[])),
                ("a2".into(), entry("sm_90a", "fill()", 8, &[complaint])),
            ]),
        };
        let text = manifest.text();
        assert_eq!(Manifest::parse(&text), Ok(manifest));
        for bad in [
            "sm_80 ab 1 2 x no fill()",
            "sm_80 ab 1 2 3 maybe fill()",
            "sm_80 ab 1 2 3 no",
        ] {
            assert!(Manifest::parse(bad).is_err(), "{bad}");
        }
        let line = "sm_80 ab 1 0 0 no fill()";
        assert!(Manifest::parse(&format!("{line}\n{line}")).is_err());
    }
}
