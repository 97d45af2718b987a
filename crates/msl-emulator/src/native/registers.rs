//! What a GPU's compiler would leave in memory.

use super::cache;
use super::compiler;
use super::library::expanded;
use super::shim;
use crate::dispatch::Constant;
use crate::error::Result;
use crate::options::CompileOptions;
use crate::translate::{self, Pass, constants, emit};

/// Compiles the kernels of `source` with their function constants fixed, for a GPU-like target on which a
/// matrix is a value that the optimiser cannot see into, and gives for each kernel the variables
/// that are still in memory at `-O2`, as LLVM writes them. A function that was not inlined is listed
/// under its own symbol, and a kernel with none is not listed.
///
/// An array of matrices stays in memory where a loop that indexes it is not unrolled whole. Every access then
/// goes through memory, which costs a kernel most of its speed.
///
/// # Errors
/// As [`Library::compile`](crate::Library::compile), and [`Error::Compile`](crate::Error::Compile) where a
/// function constant has no value.
pub fn kept_in_memory(
    source: &str,
    options: &CompileOptions,
    values: &[(u32, Constant)],
) -> Result<Vec<(String, Vec<String>)>> {
    let dir = cache::dir()?;
    let headers = shim::headers(&dir)?;
    let expanded = expanded(source, options, &headers, &dir, compiler::fingerprint()?)?;
    let only = &options.kernels;
    let program = translate::translate(&expanded, &options.name, only, Pass::Registers)?;
    let defines: Vec<String> = values
        .iter()
        .map(|(index, value)| format!("-D{}={}", constants::fixed_macro(*index), literal(*value)))
        .collect();
    let llvm = compiler::optimised(&program.code, &defines, &headers)?;
    let kernel_of = |symbol: &str| {
        let number = symbol.strip_prefix(emit::ENTRY)?.parse::<usize>().ok()?;
        Some(program.kernels.get(number)?.name.clone())
    };
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for line in llvm.lines() {
        if let Some((_, rest)) = line.split_once('@').filter(|_| line.starts_with("define ")) {
            let symbol = rest.split('(').next().unwrap_or_default();
            let name = kernel_of(symbol).unwrap_or_else(|| symbol.to_owned());
            found.push((name, Vec::new()));
        } else if line.contains(" = alloca ")
            && let Some((_, variables)) = found.last_mut()
        {
            variables.push(line.trim().to_owned());
        }
    }
    found.retain(|(_, variables)| !variables.is_empty());
    Ok(found)
}

fn literal(value: Constant) -> String {
    match value {
        Constant::Bool(v) => v.to_string(),
        Constant::Int(v) => v.to_string(),
        Constant::Uint(v) => v.to_string(),
        Constant::Float(v) => format!("{v:?}f"),
    }
}
