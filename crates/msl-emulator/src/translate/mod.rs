//! From preprocessed Metal to C++: what the lexical pass reads and rewrites.

mod attributes;
mod built_ins;
pub(crate) mod constants;
mod declarations;
mod diagnostic;
pub(crate) mod emit;
mod kernels;
mod pass;
mod reach;
mod storage;
mod words;

use crate::error::{Error, Result};
use crate::lex::Text;
use crate::reflect::{ConstantInfo, KernelInfo};
use diagnostic::Step;

pub(crate) use pass::Pass;

/// A program after the lexical pass.
#[derive(Debug)]
pub(crate) struct Program {
    /// Name of the text, for errors and faults.
    pub(crate) file: String,
    /// C++ for the pass.
    pub(crate) code: String,
    /// Names of all kernels of the text.
    pub(crate) names: Vec<String>,
    /// Kernels, in the order of the compiled program's table.
    pub(crate) kernels: Vec<KernelInfo>,
    /// Function constants, in the order of the table.
    pub(crate) constants: Vec<ConstantInfo>,
    /// Globals computed from them, in the order of the table.
    pub(crate) derived: Vec<String>,
    /// Threadgroup variables: name and line, by site.
    pub(crate) storage: Vec<(String, u32)>,
}

/// Reads and rewrites `expanded`, the preprocessed text of the program `file`. Of its kernel templates
/// only the instantiations in `only` remain, or all where that is empty.
pub(crate) fn translate(
    expanded: &str,
    file: &str,
    only: &[String],
    pass: Pass,
) -> Result<Program> {
    run(expanded, file, only, pass).map_err(|d| Error::Text {
        file: file.into(),
        line: d.line,
        message: d.message,
    })
}

fn run(expanded: &str, file: &str, only: &[String], pass: Pass) -> Step<Program> {
    let mut text = Text::new(expanded);
    let attributes = attributes::collect(&text)?;
    let declarations = declarations::split(&text, &attributes);
    let constants = constants::find(&text, &attributes, &declarations)?;
    let mut kernels = kernels::find(&text, &attributes, &declarations)?;
    constants::check_gates(&constants, &kernels)?;
    let names = kernels
        .entries
        .iter()
        .map(|e| e.info.name.clone())
        .collect();
    kernels.keep(&mut text, only, pass);
    reach::required_constants(&text, &declarations, &constants, &mut kernels);
    let swizzles = words::swizzles(&text);
    let storage = storage::rewrite(&mut text, &declarations, &kernels, pass)?;
    constants::rewrite(&mut text, &constants, pass);
    words::rewrite(&mut text)?;
    attributes::blank(&mut text, &attributes);
    kernels::declare_limits(&mut text, &kernels);
    let body = text.finish();
    let code = emit::program(&body, &kernels, &constants, &swizzles, pass);
    Ok(Program {
        file: file.to_owned(),
        code,
        names,
        kernels: kernels.entries.into_iter().map(|e| e.info).collect(),
        derived: constants.derived.into_iter().map(|d| d.name).collect(),
        constants: constants.declared.into_iter().map(|c| c.info).collect(),
        storage,
    })
}
