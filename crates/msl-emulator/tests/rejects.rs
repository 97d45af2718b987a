//! Every fault is found, and its message names the kernel, the thread and the line.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod common;

use common::{bytes_mut, bytes_of, fault, library, line_of, run};
use msl_emulator::{Binding, Dispatch, DispatchOptions, Fault, FaultKind, Library};

const SOURCE: &str = include_str!("kernels/faulty.metal");
const FILE: &str = "faulty.metal";

fn open() -> Option<Library> {
    library(FILE, SOURCE)
}

/// Runs a kernel of one output, in one threadgroup of `threads`, and takes its fault.
fn one_output(kernel: &str, groups: u32, threads: u32) -> Option<Fault> {
    let lib = open()?;
    let mut out = vec![0.0f32; 256];
    let dispatch = Dispatch::new(kernel)
        .bind(0, Binding::read_write(bytes_mut(&mut out)))
        .threadgroups([groups, 1, 1])
        .threads([threads, 1, 1]);
    Some(fault(run(
        &lib,
        dispatch,
        &DispatchOptions::checked().threads(1),
    )))
}

/// Runs a kernel of one input and one output.
fn in_out(kernel: &str, inputs: usize, threads: u32) -> Option<Fault> {
    let lib = open()?;
    let input = vec![1.0f32; inputs];
    let mut out = vec![0.0f32; 256];
    let dispatch = Dispatch::new(kernel)
        .bind(0, Binding::read_only(bytes_of(&input)))
        .bind(1, Binding::read_write(bytes_mut(&mut out)))
        .threads([threads, 1, 1]);
    Some(fault(run(
        &lib,
        dispatch,
        &DispatchOptions::checked().threads(1),
    )))
}

#[track_caller]
fn says(
    fault: &Fault,
    kind: FaultKind,
    kernel: &str,
    mark: &str,
    thread: Option<u32>,
    words: &[&str],
) {
    let message = fault.to_string();
    assert_eq!(fault.kind, kind, "{message}");
    let line = line_of(SOURCE, &format!("FAULT {mark}"));
    assert!(message.contains(&format!("kernel `{kernel}`")), "{message}");
    assert!(
        message.contains(&format!("{FILE}:{line}: ")),
        "line {line}: {message}"
    );
    if let Some(t) = thread {
        assert!(
            message.contains(&format!("threadgroup (0, 0, 0), thread ({t}, 0, 0)")),
            "{message}"
        );
    }
    for word in words {
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn read_past_the_end() {
    let Some(f) = in_out("read_past_end", 64, 64) else {
        return;
    };
    let words = ["reads 4 bytes at byte 256 of buffer(0) `in`, which has 256"];
    says(
        &f,
        FaultKind::OutOfBounds,
        "read_past_end",
        "read_past_end",
        Some(63),
        &words,
    );
}

#[test]
fn write_before_the_start() {
    let Some(f) = one_output("write_before_start", 1, 8) else {
        return;
    };
    says(
        &f,
        FaultKind::OutOfBounds,
        "write_before_start",
        "write_before_start",
        Some(0),
        &["writes 4 bytes at byte -4"],
    );
}

#[test]
fn write_to_a_read_only_binding() {
    let Some(lib) = open() else { return };
    let input = vec![1.0f32; 8];
    let dispatch = Dispatch::new("write_const")
        .bind(0, Binding::read_only(bytes_of(&input)))
        .threads([8, 1, 1]);
    let f = fault(run(&lib, dispatch, &DispatchOptions::checked()));
    says(
        &f,
        FaultKind::ReadOnlyWrite,
        "write_const",
        "write_const",
        Some(0),
        &["buffer(0) `in`", "read-only"],
    );
    assert!(input.iter().all(|&v| v == 1.0));
}

#[test]
fn race_without_a_barrier() {
    let Some(f) = one_output("missing_barrier", 1, 64) else {
        return;
    };
    // The reader runs before the writer of its element, or after: both are named.
    assert!(
        matches!(f.kind, FaultKind::ThreadgroupRace | FaultKind::Unwritten),
        "{f}"
    );
    says(
        &f,
        f.kind,
        "missing_barrier",
        "missing_barrier",
        Some(0),
        &["threadgroup variable `tile`"],
    );
    let lib = open().unwrap();
    let mut out = vec![0.0f32; 64];
    let dispatch = Dispatch::new("overwrite")
        .bind(0, Binding::read_write(bytes_mut(&mut out)))
        .threads([64, 1, 1]);
    let f = fault(run(&lib, dispatch, &DispatchOptions::checked()));
    says(
        &f,
        FaultKind::ThreadgroupRace,
        "overwrite",
        "overwrite",
        None,
        &["writes 4 bytes", "no barrier between"],
    );
    assert_eq!(f.other_line, Some(line_of(SOURCE, "tile[(t + 1) % 64]")));
}

#[test]
fn race_between_simdgroups_behind_a_simdgroup_barrier() {
    let Some(lib) = open() else { return };
    // In the given order the first simdgroup reads what the second has yet to write; in another the
    // second has written it already.
    let mut kinds = Vec::new();
    for seed in 0..6 {
        let mut out = vec![0.0f32; 64];
        let dispatch = Dispatch::new("wrong_barrier")
            .bind(0, Binding::read_write(bytes_mut(&mut out)))
            .threads([64, 1, 1]);
        let f = fault(run(
            &lib,
            dispatch,
            &DispatchOptions::checked().shuffle(seed),
        ));
        says(
            &f,
            f.kind,
            "wrong_barrier",
            "wrong_barrier",
            None,
            &["threadgroup variable `tile`"],
        );
        kinds.push(f.kind);
    }
    assert!(
        kinds
            .iter()
            .all(|k| matches!(k, FaultKind::ThreadgroupRace | FaultKind::Unwritten))
    );
}

#[test]
fn race_behind_a_barrier_with_wrong_flags() {
    let Some(f) = one_output("wrong_flags", 1, 64) else {
        return;
    };
    // The last to come to the barrier is the first to go on.
    let words = [
        "reads 4 bytes of threadgroup variable `tile` at byte 0 of 256",
        "thread (0, 0, 0)",
    ];
    says(
        &f,
        FaultKind::ThreadgroupRace,
        "wrong_flags",
        "wrong_flags",
        Some(63),
        &words,
    );
    assert_eq!(f.other_line, Some(line_of(SOURCE, "FAULT wrong_flags") - 2));
}

#[test]
fn race_of_a_matrix_load() {
    let Some(f) = one_output("matrix_race", 1, 32) else {
        return;
    };
    // The load happens with the first lane to reach it.
    assert!(
        matches!(f.kind, FaultKind::ThreadgroupRace | FaultKind::Unwritten),
        "{f}"
    );
    assert_eq!(f.kernel, "matrix_race");
    let lines = [
        line_of(SOURCE, "FAULT early_writes"),
        line_of(SOURCE, "simdgroup_load(m, tile)"),
    ];
    assert!(f.line.is_some_and(|l| lines.contains(&l)), "{f}");
}

#[test]
fn race_on_device_memory() {
    let Some(f) = one_output("device_race", 1, 64) else {
        return;
    };
    let words = [
        "race: writes 4 bytes at byte 0 of buffer(0) `out`",
        "thread (0, 0, 0)",
    ];
    says(
        &f,
        FaultKind::DeviceRace,
        "device_race",
        "device_race",
        Some(1),
        &words,
    );
    let Some(f) = one_output("grid_race", 2, 64) else {
        return;
    };
    says(
        &f,
        FaultKind::DeviceRace,
        "grid_race",
        "grid_race",
        None,
        &["threadgroup (0, 0, 0)"],
    );
    assert_eq!(f.threadgroup, [1, 0, 0]);
}

#[test]
fn barrier_reached_by_some() {
    let Some(f) = one_output("divergent_barrier", 1, 64) else {
        return;
    };
    let words = ["a threadgroup_barrier", "does not", "has finished"];
    says(
        &f,
        FaultKind::Divergence,
        "divergent_barrier",
        "divergent_barrier",
        None,
        &words,
    );
    assert!(
        f.thread[0] < 40 && f.other_thread.is_some_and(|t| t[0] >= 40),
        "{f}"
    );
    let Some(f) = one_output("early_return", 1, 64) else {
        return;
    };
    says(
        &f,
        FaultKind::Divergence,
        "early_return",
        "early_return",
        None,
        &["thread (3, 0, 0)", "has finished"],
    );
}

#[test]
fn different_barriers() {
    let Some(f) = one_output("two_barriers", 1, 64) else {
        return;
    };
    let first = line_of(SOURCE, "two_barriers first");
    says(
        &f,
        FaultKind::Divergence,
        "two_barriers",
        "two_barriers second",
        Some(32),
        &[&format!("line {first}")],
    );
}

#[test]
fn simd_function_reached_by_some() {
    let Some(f) = one_output("divergent_sum", 1, 64) else {
        return;
    };
    says(
        &f,
        FaultKind::Divergence,
        "divergent_sum",
        "divergent_sum",
        None,
        &["a simd function", "has finished"],
    );
    assert!(f.thread[0] % 32 < 16);
}

#[test]
fn matrix_load_skipped_by_one() {
    for threads in [32, 64] {
        let Some(f) = in_out("divergent_load", 64, threads) else {
            return;
        };
        says(
            &f,
            FaultKind::Divergence,
            "divergent_load",
            "divergent_load",
            None,
            &["a simdgroup_load", "thread (9, 0, 0)"],
        );
    }
}

#[test]
fn lanes_disagree() {
    let Some(f) = in_out("lanes_disagree", 128, 32) else {
        return;
    };
    says(
        &f,
        FaultKind::LanesDisagree,
        "lanes_disagree",
        "lanes_disagree",
        Some(1),
        &["a simdgroup_load"],
    );
}

#[test]
fn elements_changed_through_an_old_reference() {
    let Some(f) = in_out("old_reference", 64, 32) else {
        return;
    };
    says(
        &f,
        FaultKind::StaleElements,
        "old_reference",
        "old_reference",
        Some(5),
        &["a simdgroup_store"],
    );
}

#[test]
fn unwritten_threadgroup_memory() {
    let Some(f) = one_output("unwritten", 1, 64) else {
        return;
    };
    let words = [
        "reads 4 bytes of threadgroup variable `tile` at byte 252 of 256, which no thread has written",
    ];
    says(
        &f,
        FaultKind::Unwritten,
        "unwritten",
        "unwritten",
        Some(63),
        &words,
    );
}

#[test]
fn threadgroup_overrun() {
    let Some(f) = one_output("tile_overrun", 1, 64) else {
        return;
    };
    let words = ["threadgroup variable `first` at byte 252 of 252"];
    says(
        &f,
        FaultKind::ThreadgroupOutOfBounds,
        "tile_overrun",
        "tile_overrun",
        Some(63),
        &words,
    );
}

#[test]
fn matrix_overrun() {
    let Some(lib) = open() else { return };
    let input = vec![0u16; 8 * 16];
    let mut out = vec![0u16; 64];
    let dispatch = Dispatch::new("matrix_overrun")
        .bind(0, Binding::read_only(bytes_of(&input)))
        .bind(1, Binding::read_write(bytes_mut(&mut out)))
        .threads([32, 1, 1]);
    let f = fault(run(&lib, dispatch, &DispatchOptions::checked()));
    says(
        &f,
        FaultKind::OutOfBounds,
        "matrix_overrun",
        "matrix_overrun",
        None,
        &["buffer(0) `in`", "which has 256"],
    );
}

#[test]
fn misaligned() {
    let Some(f) = in_out("misaligned", 64, 1) else {
        return;
    };
    says(
        &f,
        FaultKind::Misaligned,
        "misaligned",
        "misaligned",
        Some(0),
        &["reads 4 bytes"],
    );
}

#[test]
fn fault_in_a_helper() {
    let Some(f) = in_out("in_helper_float", 16, 16) else {
        return;
    };
    says(
        &f,
        FaultKind::OutOfBounds,
        "in_helper_float",
        "in_helper",
        Some(9),
        &["at byte 64 of buffer(0)"],
    );
}

#[test]
fn divergence_is_found_unchecked() {
    let Some(lib) = open() else { return };
    for kernel in [
        "divergent_barrier",
        "two_barriers",
        "divergent_sum",
        "early_return",
    ] {
        let mut out = vec![0.0f32; 256];
        let dispatch = Dispatch::new(kernel)
            .bind(0, Binding::read_write(bytes_mut(&mut out)))
            .threads([64, 1, 1]);
        assert_eq!(
            fault(run(&lib, dispatch, &DispatchOptions::default())).kind,
            FaultKind::Divergence,
            "{kernel}"
        );
    }
}
