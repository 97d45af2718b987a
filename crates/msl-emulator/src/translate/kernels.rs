//! Kernels: their definitions, instantiations, names and arguments.

use std::collections::BTreeSet;
use std::ops::Range;

use super::attributes::Attributes;
use super::built_ins;
use super::declarations::Declaration;
use super::diagnostic::{Step, reject};
use super::pass::Pass;
use crate::lex::{Text, integer};
use crate::reflect::{AddressSpace, ArgumentInfo, ArgumentKind, KernelInfo};

/// The definition of a kernel, a template perhaps.
struct Definition {
    declaration: Declaration,
    name: String,
    arguments: Vec<ArgumentInfo>,
    /// The expression of `max_total_threads_per_threadgroup`.
    limit: Option<String>,
}

/// A kernel that a host can ask for.
pub(crate) struct Entry {
    pub(crate) info: KernelInfo,
    /// The C++ expression that names the function.
    pub(crate) function: String,
    /// Name of the definition.
    pub(crate) base: String,
    /// The explicit instantiation that makes it; none where the kernel is no template.
    instantiation: Option<Range<usize>>,
    /// The C++ constant with its thread limit.
    pub(crate) limit: Option<String>,
}

/// All kernels of a program.
pub(crate) struct Kernels {
    pub(crate) entries: Vec<Entry>,
    definitions: Vec<Definition>,
}

/// Finds them.
pub(crate) fn find(
    text: &Text<'_>,
    attributes: &Attributes,
    declarations: &[Declaration],
) -> Step<Kernels> {
    let mut out = Kernels {
        entries: Vec::new(),
        definitions: Vec::new(),
    };
    for d in declarations {
        let (Some(name_at), Some(params)) = (d.name, d.params) else {
            continue;
        };
        let head = d.tokens.start..name_at;
        let marked = head.clone().any(|i| text.get(i) == "kernel")
            || attributes.within(head.clone()).any(|a| a.name == "kernel");
        if !marked || d.body.is_none() {
            continue;
        }
        let before_body = d.tokens.start..d.body.map_or(params.1, |b| b.0);
        let limit = attributes
            .within(before_body)
            .find(|a| a.name == "max_total_threads_per_threadgroup")
            .map(|a| a.args.clone());
        let name = text.get(name_at).to_owned();
        let definition = Definition {
            arguments: arguments(text, attributes, params.0 + 1..params.1)?,
            declaration: d.clone(),
            limit,
            name: name.clone(),
        };
        let index = out.definitions.len();
        out.definitions.push(definition);
        if d.template.is_none() {
            let host = host_name(attributes, head).unwrap_or_else(|| name.clone());
            let function = format!("{}{name}", d.scope);
            out.add(index, host, function, "", text.line(name_at), None);
        }
    }
    for d in declarations.iter().filter(|d| d.instantiation) {
        let head = d.tokens.clone();
        let whole = Some(d.tokens.clone());
        let marked = head.clone().any(|i| text.get(i) == "kernel")
            || attributes
                .within(head.clone())
                .any(|a| a.name == "kernel" || a.name == "host_name");
        if !marked {
            continue;
        }
        let line = text.line(head.start);
        let Some(function) = instantiated(text, attributes, head.start + 1..head.end - 1) else {
            return reject(line, "cannot read this explicit instantiation");
        };
        let open = function
            .clone()
            .find(|&i| text.get(i) == "<")
            .unwrap_or(function.end);
        let base = text.get(open - 1);
        let Some(index) = out.definitions.iter().position(|def| def.name == base) else {
            return reject(
                line,
                format!("no kernel template `{base}` for this instantiation"),
            );
        };
        let expression = text.span(function.clone()).to_owned();
        let host = host_name(attributes, head).unwrap_or_else(|| expression.clone());
        let args = text.span(open..function.end).to_owned();
        let scope = if expression.contains("::") && text.get(function.start + 1) == "::" {
            d.scope.clone()
        } else {
            out.definitions[index].declaration.scope.clone()
        };
        out.add(
            index,
            host,
            format!("{scope}{expression}"),
            &args,
            line,
            whole,
        );
    }
    Ok(out)
}

fn host_name(attributes: &Attributes, range: Range<usize>) -> Option<String> {
    let attribute = attributes.within(range).find(|a| a.name == "host_name")?;
    // Adjacent literals are one string.
    Some(attribute.args.split('"').skip(1).step_by(2).collect())
}

/// The tokens that name the function in `template decltype(f<a>) f<a>` or `template void f<a>(...)`.
fn instantiated(
    text: &Text<'_>,
    attributes: &Attributes,
    range: Range<usize>,
) -> Option<Range<usize>> {
    let mut i = range.start;
    loop {
        if let Some(end) = attributes.skip(i) {
            i = end;
        } else if text.get(i) == "kernel" {
            i += 1;
        } else {
            break;
        }
    }
    i = if text.get(i) == "decltype" {
        text.closing(i + 1)? + 1
    } else {
        i + 1
    };
    while let Some(end) = attributes.skip(i) {
        i = end;
    }
    let start = i;
    while i < range.end && text.get(i) != "(" {
        i = if text.get(i) == "<" {
            text.closing_angle(i)? + 1
        } else {
            i + 1
        };
    }
    (start < i).then_some(start..i)
}

fn arguments(
    text: &Text<'_>,
    attributes: &Attributes,
    params: Range<usize>,
) -> Step<Vec<ArgumentInfo>> {
    let parts = text.split_commas(params);
    let mut out = Vec::with_capacity(parts.len());
    let mut unnumbered = Vec::new();
    for part in parts {
        let line = text.line(part.start);
        let mut words = Vec::new();
        let mut i = part.start;
        while i < part.end {
            match attributes.skip(i) {
                Some(end) => i = end,
                None => {
                    words.push(i);
                    i += 1;
                }
            }
        }
        let Some(&name_at) = words.iter().rev().find(|&&i| text.is_ident(i)) else {
            return reject(line, "cannot read this kernel argument");
        };
        let name = text.get(name_at).to_owned();
        let has = |word: &str| words.iter().any(|&i| text.get(i) == word);
        let space = [
            ("device", AddressSpace::Device),
            ("constant", AddressSpace::Constant),
            ("threadgroup", AddressSpace::Threadgroup),
        ]
        .into_iter()
        .find(|(word, _)| has(word))
        .map(|(_, space)| space);
        let list: Vec<_> = attributes.within(part.clone()).collect();
        let gate = list
            .iter()
            .find(|a| a.name == "function_constant")
            .map(|a| a.args.clone());
        let Some(space) = space else {
            let built_in = list
                .iter()
                .map(|a| a.name.as_str())
                .find(|n| built_ins::fetcher(n).is_some());
            let Some(built_in) = built_in else {
                return reject(
                    line,
                    format!("kernel argument `{name}` has no address space and no known attribute"),
                );
            };
            out.push(ArgumentInfo {
                name,
                kind: ArgumentKind::BuiltIn(built_in.to_owned()),
            });
            continue;
        };
        let table = if space == AddressSpace::Threadgroup {
            "threadgroup"
        } else {
            "buffer"
        };
        let index = match list.iter().find(|a| a.name == table) {
            Some(a) => match integer(&a.args)
                .and_then(|v| u32::try_from(v).ok())
                .filter(|&v| v < 31)
            {
                Some(v) => v,
                None => {
                    return reject(
                        line,
                        format!("{table}({}) is not an index below 31", a.args),
                    );
                }
            },
            None => {
                unnumbered.push(out.len());
                u32::MAX
            }
        };
        let is_const = space == AddressSpace::Constant || has("const");
        out.push(ArgumentInfo {
            name,
            kind: ArgumentKind::Buffer {
                index,
                space,
                is_const,
                gate,
            },
        });
    }
    number(&mut out, &unnumbered);
    Ok(out)
}

/// Arguments without an index get the lowest free one of their table.
fn number(arguments: &mut [ArgumentInfo], unnumbered: &[usize]) {
    for &i in unnumbered {
        let is_group = |k: &ArgumentKind| {
            matches!(
                k,
                ArgumentKind::Buffer {
                    space: AddressSpace::Threadgroup,
                    ..
                }
            )
        };
        let mine = is_group(&arguments[i].kind);
        let taken: BTreeSet<u32> = arguments
            .iter()
            .filter(|a| is_group(&a.kind) == mine)
            .filter_map(|a| match a.kind {
                ArgumentKind::Buffer { index, .. } => Some(index),
                ArgumentKind::BuiltIn(_) => None,
            })
            .collect();
        let free = (0..31).find(|n| !taken.contains(n)).unwrap_or(30);
        if let ArgumentKind::Buffer { index, .. } = &mut arguments[i].kind {
            *index = free;
        }
    }
}

impl Kernels {
    fn add(
        &mut self,
        index: usize,
        name: String,
        function: String,
        args: &str,
        line: u32,
        instantiation: Option<Range<usize>>,
    ) {
        let d = &self.definitions[index];
        let limit = d
            .limit
            .as_ref()
            .map(|_| format!("{}msl_limit_{index}{args}", d.declaration.scope));
        self.entries.push(Entry {
            info: KernelInfo {
                name,
                arguments: d.arguments.clone(),
                required_constants: Vec::new(),
                max_threads: None,
                threadgroup_bytes: 0,
                line,
            },
            function,
            base: d.name.clone(),
            instantiation,
            limit,
        });
    }

    /// Removes the instantiations of templates that are not among `names`, from the text too. All stay
    /// where `names` is empty.
    pub(crate) fn keep(&mut self, text: &mut Text<'_>, names: &[String], pass: Pass) {
        self.entries.retain(|e| {
            let Some(tokens) = e.instantiation.clone() else {
                return true;
            };
            let kept = names.is_empty() || names.contains(&e.info.name);
            // The registers pass has each kernel inlined in a function of its own.
            if !kept || pass == Pass::Registers {
                text.replace(tokens, String::new());
            }
            kept
        });
    }

    /// The expression that names a kernel inside its own body.
    pub(crate) fn key(&self, text: &Text<'_>, d: &Declaration) -> Option<String> {
        let def = self
            .definitions
            .iter()
            .find(|k| k.declaration.tokens == d.tokens)?;
        let Some((open, close)) = def.declaration.template else {
            return Some(def.name.clone());
        };
        let names: Vec<String> = text
            .split_commas(open + 1..close)
            .into_iter()
            .map(|part| {
                let end = part
                    .clone()
                    .find(|&i| text.get(i) == "=")
                    .unwrap_or(part.end);
                let name = (part.start..end)
                    .rev()
                    .find(|&i| text.is_ident(i))
                    .map_or("", |i| text.get(i));
                let pack = (part.start..end).any(|i| text.get(i) == ".");
                format!("{name}{}", if pack { "..." } else { "" })
            })
            .collect();
        Some(format!("{}<{}>", def.name, names.join(", ")))
    }
}

/// Adds a constant with the thread limit after each definition that has one.
pub(crate) fn declare_limits(text: &mut Text<'_>, kernels: &Kernels) {
    for (index, d) in kernels.definitions.iter().enumerate() {
        let Some(limit) = &d.limit else { continue };
        let header = d
            .declaration
            .template
            .map_or(String::new(), |(open, close)| {
                format!(
                    "template {} ",
                    text.span(open..close + 1).replace('\n', " ")
                )
            });
        let with = format!(" {header}static constexpr unsigned msl_limit_{index} = ({limit});");
        text.insert_after(d.declaration.tokens.end - 1, with);
    }
}
