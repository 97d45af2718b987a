//! Function constants, and the globals computed from them.

use std::collections::HashSet;
use std::ops::Range;

use super::attributes::Attributes;
use super::declarations::Declaration;
use super::diagnostic::{Step, reject};
use super::kernels::Kernels;
use super::pass::Pass;
use super::words;
use crate::lex::{Text, integer};
use crate::reflect::{ArgumentKind, ConstantInfo};

/// A declared function constant.
pub(crate) struct Declared {
    pub(crate) info: ConstantInfo,
    /// With its namespaces.
    pub(crate) path: String,
    scope: String,
    tokens: Range<usize>,
}

/// A global whose value depends on function constants.
pub(crate) struct Derived {
    pub(crate) name: String,
    pub(crate) scope: String,
    type_text: String,
    value: Range<usize>,
    tokens: Range<usize>,
}

/// All of them.
pub(crate) struct Constants {
    pub(crate) declared: Vec<Declared>,
    pub(crate) derived: Vec<Derived>,
    /// Those that the program tests with `is_function_constant_defined`.
    pub(crate) optional: HashSet<String>,
}

const TYPES: [&str; 12] = [
    "bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat",
    "float",
];

/// Finds them.
pub(crate) fn find(
    text: &Text<'_>,
    attributes: &Attributes,
    declarations: &[Declaration],
) -> Step<Constants> {
    let mut out = Constants {
        declared: Vec::new(),
        derived: Vec::new(),
        optional: HashSet::new(),
    };
    for i in 0..text.tokens.len() {
        if text.get(i) == "is_function_constant_defined" && text.get(i + 1) == "(" {
            out.optional.insert(text.get(i + 2).to_owned());
        }
    }
    let mut known: HashSet<String> = HashSet::new();
    for d in declarations {
        let Some(name_at) = d.name else { continue };
        if d.params.is_some() || d.template.is_some() || d.instantiation {
            continue;
        }
        let range = d.tokens.clone();
        let line = text.line(range.start);
        let is_constant = range
            .clone()
            .take_while(|&i| i < name_at)
            .any(|i| text.get(i) == "constant");
        if !is_constant {
            continue;
        }
        let name = text.get(name_at).to_owned();
        let type_text = type_of(text, range.start..name_at);
        if let Some(a) = attributes
            .within(range.clone())
            .find(|a| a.name == "function_constant")
        {
            let Some(index) = integer(&a.args).and_then(|v| u32::try_from(v).ok()) else {
                return reject(
                    line,
                    format!("function_constant({}) is not an index", a.args),
                );
            };
            if !TYPES.contains(&type_text.as_str()) {
                return reject(
                    line,
                    format!("function constant of type `{type_text}` is not supported"),
                );
            }
            if let Some(twin) = out
                .declared
                .iter()
                .find(|c: &&Declared| c.info.index == index)
            {
                return reject(
                    line,
                    format!(
                        "function constant {index} is both `{}` and `{name}`",
                        twin.info.name
                    ),
                );
            }
            known.insert(name.clone());
            out.declared.push(Declared {
                path: format!("{}{name}", d.scope),
                scope: d.scope.clone(),
                info: ConstantInfo {
                    name,
                    index,
                    type_name: type_text,
                    line,
                },
                tokens: range,
            });
            continue;
        }
        let Some(eq) = range.clone().find(|&i| text.get(i) == "=") else {
            continue;
        };
        let value = eq + 1..range.end - 1;
        let depends = value
            .clone()
            .any(|i| known.contains(text.get(i)) || text.get(i) == "is_function_constant_defined");
        if depends {
            known.insert(name.clone());
            out.derived.push(Derived {
                name,
                scope: d.scope.clone(),
                type_text,
                value,
                tokens: range,
            });
        }
    }
    Ok(out)
}

/// Refuses an argument whose existence hangs on something else than a function constant.
pub(crate) fn check_gates(constants: &Constants, kernels: &Kernels) -> Step<()> {
    for info in kernels.entries.iter().map(|e| &e.info) {
        for argument in &info.arguments {
            let ArgumentKind::Buffer {
                gate: Some(gate), ..
            } = &argument.kind
            else {
                continue;
            };
            let declared = constants.declared.iter().any(|c| c.info.name == *gate);
            if !declared && constants.derived_value(gate).is_none() {
                return reject(
                    info.line,
                    format!(
                        "kernel `{}`: argument `{}`: `{gate}` is no function constant",
                        info.name, argument.name
                    ),
                );
            }
        }
    }
    Ok(())
}

fn type_of(text: &Text<'_>, range: Range<usize>) -> String {
    range
        .map(|i| text.get(i))
        .filter(|t| {
            !matches!(
                *t,
                "constant" | "static" | "const" | "constexpr" | "extern" | "inline"
            )
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Turns each into a variable that the host sets (code) or an unknown constant (types).
pub(crate) fn rewrite(text: &mut Text<'_>, constants: &Constants, pass: Pass) {
    for c in &constants.declared {
        let (ty, name) = (&c.info.type_name, &c.info.name);
        let with = match pass {
            Pass::Types => format!("extern const {ty} {name}; extern const bool msl_fcdef_{name};"),
            Pass::Code => format!("static {ty} {name}; static bool msl_fcdef_{name};"),
            Pass::Registers => format!(
                "static constexpr {ty} {name} = {}; static constexpr bool msl_fcdef_{name} = true;",
                fixed_macro(c.info.index)
            ),
        };
        text.replace(c.tokens.clone(), with);
    }
    for (n, d) in constants.derived.iter().enumerate() {
        let (ty, name) = (&d.type_text, &d.name);
        let value = clean_numbers(text.span(d.value.clone()));
        let with = match pass {
            Pass::Types => {
                format!(
                    "extern const {ty} {name}; static inline {ty} msl_derive_{n}() {{ return {value}; }}"
                )
            }
            Pass::Registers => format!("static constexpr {ty} {name} = ({value});"),
            Pass::Code => format!(
                "static {ty} {name}; __attribute__((no_sanitize(\"thread\"))) static void msl_derive_{n}() \
                 {{ {name} = ({value}); }}"
            ),
        };
        text.replace(d.tokens.clone(), with);
    }
}

/// The macro that holds a function constant's value in the registers pass.
pub(crate) fn fixed_macro(index: u32) -> String {
    format!("MSL_CONSTANT_{index}")
}

/// What the words pass does to literals, for text that it will not see again.
fn clean_numbers(value: &str) -> String {
    let mut t = Text::new(value);
    let _ = words::rewrite(&mut t);
    t.finish()
}

impl Declared {
    pub(crate) fn defined_path(&self) -> String {
        format!("{}msl_fcdef_{}", self.scope, self.info.name)
    }
}

impl Constants {
    /// Every name that stands for a function constant or a global computed from one.
    pub(crate) fn derived_value(&self, name: &str) -> Option<Range<usize>> {
        self.derived
            .iter()
            .find(|d| d.name == name)
            .map(|d| d.value.clone())
    }
}
