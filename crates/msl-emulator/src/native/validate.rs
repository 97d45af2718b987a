//! What a dispatch must have before it runs.

use super::abi::{ARENA, ArenaVar};
use super::module::{Module, Variable};
use crate::dispatch::Dispatch;
use crate::error::{Error, Result};
use crate::options::Limits;
use crate::reflect::{AddressSpace, ArgumentKind, KernelInfo};
use crate::translate::Program;

/// Where threadgroup memory lies in the arena.
pub(crate) struct Arena {
    /// Variables with their offsets.
    pub(crate) variables: Vec<(Variable, u32)>,
    /// `[[threadgroup(n)]]` arguments: index and offset.
    pub(crate) arguments: Vec<(usize, u32)>,
    /// All of them, with names.
    pub(crate) extents: Vec<ArenaVar>,
    pub(crate) names: Vec<String>,
    pub(crate) bytes: u32,
}

fn limit(kernel: &KernelInfo, message: String) -> Error {
    Error::Limit {
        kernel: kernel.name.clone(),
        message,
    }
}

/// Checks the grid.
pub(crate) fn grid(kernel: &KernelInfo, dispatch: &Dispatch<'_>, limits: &Limits) -> Result<()> {
    if limits.simd_width != 32 {
        return Err(Error::Unsupported(format!(
            "a simdgroup of {} threads; only 32 is emulated",
            limits.simd_width
        )));
    }
    let product = |v: [u32; 3]| v.iter().try_fold(1u64, |p, &n| p.checked_mul(u64::from(n)));
    let Some(threads) = product(dispatch.threads).filter(|&n| n > 0) else {
        return Err(limit(
            kernel,
            format!("a threadgroup of {:?} threads", dispatch.threads),
        ));
    };
    if product(dispatch.threadgroups).is_none() {
        return Err(limit(
            kernel,
            format!("a grid of {:?} threadgroups", dispatch.threadgroups),
        ));
    }
    let device = u64::from(limits.max_threads.min(1024));
    if threads > device {
        return Err(limit(
            kernel,
            format!("{threads} threads in a threadgroup; the device allows {device}"),
        ));
    }
    if let Some(own) = kernel.max_threads.filter(|&n| threads > u64::from(n)) {
        return Err(limit(
            kernel,
            format!(
                "{threads} threads in a threadgroup; max_total_threads_per_threadgroup is {own}"
            ),
        ));
    }
    Ok(())
}

/// Whether an argument exists: it has no gate, or its function constant is true. `derived` names the
/// computed constants that are.
fn exists(
    program: &Program,
    dispatch: &Dispatch<'_>,
    derived: &[&str],
    gate: Option<&str>,
) -> bool {
    use crate::dispatch::Constant;
    let Some(gate) = gate else { return true };
    let Some(info) = program.constants.iter().find(|c| c.name == gate) else {
        return derived.contains(&gate);
    };
    match dispatch.constants.get(&info.index) {
        Some(Constant::Bool(b)) => *b,
        Some(Constant::Int(v)) => *v != 0,
        Some(Constant::Uint(v)) => *v != 0,
        Some(Constant::Float(v)) => *v != 0.0,
        None => false,
    }
}

/// Checks that buffers are bound, and large enough for what is passed by reference.
pub(crate) fn bindings(
    program: &Program,
    kernel: &KernelInfo,
    sizes: &[u32],
    derived: &[&str],
    dispatch: &Dispatch<'_>,
) -> Result<()> {
    for (argument, &size) in kernel.arguments.iter().zip(sizes) {
        let ArgumentKind::Buffer {
            index, space, gate, ..
        } = &argument.kind
        else {
            continue;
        };
        if !exists(program, dispatch, derived, gate.as_deref()) {
            continue;
        }
        let missing = |what| Error::MissingBinding {
            kernel: kernel.name.clone(),
            what,
            index: *index,
            argument: argument.name.clone(),
        };
        if *space == AddressSpace::Threadgroup {
            dispatch
                .threadgroup_memory
                .get(index)
                .ok_or_else(|| missing("threadgroup"))?;
            continue;
        }
        let binding = dispatch
            .bindings
            .get(index)
            .ok_or_else(|| missing("buffer"))?;
        let wrong = |message: String| Error::Binding {
            kernel: kernel.name.clone(),
            index: *index,
            argument: argument.name.clone(),
            message,
        };
        if binding.len < size as usize {
            return Err(wrong(format!(
                "{} bytes bound, its type has {size}",
                binding.len
            )));
        }
        if binding.inline.is_some() && binding.len > 4096 {
            return Err(wrong(format!("{} inline bytes; at most 4096", binding.len)));
        }
        if binding.inline.is_none() && binding.ptr.is_null() && binding.len > 0 {
            return Err(wrong("a null pointer".into()));
        }
    }
    if let Some((&index, _)) = dispatch.bindings.iter().find(|(i, _)| **i > 30) {
        return Err(limit(kernel, format!("buffer({index}); indices end at 30")));
    }
    Ok(())
}

/// Lays out threadgroup memory; in checked runs a gap after each variable catches overruns.
pub(crate) fn arena(
    program: &Program,
    module: &Module,
    index: usize,
    dispatch: &Dispatch<'_>,
    limits: &Limits,
    checked: bool,
) -> Result<Arena> {
    const GAP: u32 = 256;
    let kernel = &program.kernels[index];
    let mut arena = Arena {
        variables: Vec::new(),
        arguments: Vec::new(),
        extents: Vec::new(),
        names: Vec::new(),
        bytes: 0,
    };
    let mut wanted = 0u64;
    let mut offset = 0u32;
    let mut place = |bytes: u64, align: u32, name: String, arena: &mut Arena| -> Result<u32> {
        wanted += bytes.next_multiple_of(u64::from(align));
        if wanted > u64::from(limits.threadgroup_bytes) {
            let message = format!(
                "{wanted} bytes of threadgroup memory up to `{name}`; the device allows {}",
                limits.threadgroup_bytes
            );
            return Err(limit(kernel, message));
        }
        let at = offset.next_multiple_of(align);
        let end = at.saturating_add(bytes as u32);
        if end.saturating_add(GAP) > ARENA {
            return Err(limit(
                kernel,
                format!("more than {ARENA} bytes of threadgroup memory, gaps included"),
            ));
        }
        offset = end + if checked { GAP } else { 0 };
        arena.extents.push(ArenaVar { lo: at, hi: end });
        arena.names.push(name);
        arena.bytes = end;
        Ok(at)
    };
    for v in module.variables(&module.kernels()[index]) {
        let name = program
            .storage
            .get(v.site as usize)
            .map_or(String::new(), |s| s.0.clone());
        let at = place(u64::from(v.bytes), v.align, name, &mut arena)?;
        arena.variables.push((v, at));
    }
    for argument in &kernel.arguments {
        let ArgumentKind::Buffer {
            index,
            space: AddressSpace::Threadgroup,
            ..
        } = argument.kind
        else {
            continue;
        };
        let Some(&bytes) = dispatch.threadgroup_memory.get(&index) else {
            continue;
        };
        let at = place(bytes as u64, 16, argument.name.clone(), &mut arena)?;
        arena.arguments.push((index as usize, at));
    }
    Ok(arena)
}
