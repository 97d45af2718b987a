//! Tokens of preprocessed Metal text.

use std::ops::Range;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ident,
    Number,
    Text,
    Punct,
    Directive,
}

/// A token: its kind, where it stands in the text, and its line in the program.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) at: Range<usize>,
    pub(crate) line: u32,
}

/// Splits `text` into tokens; line markers (`# 12 "file"`) set the line of what follows.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let b = text.as_bytes();
    let mut out = Vec::new();
    let mut i = 0;
    let mut line = 1u32;
    let mut fresh = true;
    while i < b.len() {
        let c = b[i];
        if c == b'\n' {
            line += 1;
            fresh = true;
            i += 1;
            continue;
        }
        if c.is_ascii_whitespace() {
            i += 1;
            continue;
        }
        let start = i;
        let kind = if c == b'#' && fresh {
            i = end_of_line(b, i);
            if let Some(n) = marker_line(&text[start..i]) {
                // The newline that follows brings it to `n`.
                line = n.wrapping_sub(1);
            }
            Kind::Directive
        } else if c.is_ascii_alphabetic() || c == b'_' {
            while i < b.len() && (b[i].is_ascii_alphanumeric() || b[i] == b'_') {
                i += 1;
            }
            Kind::Ident
        } else if c.is_ascii_digit() || (c == b'.' && b.get(i + 1).is_some_and(u8::is_ascii_digit))
        {
            i = end_of_number(b, i);
            Kind::Number
        } else if c == b'"' || c == b'\'' {
            i = end_of_quote(b, i);
            Kind::Text
        } else {
            i += if matches!(b.get(i..i + 2), Some(b"::" | b"->")) {
                2
            } else {
                1
            };
            // Text past ASCII is one token a character.
            while i < b.len() && !text.is_char_boundary(i) {
                i += 1;
            }
            Kind::Punct
        };
        fresh = false;
        out.push(Token {
            kind,
            at: start..i,
            line,
        });
    }
    out
}

fn end_of_line(b: &[u8], mut i: usize) -> usize {
    while i < b.len() && b[i] != b'\n' {
        i += 1;
    }
    i
}

fn end_of_number(b: &[u8], mut i: usize) -> usize {
    let hex = matches!(b.get(i..i + 2), Some(b"0x" | b"0X"));
    while i < b.len() {
        let c = b[i];
        let sign_after_exponent = (c == b'+' || c == b'-')
            && i > 0
            && (matches!(b[i - 1], b'p' | b'P') || (!hex && matches!(b[i - 1], b'e' | b'E')));
        if !(c.is_ascii_alphanumeric() || c == b'.' || c == b'_' || sign_after_exponent) {
            break;
        }
        i += 1;
    }
    i
}

fn end_of_quote(b: &[u8], mut i: usize) -> usize {
    let quote = b[i];
    i += 1;
    while i < b.len() && b[i] != quote && b[i] != b'\n' {
        i += if b[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(b.len())
}

fn marker_line(directive: &str) -> Option<u32> {
    let rest = directive.strip_prefix('#')?.trim_start();
    let rest = rest.strip_prefix("line").unwrap_or(rest).trim_start();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// A text with its tokens, and the edits to make in it.
pub(crate) struct Text<'a> {
    pub(crate) text: &'a str,
    pub(crate) tokens: Vec<Token>,
    edits: Vec<(Range<usize>, String)>,
}

impl<'a> Text<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self {
            text,
            tokens: tokens(text),
            edits: Vec::new(),
        }
    }

    /// The text of token `i`; empty past the end.
    pub(crate) fn get(&self, i: usize) -> &'a str {
        self.tokens.get(i).map_or("", |t| &self.text[t.at.clone()])
    }

    pub(crate) fn kind(&self, i: usize) -> Option<Kind> {
        self.tokens.get(i).map(|t| t.kind)
    }

    pub(crate) fn is_ident(&self, i: usize) -> bool {
        self.kind(i) == Some(Kind::Ident)
    }

    pub(crate) fn line(&self, i: usize) -> u32 {
        self.tokens
            .get(i)
            .or(self.tokens.last())
            .map_or(0, |t| t.line)
    }

    /// The source between two tokens, both included.
    pub(crate) fn span(&self, range: Range<usize>) -> &'a str {
        if range.is_empty() {
            return "";
        }
        &self.text[self.tokens[range.start].at.start..self.tokens[range.end - 1].at.end]
    }

    /// The token that closes the bracket at `open`.
    pub(crate) fn closing(&self, open: usize) -> Option<usize> {
        let mut depth = 0usize;
        for i in open..self.tokens.len() {
            match self.get(i) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => {
                    depth -= 1;
                    if depth == 0 {
                        return Some(i);
                    }
                }
                _ => {}
            }
        }
        None
    }

    /// The `>` that closes the `<` at `open`.
    pub(crate) fn closing_angle(&self, open: usize) -> Option<usize> {
        let mut depth = 0usize;
        let mut i = open;
        while i < self.tokens.len() {
            match self.get(i) {
                "<" => depth += 1,
                ">" => {
                    depth -= 1;
                    if depth == 0 {
                        return Some(i);
                    }
                }
                "(" | "[" | "{" => i = self.closing(i)?,
                ";" => return None,
                _ => {}
            }
            i += 1;
        }
        None
    }

    /// Splits a range at its commas, brackets and angles respected.
    pub(crate) fn split_commas(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut parts = Vec::new();
        let mut start = range.start;
        let mut angle = 0usize;
        let mut i = range.start;
        while i < range.end {
            match self.get(i) {
                "(" | "[" | "{" => i = self.closing(i).unwrap_or(range.end),
                "<" => angle += 1,
                ">" => angle = angle.saturating_sub(1),
                "," if angle == 0 => {
                    parts.push(start..i);
                    start = i + 1;
                }
                _ => {}
            }
            i += 1;
        }
        if start < range.end {
            parts.push(start..range.end);
        }
        parts
    }

    /// Replaces tokens by text that keeps their line count.
    pub(crate) fn replace(&mut self, range: Range<usize>, with: String) {
        let old = self.span(range.clone());
        let lines = old
            .matches('\n')
            .count()
            .saturating_sub(with.matches('\n').count());
        let at = self.tokens[range.start].at.start..self.tokens[range.end - 1].at.end;
        self.edits.push((at, with + &"\n".repeat(lines)));
    }

    /// Adds text after a token.
    pub(crate) fn insert_after(&mut self, i: usize, with: String) {
        let end = self.tokens[i].at.end;
        self.edits.push((end..end, with));
    }

    /// The text with its edits made; an edit inside another is dropped.
    pub(crate) fn finish(mut self) -> String {
        self.edits
            .sort_by_key(|(at, _)| (at.start, std::cmp::Reverse(at.end)));
        let mut out = String::with_capacity(self.text.len() * 2);
        let mut done = 0;
        for (at, with) in &self.edits {
            if at.start < done {
                continue;
            }
            out.push_str(&self.text[done..at.start]);
            out.push_str(with);
            done = at.end;
        }
        out.push_str(&self.text[done..]);
        out
    }
}

/// The value of an integer expression of literals, `+ - * / << ( )`.
pub(crate) fn integer(text: &str) -> Option<i64> {
    let t = Text::new(text);
    let mut at = 0;
    let value = sum(&t, &mut at)?;
    (at == t.tokens.len()).then_some(value)
}

fn sum(t: &Text<'_>, at: &mut usize) -> Option<i64> {
    let mut value = product(t, at)?;
    loop {
        match t.get(*at) {
            "+" => {
                *at += 1;
                value = value.checked_add(product(t, at)?)?;
            }
            "-" => {
                *at += 1;
                value = value.checked_sub(product(t, at)?)?;
            }
            _ => return Some(value),
        }
    }
}

fn product(t: &Text<'_>, at: &mut usize) -> Option<i64> {
    let mut value = atom(t, at)?;
    loop {
        match t.get(*at) {
            "*" => {
                *at += 1;
                value = value.checked_mul(atom(t, at)?)?;
            }
            "/" => {
                *at += 1;
                value = value.checked_div(atom(t, at)?)?;
            }
            _ => return Some(value),
        }
    }
}

fn atom(t: &Text<'_>, at: &mut usize) -> Option<i64> {
    let text = t.get(*at);
    *at += 1;
    if text == "(" {
        let value = sum(t, at)?;
        let closed = t.get(*at) == ")";
        *at += 1;
        return closed.then_some(value);
    }
    let digits = text.trim_end_matches(['u', 'U', 'l', 'L']);
    match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) => i64::from_str_radix(hex, 16).ok(),
        None => digits.parse().ok(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_follow_markers() {
        let t = Text::new("a\n# 40 \"x.metal\"\nb\n\nc");
        let lines: Vec<_> = (0..t.tokens.len()).map(|i| (t.get(i), t.line(i))).collect();
        assert_eq!(lines[0], ("a", 1));
        assert_eq!(lines[2], ("b", 40));
        assert_eq!(lines[3], ("c", 42));
    }

    #[test]
    fn numbers_are_one_token() {
        let t = Text::new("1.5e-3f 0x1.0p-126f .5h a-1");
        let all: Vec<_> = (0..t.tokens.len()).map(|i| t.get(i)).collect();
        assert_eq!(all, ["1.5e-3f", "0x1.0p-126f", ".5h", "a", "-", "1"]);
    }

    #[test]
    fn integers_are_evaluated() {
        assert_eq!(integer("(100 + 2) * 3"), Some(306));
        assert_eq!(integer("0x20u"), Some(32));
        assert_eq!(integer("WM * 32"), None);
    }

    #[test]
    fn edits_keep_lines() {
        let mut t = Text::new("a [[x,\n y]] b");
        t.replace(1..8, String::new());
        assert_eq!(t.finish(), "a \n b");
    }
}
