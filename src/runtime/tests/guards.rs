//! What the host may do with a buffer while commands are about, and what a commit may do while the
//! host has a guard.

use std::thread;

use half::bf16;

use super::{classify, device, fill, mask, u8s};
use crate::{DType, MlxBuffer, MlxError};

const SHUT: u16 = 0xff80;

#[track_caller]
pub(super) fn refused<T>(result: Result<T, MlxError>, words: &[&str]) {
    let message = match result {
        Err(MlxError::InvalidArgument(message)) => message,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("accepted, where {words:?} were expected"),
    };
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[test]
fn a_slice_does_not_change_under_its_borrower() {
    let device = device();
    let mut out = mask(&device, 6);
    let mut encoder = device.command_encoder().unwrap();
    let before = out.as_slice::<u16>().unwrap();
    fill(&mut encoder, &device, &out, 2, 3);
    encoder.commit_and_wait().unwrap();
    assert_eq!(
        before, [0; 6],
        "lent before the command, and still as it was"
    );
    let after = out.as_slice::<u16>().unwrap();
    assert_eq!(after, [0, SHUT, SHUT, 0, 0, SHUT]);
    fill(&mut encoder, &device, &out, 3, 2);
    encoder.commit_and_wait().unwrap();
    assert_eq!(before, [0; 6]);
    assert_eq!(after, [0, SHUT, SHUT, 0, 0, SHUT]);
    assert_eq!(out.as_slice::<u16>().unwrap(), [0, SHUT, 0, 0, 0, 0]);
    assert_eq!(out.copies(), 3);
    // Borrowed mutably, the handle lets go of its copies.
    out.as_mut_slice::<u16>().unwrap()[0] = 7;
    assert_eq!(out.copies(), 0);
    assert_eq!(out.as_slice::<u16>().unwrap()[0], 7);
}

#[test]
fn a_copy_is_used_again_while_the_bytes_are_the_same() {
    let device = device();
    let out = mask(&device, 6);
    let first = out.as_slice::<u16>().unwrap().as_ptr();
    for _ in 0..3 {
        assert_eq!(out.as_slice::<u16>().unwrap().as_ptr(), first);
        // Written, with what was there before.
        out.write::<u16>().unwrap().fill(0);
    }
    // Whoever has the address may write at any time.
    let raw = out.contents_ptr().cast::<u16>();
    // SAFETY: the buffer has 6 such elements, and nothing else uses them now.
    unsafe { raw.write(5) };
    assert_eq!(out.as_slice::<u16>().unwrap()[0], 5);
    // SAFETY: as above.
    unsafe { raw.write(6) };
    assert_eq!(out.as_slice::<u16>().unwrap()[0], 6);
    assert_eq!(out.copies(), 3);
    assert_eq!(out.clone().copies(), 0);
}

#[test]
fn a_commit_that_writes_what_a_guard_lends_is_refused() {
    let device = device();
    let out = mask(&device, 6);
    let mut encoder = device.command_encoder().unwrap();
    let guard = out.read::<bf16>().unwrap();
    fill(&mut encoder, &device, &out, 2, 3);
    refused(encoder.commit_and_wait(), &["mask", "[6]", "read guard"]);
    assert_eq!(*guard, [bf16::ZERO; 6]);
    drop(guard);
    // Nothing is left of the refused command.
    drop(out.write::<u8>().unwrap());
    fill(&mut encoder, &device, &out, 2, 3);
    encoder.commit_and_wait().unwrap();

    let guard = out.write::<u16>().unwrap();
    fill(&mut encoder, &device, &out.slice_view(0, 1), 1, 1);
    refused(encoder.commit_and_wait(), &["mask", "write guard"]);
    drop(guard);
}

#[test]
fn a_commit_that_reads_is_refused_by_a_write_guard_alone() {
    let device = device();
    let (cells, classes) = (mask(&device, 6), u8s(&device, 6));
    let mut encoder = device.command_encoder().unwrap();
    let reads = cells.read::<u16>().unwrap();
    classify(&mut encoder, &device, &cells, &classes, 2, 3);
    encoder.commit_and_wait().unwrap();
    assert_eq!(*classes.read::<u8>().unwrap(), [2; 6]);
    drop(reads);
    let writes = cells.write::<u16>().unwrap();
    classify(&mut encoder, &device, &cells, &classes, 2, 3);
    refused(encoder.commit_and_wait(), &["bf16 [6]", "write guard"]);
    drop(writes);
}

#[test]
fn guards_exclude_each_other_as_references_do() {
    let whole = u8s(&device(), 20);
    let (left, right) = (whole.slice_view(0, 10), whole.slice_view(10, 10));
    let a = left.read::<u8>().unwrap();
    let b = whole.read::<u8>().unwrap();
    refused(left.write::<u8>(), &["read guard"]);
    drop(b);
    // Other bytes of the same memory.
    let mut c = right.write::<u8>().unwrap();
    c[0] = 99;
    assert_eq!((a[9], c[0]), (9, 99));
    refused(whole.read::<u8>(), &["write guard"]);
    refused(whole.as_slice::<u8>(), &["write guard"]);
    refused(right.write::<u8>(), &["write guard"]);
    assert_eq!(left.as_slice::<u8>().unwrap()[9], 9);
    drop(c);
    assert_eq!(whole.read::<u8>().unwrap()[10], 99);
    // An empty view shares no byte with anything.
    assert!(whole.slice_view(5, 0).write::<u8>().unwrap().is_empty());
}

#[test]
fn guards_and_copies_wait_for_encoded_writes_and_running_reads() {
    let device = device();
    let (cells, classes) = (mask(&device, 6), u8s(&device, 6));
    let mut encoder = device.command_encoder().unwrap();
    classify(&mut encoder, &device, &cells, &classes, 2, 3);
    // Encoded: what is read may still be filled.
    cells.write::<u16>().unwrap().fill(SHUT);
    refused(classes.read::<u8>(), &["encoded", "commit it and wait"]);
    refused(classes.write::<u8>(), &["encoded"]);
    encoder.commit();
    // Committed, and nobody has waited: what is read may be read only.
    refused(cells.write::<u16>(), &["reads it", "wait"]);
    assert_eq!(*cells.read::<u16>().unwrap(), [SHUT; 6]);
    refused(classes.as_slice::<u8>(), &["encoded"]);
    encoder.wait_until_completed().unwrap();
    drop(cells.write::<u16>().unwrap());
    assert_eq!(*classes.read::<u8>().unwrap(), [0; 6]);
}

#[test]
fn captured_operands_are_refilled_between_replays() {
    let device = device();
    let (mut cells, classes) = (mask(&device, 6), u8s(&device, 6));
    let mut encoder = device.command_encoder().unwrap();
    encoder.start_capture();
    classify(&mut encoder, &device, &cells, &classes, 2, 3);
    let nodes = encoder.take_capture().unwrap();
    // The capture is another handle.
    refused(cells.as_mut_slice::<u16>(), &["only handle", "`write`"]);
    for (bits, class) in [(SHUT, 0), (0, 2), (0x3f80, 1), (0, 2)] {
        cells.write::<u16>().unwrap().fill(bits);
        encoder.replay(&nodes).unwrap();
        encoder.commit_and_wait().unwrap();
        assert_eq!(*classes.read::<u8>().unwrap(), [class; 6]);
    }
    drop(nodes);
    cells.as_mut_slice::<u16>().unwrap()[0] = 1;
}

#[test]
fn guards_refuse_what_slices_refuse() {
    let whole = u8s(&device(), 20);
    let past = whole.slice_view(13, 8);
    refused(past.read::<u8>(), &["slice_view"]);
    refused(past.write::<u8>(), &["slice_view"]);
    refused(whole.slice_view(1, 4).read::<u32>(), &["aligned to 4"]);
    refused(whole.slice_view(1, 4).write::<u32>(), &["aligned to 4"]);
    refused(whole.slice_view(0, 6).read::<u32>(), &["whole number"]);
    refused(whole.read::<()>(), &["whole number"]);
    // Nothing is held by what was refused.
    assert_eq!(whole.write::<u32>().unwrap().len(), 5);
}

#[test]
fn a_forgotten_guard_refuses_for_good_and_does_no_more() {
    let device = device();
    let mut out = mask(&device, 6);
    std::mem::forget(out.read::<u16>().unwrap());
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &out, 2, 3);
    refused(encoder.commit_and_wait(), &["read guard"]);
    refused(out.as_mut_slice::<u8>(), &["only handle"]);
    assert_eq!(*out.read::<u16>().unwrap(), [0; 6]);
}

#[test]
fn guards_outlive_their_handles_and_cross_threads() {
    let device = device();
    let guard = device
        .buffer_from_slice(&[1u32, 2, 3], DType::U32, vec![3])
        .unwrap()
        .slice_view(4, 2)
        .read::<u32>()
        .unwrap();
    let sum = thread::spawn(move || guard.iter().sum::<u32>());
    assert_eq!(sum.join().unwrap(), 5);
    let whole = u8s(&device, 8);
    thread::scope(|scope| {
        for i in 0..4 {
            let part: MlxBuffer = whole.slice_view(2 * i, 2);
            scope.spawn(move || part.write::<u8>().unwrap().fill(i as u8));
        }
    });
    assert_eq!(*whole.read::<u8>().unwrap(), [0, 0, 1, 1, 2, 2, 3, 3]);
}
