//! The declarations at namespace scope.

use std::ops::Range;

use super::attributes::Attributes;
use crate::lex::{Kind, Text};

/// A declaration at namespace scope.
#[derive(Debug, Clone)]
pub(crate) struct Declaration {
    /// Its tokens.
    pub(crate) tokens: Range<usize>,
    /// Namespaces around it, as `a::b::`.
    pub(crate) scope: String,
    /// Token of its name, where it has one.
    pub(crate) name: Option<usize>,
    /// `<` and `>` of a template header.
    pub(crate) template: Option<(usize, usize)>,
    /// `template` without a header: an explicit instantiation.
    pub(crate) instantiation: bool,
    /// Parentheses of the parameters, for functions.
    pub(crate) params: Option<(usize, usize)>,
    /// Braces of the body, for functions.
    pub(crate) body: Option<(usize, usize)>,
}

/// Splits the text.
pub(crate) fn split(text: &Text<'_>, attributes: &Attributes) -> Vec<Declaration> {
    let mut out = Vec::new();
    let mut scopes: Vec<String> = Vec::new();
    let mut i = 0;
    while i < text.tokens.len() {
        if text.kind(i) == Some(Kind::Directive) || text.get(i) == ";" {
            i += 1;
        } else if text.get(i) == "}" {
            scopes.pop();
            i += 1;
        } else if text.get(i) == "namespace" && text.get(i + 2) == "{" {
            scopes.push(format!("{}::", text.get(i + 1)));
            i += 3;
        } else if (text.get(i) == "namespace" && text.get(i + 1) == "{")
            || (text.get(i) == "extern" && text.get(i + 2) == "{")
        {
            scopes.push(String::new());
            i += if text.get(i) == "extern" { 3 } else { 2 };
        } else {
            let d = one(text, attributes, i, scopes.concat());
            i = d.tokens.end.max(i + 1);
            out.push(d);
        }
    }
    out
}

fn one(text: &Text<'_>, attributes: &Attributes, start: usize, scope: String) -> Declaration {
    let mut d = Declaration {
        tokens: start..text.tokens.len(),
        scope,
        name: None,
        template: None,
        instantiation: false,
        params: None,
        body: None,
    };
    let mut i = start;
    if text.get(i) == "template" {
        if text.get(i + 1) == "<" {
            let close = text.closing_angle(i + 1).unwrap_or(i + 1);
            d.template = Some((i + 1, close));
            i = close + 1;
        } else {
            d.instantiation = true;
            i += 1;
        }
    }
    let mut is_type = false;
    let mut named = false;
    let mut assigned = false;
    while i < text.tokens.len() {
        if let Some(end) = attributes.skip(i) {
            i = end;
            continue;
        }
        match text.get(i) {
            ";" => {
                d.tokens.end = i + 1;
                return d;
            }
            "}" => {
                d.tokens.end = i;
                return d;
            }
            "struct" | "class" | "union" | "enum" | "using" | "typedef"
                if !named && d.params.is_none() =>
            {
                is_type = true;
                let mut n = i + 1;
                while let Some(end) = attributes.skip(n) {
                    n = end;
                }
                if text.get(n) == "class" {
                    n += 1;
                }
                if text.is_ident(n) && text.get(i) != "typedef" {
                    d.name = Some(n);
                    named = true;
                    i = n;
                }
            }
            "decltype" | "alignas" | "__attribute__" | "static_assert"
                if text.get(i + 1) == "(" =>
            {
                i = text.closing(i + 1).unwrap_or(i);
            }
            "operator" if d.params.is_none() => {
                // The name of an operator may itself be made of brackets.
                d.name = Some(i);
                named = true;
                i += 1;
                if text.get(i) == "(" {
                    i += 1;
                }
                while i + 1 < text.tokens.len() && text.get(i + 1) != "(" {
                    i += 1;
                }
            }
            "(" => {
                let close = text.closing(i).unwrap_or(text.tokens.len() - 1);
                if d.params.is_none() && !assigned && !is_type && i > start && !d.instantiation {
                    d.params = Some((i, close));
                    if text.is_ident(i - 1) && !named {
                        d.name = Some(i - 1);
                    }
                    named = true;
                }
                i = close;
            }
            "[" if !named => {
                named = true;
                i = text.closing(i).unwrap_or(i);
            }
            "=" => {
                assigned = true;
                named = true;
            }
            "{" => {
                let close = text.closing(i).unwrap_or(text.tokens.len() - 1);
                if d.params.is_some() && !assigned && !is_type {
                    d.body = Some((i, close));
                    d.tokens.end = close + 1;
                    return d;
                }
                named = true;
                i = close;
            }
            _ if text.is_ident(i) && !named => d.name = Some(i),
            _ => {}
        }
        i += 1;
    }
    d
}
