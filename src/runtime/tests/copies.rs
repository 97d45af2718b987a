//! Copies of some of a buffer's elements, beside guards and commands.

use super::guards::refused;
use super::{classify, device, fill, mask, u8s};
use crate::{DType, MlxBuffer};

const SHUT: u16 = 0xff80;

fn bytes(buffer: &MlxBuffer) -> Vec<u8> {
    buffer.read::<u8>().unwrap().to_vec()
}

#[test]
fn copies_are_exact_to_the_element_of_the_view() {
    let device = device();
    let whole = device
        .buffer_from_slice(&[0_u16, 1, 2, 3, 4, 5, 6, 7], DType::U16, vec![8])
        .unwrap();
    // Off its elements' alignment: byte 3 is the high half of element 1.
    let odd = u8s(&device, 20).subview(3, 9);
    let view = whole.slice_view(4, 5);
    view.upload(1, &[30_u16, 40]).unwrap();
    assert_eq!(*whole.read::<u16>().unwrap(), [0, 1, 2, 30, 40, 5, 6, 7]);
    let mut two = [0_u16; 2];
    view.download(3, &mut two).unwrap();
    assert_eq!(two, [5, 6]);
    odd.upload(7, &[99_u8, 98]).unwrap();
    let mut all = [0_u8; 9];
    odd.download(0, &mut all).unwrap();
    assert_eq!(all, [3, 4, 5, 6, 7, 8, 9, 99, 98]);

    let other = mask(&device, 4);
    let source = device
        .buffer_from_slice(&[7_u16, 8, 9], DType::BF16, vec![3])
        .unwrap();
    other.copy_from(2, &source, 1..3).unwrap();
    assert_eq!(*other.read::<u16>().unwrap(), [0, 0, 8, 9]);
    // Within one allocation, either way, up to the very next byte.
    whole.copy_from(0, &view, 3..5).unwrap();
    whole.slice_view(12, 2).copy_from(0, &whole, 4..6).unwrap();
    assert_eq!(*whole.read::<u16>().unwrap(), [5, 6, 2, 30, 40, 5, 40, 5]);
}

#[test]
fn copies_of_nothing_are_fine_inside_the_bounds_alone() {
    let device = device();
    let whole = u8s(&device, 6);
    let guard = whole.write::<u8>().unwrap();
    whole.upload::<u8>(6, &[]).unwrap();
    whole.download::<u8>(0, &mut []).unwrap();
    whole.copy_from(6, &whole, 3..3).unwrap();
    drop(guard);
    refused(whole.upload::<u8>(7, &[]), &["upload", "0..6"]);
    refused(whole.download::<u8>(7, &mut []), &["download", "0..6"]);
}

#[test]
fn copies_out_of_bounds_or_of_other_sizes_write_nothing() {
    let device = device();
    let whole = device
        .buffer_from_slice(&[1_u16, 2, 3, 4], DType::BF16, vec![4])
        .unwrap();
    let before = bytes(&whole);
    let view = whole.slice_view(2, 2);
    let bounds = ["upload", "inside 0..2", "2 from 1 on"];
    refused(view.upload(1, &[5_u16; 2]), &bounds);
    refused(view.upload(usize::MAX, &[5_u16; 2]), &["inside 0..2"]);
    let mut into = [9_u16; 3];
    refused(view.download(0, &mut into), &["download", "3 from 0 on"]);
    assert_eq!(into, [9; 3]);
    refused(
        view.upload(0, &[5_u8]),
        &["2-byte elements of bf16", "1-byte"],
    );
    refused(view.upload(0, &[()]), &["0-byte elements"]);
    refused(view.download(0, &mut [5_u32]), &["4-byte elements"]);
    refused(whole.slice_view(6, 2).upload(0, &[5_u16]), &["slice_view"]);

    let longer = mask(&device, 9);
    refused(
        whole.copy_from(2, &longer, 0..3),
        &["inside 0..4", "3 from 2"],
    );
    refused(whole.copy_from(0, &longer, 8..10), &["the source", "0..9"]);
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = 3..2;
    refused(whole.copy_from(0, &longer, backwards), &["end", "3..2"]);
    let halves = device.alloc_buffer(8, DType::F16, vec![4]).unwrap();
    refused(
        whole.copy_from(0, &halves, 0..1),
        &["expected bf16, got f16"],
    );
    refused(whole.copy_from(1, &view, 0..2), &["share no byte"]);
    refused(whole.copy_from(2, &whole, 1..3), &["2..6", "4..8"]);
    assert_eq!(bytes(&whole), before);
}

#[test]
fn guards_refuse_copies_of_the_bytes_that_they_lend() {
    let whole = u8s(&device(), 20);
    let (left, right) = (whole.slice_view(0, 10), whole.slice_view(10, 10));
    let mut one = [0_u8];
    let reads = left.read::<u8>().unwrap();
    refused(whole.upload(9, &[1_u8]), &["read guard"]);
    whole.upload(10, &[1_u8]).unwrap();
    whole.download(9, &mut one).unwrap();
    whole.copy_from(11, &left, 0..2).unwrap();
    refused(left.copy_from(0, &right, 0..2), &["read guard"]);
    assert_eq!((one[0], reads[9]), (9, 9));
    drop(reads);
    let writes = right.write::<u8>().unwrap();
    refused(whole.upload(19, &[1_u8]), &["write guard"]);
    refused(whole.download(10, &mut one), &["write guard"]);
    refused(left.copy_from(0, &right, 0..1), &["write guard"]);
    left.upload(0, &[7_u8]).unwrap();
    assert_eq!(writes[..3], [1, 0, 1]);
    drop(writes);
    assert_eq!(bytes(&whole)[..2], [7, 1]);
}

#[test]
fn copies_wait_for_commands_as_guards_do() {
    let device = device();
    let (cells, classes) = (mask(&device, 8), u8s(&device, 7));
    let mut encoder = device.command_encoder().unwrap();
    let (used, beside) = (cells.slice_view(0, 6), cells.slice_view(12, 2));
    classify(
        &mut encoder,
        &device,
        &used,
        &classes.slice_view(0, 6),
        2,
        3,
    );
    // Encoded: what is read may still be filled, what is written may not be looked at.
    cells.upload(0, &[SHUT; 6]).unwrap();
    let mut one = [0_u8];
    refused(classes.download(5, &mut one), &["encoded"]);
    refused(classes.upload(0, &one), &["encoded"]);
    classes.download(6, &mut one).unwrap();
    let command = encoder.commit();
    refused(cells.upload(5, &[0_u16]), &["reads it", "wait"]);
    refused(used.copy_from(0, &beside, 0..1), &["reads it"]);
    cells.upload(6, &[5_u16]).unwrap();
    beside.copy_from(1, &used, 0..1).unwrap();
    let mut cell = [0_u16];
    cells.download(5, &mut cell).unwrap();
    refused(classes.download(0, &mut one), &["encoded"]);
    assert!(command.is_done());
    // Known to have run: as after a wait.
    cells.upload(5, &[0_u16]).unwrap();
    classes.download(0, &mut one).unwrap();
    assert_eq!((one, cell), ([0], [SHUT]));
    assert_eq!(cells.read::<u16>().unwrap()[5..], [0, 5, SHUT]);
}

#[test]
fn slices_show_what_was_uploaded_after_them_to_the_next_slice_alone() {
    let whole = u8s(&device(), 3);
    let before = whole.as_slice::<u8>().unwrap();
    whole.upload(1, &[9_u8]).unwrap();
    assert_eq!(before, [0, 1, 2]);
    assert_eq!(whole.as_slice::<u8>().unwrap(), [0, 9, 2]);
    whole.copy_from(0, &whole, 1..2).unwrap();
    assert_eq!(whole.as_slice::<u8>().unwrap(), [9, 9, 2]);
}

#[test]
fn threads_that_copy_between_two_buffers_both_ways_do_not_wait_for_each_other() {
    let device = device();
    // Copies that take a while, under both locks, so that the other way is met half way.
    let (half, rounds) = if cfg!(miri) { (4, 5) } else { (1 << 16, 3000) };
    let buffer = || {
        device
            .alloc_buffer(2 * half, DType::U8, vec![2 * half])
            .unwrap()
    };
    let (a, b) = (buffer(), buffer());
    std::thread::scope(|scope| {
        for (to, from) in [(&a, &b), (&b, &a), (&a, &b), (&b, &a)] {
            scope.spawn(move || {
                for _ in 0..rounds {
                    to.copy_from(0, from, half..2 * half).unwrap();
                    to.upload(half, &[1_u8, 2]).unwrap();
                }
            });
        }
    });
    for buffer in [&a, &b] {
        assert_eq!(bytes(buffer)[half..half + 3], [1, 2, 0]);
    }
}

#[test]
fn an_upload_between_two_replays_is_what_the_second_reads() {
    let device = device();
    let (cells, classes) = (mask(&device, 6), u8s(&device, 6));
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &cells, 2, 3);
    encoder.commit_and_wait().unwrap();
    for (at, class) in [(0, [0, 0, 0, 2, 2, 0]), (4, [0, 0, 0, 2, 0, 0])] {
        cells.upload(at, &[SHUT]).unwrap();
        classify(&mut encoder, &device, &cells, &classes, 2, 3);
        encoder.commit_and_wait().unwrap();
        assert_eq!(*classes.read::<u8>().unwrap(), class);
    }
}
