//! Which Metal kernels would keep variables in memory: each kernel is compiled with its function constants
//! fixed, as a pipeline is, and no `alloca` may be left.

use std::collections::BTreeMap;
use std::thread;

use mlx_flash_attn::KernelRegistry;
use mlx_flash_attn::abi::bindings::constant;
use msl_emulator::{CompileOptions, Constant};

/// The constants of a pipeline.
struct Fixed {
    name: &'static str,
    /// Whether every option is on and no length is a whole number of tiles; else the reverse.
    full: bool,
    /// Simdgroups of the kernels that can run with 4 or 8.
    simdgroups: i32,
}

/// Kernels that one run of the compiler takes.
const KERNELS_A_JOB: usize = 24;

const FIXED: [Fixed; 3] = [
    Fixed {
        name: "no options",
        full: false,
        simdgroups: 8,
    },
    Fixed {
        name: "all options",
        full: true,
        simdgroups: 8,
    },
    Fixed {
        name: "all options, 4 simdgroups",
        full: true,
        simdgroups: 4,
    },
];

impl Fixed {
    fn values(&self) -> Vec<(u32, Constant)> {
        let full = self.full;
        let flags = [
            (constant::ALIGN_Q, !full),
            (constant::ALIGN_K, !full),
            (constant::HAS_MASK, full),
            (constant::DO_CAUSAL, full),
            (constant::HAS_SINKS, full),
            (constant::HAS_BLK, full),
            (constant::HAS_WINDOW, full),
            (constant::HAS_SOFTCAP, full),
            (constant::HAS_ALIBI, full),
            (constant::HAS_LSE, full),
            (constant::IS_VARLEN, full),
            (constant::IS_PAGED, full),
            (constant::HAS_KEY_LENGTHS, full),
            (constant::PACKS_QUERIES, full),
        ];
        let numbers = [
            (constant::MASK_DTYPE, 1),
            (constant::NSG, self.simdgroups),
            (constant::BLK_BQ, 32),
            (constant::BLK_BK, 16),
        ];
        let flags = flags.map(|(index, value)| (index as u32, Constant::Bool(value)));
        let numbers = numbers.map(|(index, value)| (index as u32, Constant::Int(value)));
        flags.into_iter().chain(numbers).collect()
    }
}

pub(crate) fn run() -> Result<(), String> {
    let registry = KernelRegistry::new();
    let mut texts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, text) in registry.sources() {
        // These are other names for the same code.
        if !name.contains("_llamacpp_") {
            texts.entry(text).or_default().push(name);
        }
    }
    let checked: Vec<Result<String, String>> = thread::scope(|scope| {
        let mut jobs = Vec::new();
        for (text, names) in &texts {
            for fixed in &FIXED {
                // Four simdgroups are a choice at head dim 512 alone, and without a mask its kind
                // changes nothing.
                let names: Vec<&str> = names
                    .iter()
                    .copied()
                    .filter(|name| fixed.simdgroups == 8 || name.contains("_d512"))
                    .filter(|name| fixed.full || !name.ends_with("_boolmask"))
                    .collect();
                for part in names.chunks(KERNELS_A_JOB) {
                    let part = part.to_vec();
                    jobs.push(scope.spawn(move || check(text, &part, fixed)));
                }
            }
        }
        let join = |job: thread::ScopedJoinHandle<'_, _>| {
            job.join()
                .unwrap_or_else(|_| Err("a check panicked".into()))
        };
        jobs.into_iter().map(join).collect()
    });
    let (kernels, faults): (Vec<_>, Vec<_>) = checked.into_iter().partition(Result::is_ok);
    for line in kernels.into_iter().flatten() {
        println!("{line}");
    }
    let faults: Vec<String> = faults.into_iter().filter_map(Result::err).collect();
    if faults.is_empty() {
        return Ok(());
    }
    Err(faults.join("\n"))
}

fn check(text: &str, names: &[&str], fixed: &Fixed) -> Result<String, String> {
    let mut options = CompileOptions::named("kernels.metal");
    options.kernels = names.iter().map(|name| (*name).to_owned()).collect();
    let found = msl_emulator::kept_in_memory(text, &options, &fixed.values())
        .map_err(|e| format!("{}: {e}", fixed.name))?;
    if found.is_empty() {
        return Ok(format!(
            "{} kernels with {}: nothing in memory",
            names.len(),
            fixed.name
        ));
    }
    let lines: Vec<String> = found
        .iter()
        .map(|(kernel, variables)| {
            format!(
                "{kernel} with {}, in memory: {}",
                fixed.name,
                variables.join("; ")
            )
        })
        .collect();
    Err(lines.join("\n"))
}
