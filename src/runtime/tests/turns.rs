//! Commands of several threads that touch the same memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::{classify, device, fill, mask, u8s};
use crate::runtime::hazards::Use;
use crate::runtime::turns::{Touches, Turn};
use crate::{MlxBuffer, MlxError};

/// Commands that each thread commits.
const COMMANDS: usize = if cfg!(miri) { 2 } else { 200 };

fn touches(memory: usize, range: std::ops::Range<usize>, writes: bool) -> Touches {
    Touches::new(&[Use {
        memory,
        range,
        writes,
    }])
}

/// What a command that writes `buffer` touches.
fn of(buffer: &MlxBuffer) -> Touches {
    let memory = std::sync::Arc::as_ptr(buffer.storage()).addr();
    touches(memory, buffer.range(), true)
}

#[test]
fn threads_that_write_one_buffer_run_whole_commands_in_turn() {
    let device = device();
    let cells = mask(&device, 4);
    thread::scope(|scope| {
        // A causal square, and rows that see all keys.
        for (rows, keys, classes) in [(2, 2, [2, 0, 2, 2]), (4, 1, [2, 2, 2, 2])] {
            let (device, cells) = (&device, &cells);
            scope.spawn(move || {
                let mine = u8s(device, 4);
                let mut encoder = device.command_encoder().unwrap();
                for _ in 0..COMMANDS {
                    fill(&mut encoder, device, cells, rows, keys);
                    classify(&mut encoder, device, cells, &mine, rows, keys);
                    encoder.commit_and_wait().unwrap();
                    assert_eq!(*mine.read::<u8>().unwrap(), classes);
                }
            });
        }
    });
}

#[test]
fn views_of_one_buffer_that_share_no_byte_do_not_wait() {
    let device = device();
    let whole = mask(&device, 8);
    let (left, right) = (whole.slice_view(0, 4), whole.slice_view(8, 4));
    let _running = Turn::take(of(&left), true).unwrap();
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &right, 2, 2);
    encoder.commit_and_wait().unwrap();
    assert_eq!(right.read::<u16>().unwrap()[1], 0xff80);
}

#[test]
fn a_command_starts_after_those_it_conflicts_with_in_their_order() {
    let order = AtomicUsize::new(0);
    let first = Turn::take(touches(1, 0..8, false), true).unwrap();
    // Readers run side by side.
    let second = Turn::take(touches(1, 4..8, false), true).unwrap();
    thread::scope(|scope| {
        let waiting = |writes| {
            let (order, started) = (&order, AtomicBool::new(false));
            let started: &AtomicBool = Box::leak(Box::new(started));
            let handle = scope.spawn(move || {
                started.store(true, Ordering::Release);
                let _turn = Turn::take(touches(1, 6..9, writes), true).unwrap();
                order.fetch_add(1, Ordering::AcqRel)
            });
            while !started.load(Ordering::Acquire) {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(20));
            handle
        };
        let writer = waiting(true);
        // A reader comes after the writer that waits, so that the writer is not starved.
        let reader = waiting(false);
        assert_eq!(order.load(Ordering::Acquire), 0);
        // Other memory, and other bytes.
        drop(Turn::take(touches(2, 0..9, true), true).unwrap());
        drop(Turn::take(touches(1, 9..10, true), true).unwrap());
        drop(first);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(order.load(Ordering::Acquire), 0);
        drop(second);
        assert_eq!(writer.join().unwrap(), 0);
        assert_eq!(reader.join().unwrap(), 1);
    });
}

#[test]
fn a_thread_of_rayons_is_refused_where_it_would_wait() {
    let device = device();
    let cells = mask(&device, 4);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let commit = || {
        let mut encoder = device.command_encoder().unwrap();
        fill(&mut encoder, &device, &cells, 2, 2);
        encoder.commit_and_wait()
    };
    let pool = pool.unwrap();
    let running = Turn::take(of(&cells), true).unwrap();
    let refused = pool.install(commit);
    assert!(
        matches!(&refused, Err(MlxError::CommandBufferError(why)) if why.contains("rayon")),
        "{refused:?}"
    );
    // Nothing is held by what was refused.
    drop(running);
    drop(cells.write::<u16>().unwrap());
    pool.install(commit).unwrap();
}
