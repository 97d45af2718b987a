//! From what a worker left to a message with names and lines.

use addr2line::Loader;

use super::abi::{RawFault, fault};
use super::module::Module;
use super::validate::Arena;
use crate::dispatch::Dispatch;
use crate::error::{Fault, FaultKind};
use crate::reflect::{AddressSpace, ArgumentKind, KernelInfo};
use crate::translate::Program;

/// Everything that a message draws on.
struct Scene<'a> {
    kernel: &'a KernelInfo,
    dispatch: &'a Dispatch<'a>,
    arena: &'a Arena,
    raw: &'a RawFault,
    other_line: Option<u32>,
}

/// Describes a fault.
pub(crate) fn describe(
    program: &Program,
    module: &Module,
    kernel: &KernelInfo,
    dispatch: &Dispatch<'_>,
    arena: &Arena,
    raw: &RawFault,
) -> Fault {
    let place = |line: u32, pc: u64| match (line, pc) {
        (0, 0) => (None, None),
        (0, pc) => locate(program, module, pc),
        (line, _) => (Some(line), None),
    };
    let (line, symbol) = place(raw.line, raw.pc);
    // A small "address" is a line: see cell_pc in the shim.
    let (other_line, _) = if raw.other_pc > 0 && raw.other_pc < 1 << 20 {
        (Some(raw.other_pc as u32), None)
    } else {
        place(raw.other_line, raw.other_pc)
    };
    let scene = Scene {
        kernel,
        dispatch,
        arena,
        raw,
        other_line,
    };
    let kind = match raw.kind {
        fault::OUT_OF_BOUNDS => FaultKind::OutOfBounds,
        fault::READ_ONLY => FaultKind::ReadOnlyWrite,
        fault::ARENA_BOUNDS => FaultKind::ThreadgroupOutOfBounds,
        fault::RACE => FaultKind::ThreadgroupRace,
        fault::DEVICE_RACE => FaultKind::DeviceRace,
        fault::UNWRITTEN => FaultKind::Unwritten,
        fault::MISALIGNED => FaultKind::Misaligned,
        fault::OTHER_STACK => FaultKind::OtherThread,
        fault::DIVERGENCE => FaultKind::Divergence,
        fault::STALE => FaultKind::StaleElements,
        _ => FaultKind::LanesDisagree,
    };
    Fault {
        kind,
        kernel: kernel.name.clone(),
        threadgroup: raw.group,
        thread: scene.thread(raw.thread),
        other_thread: (raw.other_thread != u32::MAX).then(|| scene.thread(raw.other_thread)),
        file: program.file.clone(),
        line,
        symbol,
        other_line,
        message: scene.message(kind),
    }
}

impl Scene<'_> {
    fn thread(&self, t: u32) -> [u32; 3] {
        let [x, y, _] = self.dispatch.threads;
        [t % x, t / x % y, t / x / y]
    }

    fn show(&self, t: u32) -> String {
        if t == u32::MAX {
            return "another thread".into();
        }
        let [x, y, z] = self.thread(t);
        format!("thread ({x}, {y}, {z})")
    }

    fn buffer(&self, index: u32) -> String {
        let named = self.kernel.arguments.iter().find(|a| {
            matches!(a.kind, ArgumentKind::Buffer { index: i, space, .. }
                if i == index && space != AddressSpace::Threadgroup)
        });
        named.map_or(format!("buffer({index})"), |a| {
            format!("buffer({index}) `{}`", a.name)
        })
    }

    /// The threadgroup variable at or before an offset of the arena, and the offset in it.
    fn variable(&self, offset: u32) -> String {
        let found = self
            .arena
            .extents
            .iter()
            .zip(&self.arena.names)
            .filter(|(v, _)| v.lo <= offset)
            .max_by_key(|(v, _)| v.lo);
        found.map_or("threadgroup memory".into(), |(v, name)| {
            format!(
                "threadgroup variable `{name}` at byte {} of {}",
                offset - v.lo,
                v.hi - v.lo
            )
        })
    }

    fn message(&self, kind: FaultKind) -> String {
        let raw = self.raw;
        let does = if raw.write != 0 { "writes" } else { "reads" };
        let what = format!("{does} {} bytes", raw.size);
        let at_line = self
            .other_line
            .map_or(String::new(), |l| format!(" at line {l}"));
        match kind {
            FaultKind::OutOfBounds => {
                let len = self.dispatch.bindings.get(&raw.index).map(|b| b.len as i64);
                match len {
                    Some(len)
                        if raw.offset > -(1 << 20) - len && raw.offset < (1 << 20) + 2 * len =>
                    {
                        format!(
                            "{what} at byte {} of {}, which has {len}: out of bounds",
                            raw.offset,
                            self.buffer(raw.index)
                        )
                    }
                    _ => format!(
                        "{what} where nothing is bound: out of bounds, or through a null pointer"
                    ),
                }
            }
            FaultKind::ReadOnlyWrite => {
                format!(
                    "{what} at byte {} of {}, which is bound read-only",
                    raw.offset,
                    self.buffer(raw.index)
                )
            }
            FaultKind::ThreadgroupOutOfBounds => {
                format!(
                    "{what} outside of {}: out of bounds",
                    self.variable(raw.offset as u32)
                )
            }
            FaultKind::ThreadgroupRace => format!(
                "race: {what} of {}, which {} accessed{at_line} with no barrier between",
                self.variable(raw.offset as u32),
                self.show(raw.other_thread)
            ),
            FaultKind::DeviceRace => {
                let [gx, gy, _] = self.dispatch.threadgroups;
                let mine = raw.group[0] + gx * (raw.group[1] + gy * raw.group[2]);
                let who = match raw.other_group {
                    u32::MAX => "another threadgroup".to_owned(),
                    g if g == mine => self.show(raw.other_thread),
                    g => format!(
                        "threadgroup ({}, {}, {}) {}",
                        g % gx,
                        g / gx % gy,
                        g / gx / gy,
                        self.show(raw.other_thread)
                    ),
                };
                format!(
                    "race: {what} at byte {} of {}, which {who} accessed in the same dispatch with no barrier between",
                    raw.offset,
                    self.buffer(raw.index)
                )
            }
            FaultKind::Unwritten => {
                format!(
                    "{what} of {}, which no thread has written",
                    self.variable(raw.offset as u32)
                )
            }
            FaultKind::Misaligned => {
                format!("{what} at an address that is not a multiple of their type's size")
            }
            FaultKind::OtherThread => format!("{what} of another thread's memory"),
            FaultKind::Divergence => format!(
                "divergence: reaches {}, which {} does not: it {}",
                op_name(raw.op),
                self.show(raw.other_thread),
                match raw.other_op {
                    0 => "runs elsewhere".to_owned(),
                    1 => "has finished".to_owned(),
                    op => format!("is at {} of line {}", op_name(op), raw.other_line),
                }
            ),
            FaultKind::StaleElements => format!(
                "an operand of {} was changed through a reference that thread_elements() gave before the \
                 matrix was computed: call it again",
                op_name(raw.op)
            ),
            FaultKind::LanesDisagree => {
                format!(
                    "lanes of the simdgroup pass different pointers or values to {}",
                    op_name(raw.op)
                )
            }
        }
    }
}

fn op_name(op: u32) -> &'static str {
    match op {
        2 => "a threadgroup_barrier",
        3 => "a simdgroup_barrier",
        4 => "a simd function",
        5 => "a simdgroup_load",
        6 => "a simdgroup_store",
        7 => "a simdgroup_multiply",
        8 => "a simdgroup_matrix fill",
        _ => "an operation",
    }
}

/// Line and function of a return address.
fn locate(program: &Program, module: &Module, pc: u64) -> (Option<u32>, Option<String>) {
    let Ok(loader) = Loader::new(&module.path) else {
        return (None, None);
    };
    // The call, not what follows it.
    let at = pc.wrapping_sub(module.lo).wrapping_sub(1);
    let mut line = None;
    if let Ok(mut frames) = loader.find_frames(at) {
        while let Ok(Some(frame)) = frames.next() {
            let Some(location) = frame.location else {
                continue;
            };
            // The innermost frame in the program, past what the shim inlined into it.
            if line.is_none() && location.file.is_some_and(|f| f.ends_with(&program.file)) {
                line = location.line;
            }
        }
    }
    (line, loader.find_symbol(at).map(str::to_owned))
}
