//! Words and literals that C++ spells differently, and the swizzles in use.

use std::collections::BTreeSet;

use super::diagnostic::{Step, reject};
use crate::lex::{Kind, Text};

/// Gives literals their Metal types and removes Metal's own keywords.
pub(crate) fn rewrite(text: &mut Text<'_>) -> Step<()> {
    for i in 0..text.tokens.len() {
        let word = text.get(i);
        match text.kind(i) {
            Some(Kind::Ident) => match word {
                "double" => return reject(text.line(i), "`double` is not a type in Metal"),
                "kernel" if text.get(i + 1) != "(" => text.replace(i..i + 1, String::new()),
                "vertex" | "fragment" if text.is_ident(i + 1) && !is_member(text, i) => {
                    return reject(text.line(i), format!("`{word}` functions are not emulated"));
                }
                _ => {}
            },
            Some(Kind::Number) => {
                if let Some(with) = number(word) {
                    text.replace(i..i + 1, with);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_member(text: &Text<'_>, i: usize) -> bool {
    i > 0 && matches!(text.get(i - 1), "." | "->" | "::")
}

/// Unsuffixed literals are float, `h` ones half.
fn number(word: &str) -> Option<String> {
    let hex = word.starts_with("0x") || word.starts_with("0X");
    let real = if hex {
        word.contains(['p', 'P'])
    } else {
        word.contains(['.', 'e', 'E'])
    };
    if let Some(digits) = word.strip_suffix(['h', 'H']) {
        return (!hex || real).then(|| {
            let dot = if real { "" } else { ".0" };
            format!("((half){digits}{dot}f)")
        });
    }
    let suffixed = word.ends_with(['f', 'F']) && (!hex || real);
    (real && !suffixed).then(|| format!("{word}f"))
}

/// The swizzles that the program names, as the macros that give vectors those members.
pub(crate) fn swizzles(text: &Text<'_>) -> String {
    let mut used = BTreeSet::new();
    for i in 1..text.tokens.len() {
        if !matches!(text.get(i - 1), "." | "->") || !text.is_ident(i) || text.get(i + 1) == "(" {
            continue;
        }
        let word = text.get(i);
        let letters = word.len() >= 2 && word.bytes().all(|c| b"xyzw".contains(&c));
        let colors = !word.is_empty() && word.bytes().all(|c| b"rgba".contains(&c));
        if word.len() <= 4 && (letters || colors) {
            used.insert(word);
        }
    }
    (2..=4).map(|n| macro_for(n, &used)).collect()
}

fn macro_for(n: usize, used: &BTreeSet<&str>) -> String {
    let mut out = format!("#define MSL_SWIZZLES_{n}");
    for word in used {
        let fields: Vec<usize> = word
            .bytes()
            .filter_map(|c| b"xyzwrgba".iter().position(|&l| l == c).map(|p| p % 4))
            .collect();
        if fields.iter().any(|&f| f >= n) {
            continue;
        }
        let names = ["x", "y", "z", "w"];
        let distinct = (0..fields.len()).all(|i| !fields[..i].contains(&fields[i]));
        let ty = if fields.len() == 1 {
            "T".to_owned()
        } else {
            format!("vec<T, {}>", fields.len())
        };
        let get: Vec<&str> = fields.iter().map(|&f| names[f]).collect();
        out += &format!(
            " MSL_INLINE {ty} msl_get_{word}() const {{ return {ty}({}); }}",
            get.join(", ")
        );
        let mut access = format!("get = msl_get_{word}");
        if distinct {
            let put: String = fields
                .iter()
                .enumerate()
                .map(|(i, &f)| {
                    let source = if fields.len() == 1 {
                        "v".to_owned()
                    } else {
                        format!("v.{}", names[i])
                    };
                    format!(" {} = {source};", names[f])
                })
                .collect();
            out += &format!(" MSL_INLINE void msl_put_{word}({ty} v) {{{put} }}");
            access += &format!(", put = msl_put_{word}");
        }
        out += &format!(" __declspec(property({access})) {ty} {word};");
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn literals_are_single_precision() {
        assert_eq!(number("1.0").as_deref(), Some("1.0f"));
        assert_eq!(number("1e-3").as_deref(), Some("1e-3f"));
        assert_eq!(number("0x1p3").as_deref(), Some("0x1p3f"));
        assert_eq!(number("0.5h").as_deref(), Some("((half)0.5f)"));
        assert_eq!(number("1.0f"), None);
        assert_eq!(number("0xef"), None);
        assert_eq!(number("12u"), None);
    }
}
