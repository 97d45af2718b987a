//! Variables in threadgroup memory, declared in kernel bodies.

use std::ops::Range;

use super::declarations::Declaration;
use super::diagnostic::{Step, reject};
use super::kernels::Kernels;
use super::pass::Pass;
use crate::lex::Text;

/// Gives each variable its place in the threadgroup arena; returns names and lines by site.
pub(crate) fn rewrite(
    text: &mut Text<'_>,
    declarations: &[Declaration],
    kernels: &Kernels,
    pass: Pass,
) -> Step<Vec<(String, u32)>> {
    let mut sites = Vec::new();
    for d in declarations {
        let Some((open, close)) = d.body else {
            continue;
        };
        let mut i = open + 1;
        while i < close {
            if text.get(i) != "threadgroup" || !matches!(text.get(i - 1), "{" | "}" | ";" | ")") {
                i += 1;
                continue;
            }
            let Some(end) = statement_end(text, i, close) else {
                i += 1;
                continue;
            };
            let line = text.line(i);
            let Some(key) = kernels.key(text, d) else {
                return reject(
                    line,
                    "threadgroup variables can only be declared in a kernel",
                );
            };
            let with = declare(text, i + 1..end, &key, pass, &mut sites)?;
            text.replace(i..end + 1, with);
            i = end + 1;
        }
    }
    Ok(sites)
}

/// The `;` of a declaration that allocates; pointers, references and initialized ones do not.
fn statement_end(text: &Text<'_>, start: usize, limit: usize) -> Option<usize> {
    let mut angle = 0usize;
    let mut i = start;
    while i < limit {
        match text.get(i) {
            ";" => return Some(i),
            "*" | "&" | "=" if angle == 0 => return None,
            "<" => angle += 1,
            ">" => angle = angle.saturating_sub(1),
            "(" | "[" | "{" => i = text.closing(i)?,
            _ => {}
        }
        i += 1;
    }
    None
}

fn declare(
    text: &Text<'_>,
    range: Range<usize>,
    key: &str,
    pass: Pass,
    sites: &mut Vec<(String, u32)>,
) -> Step<String> {
    let line = text.line(range.start);
    let mut type_text = String::new();
    let mut out = String::new();
    for (n, part) in text.split_commas(range).into_iter().enumerate() {
        let dims = first_bracket(text, part.clone());
        let name_at = dims.saturating_sub(1);
        if name_at < part.start || !text.is_ident(name_at) || (n == 0 && name_at == part.start) {
            return reject(line, "cannot read this threadgroup declaration");
        }
        if n == 0 {
            type_text = text.span(part.start..name_at).to_owned();
        }
        let site = sites.len();
        let name = text.get(name_at);
        let extent = text.span(dims..part.end);
        out += &format!("typedef {type_text} msl_t{site} {extent}; ");
        out += &match pass {
            Pass::Types => {
                format!("MSL_THREADGROUP msl_t{site} &{name} = *(MSL_THREADGROUP msl_t{site} *)0; ")
            }
            Pass::Code | Pass::Registers => format!(
                "msl_t{site} &{name} = *(msl_t{site} *)msl_rt::threadgroup_var<&{key}, {site}, \
                 sizeof(msl_t{site}), (alignof(msl_t{site}) < 16 ? 16 : alignof(msl_t{site}))>(); "
            ),
        };
        sites.push((name.to_owned(), line));
    }
    Ok(out)
}

fn first_bracket(text: &Text<'_>, range: Range<usize>) -> usize {
    let mut angle = 0usize;
    let mut i = range.start;
    while i < range.end {
        match text.get(i) {
            "[" if angle == 0 => return i,
            "<" => angle += 1,
            ">" => angle = angle.saturating_sub(1),
            "(" => i = text.closing(i).unwrap_or(i),
            _ => {}
        }
        i += 1;
    }
    range.end
}
