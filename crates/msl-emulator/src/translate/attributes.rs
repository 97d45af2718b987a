//! `[[...]]` attributes: read, then blanked, as the C++ compiler does not know them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::diagnostic::{Step, reject};
use crate::lex::Text;

/// One attribute: its name and the text between its parentheses.
#[derive(Debug, Clone)]
pub(crate) struct Attribute {
    pub(crate) name: String,
    pub(crate) args: String,
}

/// Attribute lists by first token, each with its tokens.
pub(crate) struct Attributes {
    lists: BTreeMap<usize, (Range<usize>, Vec<Attribute>)>,
}

impl Attributes {
    /// The end of the list that starts at token `i`, if one does.
    pub(crate) fn skip(&self, i: usize) -> Option<usize> {
        self.lists.get(&i).map(|(at, _)| at.end)
    }

    /// Every attribute in a range of tokens.
    pub(crate) fn within(&self, range: Range<usize>) -> impl Iterator<Item = &Attribute> {
        self.lists.range(range).flat_map(|(_, (_, list))| list)
    }
}

/// Finds every list.
pub(crate) fn collect(text: &Text<'_>) -> Step<Attributes> {
    let mut lists = BTreeMap::new();
    let mut i = 0;
    while i < text.tokens.len() {
        if text.get(i) != "[" || text.get(i + 1) != "[" {
            i += 1;
            continue;
        }
        let Some(end) = text.closing(i) else {
            return reject(text.line(i), "unclosed attribute");
        };
        let inner = text.closing(i + 1).unwrap_or(end);
        if inner + 1 != end {
            i += 1;
            continue;
        }
        let list = text
            .split_commas(i + 2..inner)
            .into_iter()
            .map(|part| {
                let open = part.clone().find(|&k| text.get(k) == "(");
                let name_end = open.unwrap_or(part.end);
                let args = open.map_or("", |o| text.span(o + 1..part.end - 1));
                Attribute {
                    name: text.span(part.start..name_end).replace(' ', ""),
                    args: args.to_owned(),
                }
            })
            .collect();
        lists.insert(i, (i..end + 1, list));
        i = end + 1;
    }
    Ok(Attributes { lists })
}

/// Removes them all.
pub(crate) fn blank(text: &mut Text<'_>, attributes: &Attributes) {
    for (at, _) in attributes.lists.values() {
        text.replace(at.clone(), String::new());
    }
}
