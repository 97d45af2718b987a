//! Copies of parts of the GPU's memory: what travels, in which order, and commands that are asked whether
//! they have run.

use cudarc::driver::result;
use half::bf16;
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{DType, MlxBuffer};

use crate::common::{Qkv, attend, bytes, download, output, shape, to_bytes};
use crate::{BF16, cuda, record};

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.unwrap().trim().trim_end_matches(" kB");
    kilobytes.parse::<usize>().unwrap() * 1024
}

#[test]
fn a_row_of_a_large_buffer_travels_alone() {
    let Some(device) = cuda() else { return };
    let (len, row) = (4usize << 30, 1024usize);
    let alloc = || device.alloc_buffer(len, DType::U8, vec![len]).unwrap();
    let (large, other) = (alloc(), alloc());
    let before = resident();
    for i in 0..100 {
        let at = i * (len / 100);
        large.upload(at, &vec![i as u8 + 1; row]).unwrap();
        other.copy_from(at + 7, &large, at..at + row).unwrap();
        let mut got = vec![0u8; row + 2];
        other.download(at + 6, &mut got).unwrap();
        assert_eq!((got[0], got[row + 1]), (0, 0));
        assert!(got[1..=row].iter().all(|x| *x == i as u8 + 1));
    }
    let grown = resident().saturating_sub(before);
    assert!(
        grown < 1 << 30,
        "{grown} bytes of the host's for rows of {row}"
    );
}

/// Which side is newer, in every state in which a copy can meet a buffer.
#[test]
fn a_copy_meets_either_side_newer() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(31, BF16, shape([1, 1, 1], (1, 1), 64));
    let problem = data.builder().build().unwrap();
    let [q, ..] = data.buffers(&device);
    let value: Vec<f32> = (1..65).map(|i| i as f32).collect();
    // A buffer of 128 elements whose host side is absent, newer, the same, or older.
    let states = ["absent", "host newer", "same", "device newer"];
    let made = |state: &str| {
        let buffer = device.alloc_buffer(256, BF16, vec![128]).unwrap();
        let fill = |x: f32| buffer.write::<bf16>().unwrap().fill(bf16::from_f32(x));
        match state {
            "absent" => {}
            "host newer" => fill(3.0),
            "same" => {
                fill(3.0);
                let out = output(&device, 64, BF16);
                attend(&device, &problem, &Operands::new(&q, &q, &buffer, &out));
            }
            _ => {
                fill(3.0);
                let v = crate::upload_bytes(&device, &to_bytes(&value, BF16));
                let out = buffer.slice_view(0, 64);
                attend(&device, &problem, &Operands::new(&q, &q, &v, &out));
            }
        }
        let mut want = vec![if state == "absent" { 0.0 } else { 3.0 }; 128];
        if state == "device newer" {
            want[..64].copy_from_slice(&value);
        }
        (buffer, want)
    };
    let part = |buffer: &MlxBuffer, at: usize| {
        let mut got = [bf16::NAN; 64];
        buffer.download(at, &mut got).unwrap();
        got.map(bf16::to_f32).to_vec()
    };
    // What a command sees of the elements from 32 on.
    let seen = |buffer: &MlxBuffer| {
        let out = output(&device, 64, BF16);
        let v = buffer.slice_view(64, 64);
        attend(&device, &problem, &Operands::new(&q, &q, &v, &out));
        download(&out)
    };
    let sevens = [bf16::from_f32(7.0); 30];
    for state in states {
        for command_first in [false, true] {
            let (buffer, mut want) = made(state);
            assert_eq!(part(&buffer, 40), want[40..104], "{state}");
            buffer.upload(50, &sevens).unwrap();
            want[50..80].fill(7.0);
            if command_first {
                assert_eq!(seen(&buffer), want[32..96], "{state}");
            }
            assert_eq!(part(&buffer, 40), want[40..104], "{state}");
            assert_eq!(download(&buffer), want, "{state}");
            assert_eq!(seen(&buffer), want[32..96], "{state}");
        }
        for other in states {
            let ((to, mut want), (from, source)) = (made(state), made(other));
            to.copy_from(33, &from, 20..90).unwrap();
            want[33..103].copy_from_slice(&source[20..90]);
            assert_eq!(part(&to, 30), want[30..94], "{other} to {state}");
            assert_eq!(seen(&to), want[32..96], "{other} to {state}");
            assert_eq!(download(&to), want, "{other} to {state}");
            assert_eq!(download(&from), source, "{other} to {state}");
        }
    }
}

#[test]
fn a_command_that_runs_is_not_done_and_its_other_bytes_can_be_copied() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(32, BF16, shape([1, 16, 16], (8192, 8192), 128));
    let problem = data.builder().build().unwrap();
    let [q, k, v, _] = data.buffers(&device);
    let n = data.q.len();
    // The output, and a row behind it.
    let whole = device
        .alloc_buffer(2 * (n + 64), BF16, vec![n + 64])
        .unwrap();
    let out = whole.slice_view(0, n);
    let buffers = [q, k, v, out];
    let mut encoder = device.command_encoder().unwrap();
    for _ in 0..20 {
        record(&mut encoder, &problem, &buffers);
    }
    let command = encoder.commit();
    assert!(!command.is_done(), "some ten milliseconds of work");
    let row = [bf16::from_f32(5.0); 64];
    whole.upload(n, &row).unwrap();
    let refused = whole.upload(n - 1, &row[..1]).unwrap_err().to_string();
    assert!(refused.contains("wait"), "{refused}");
    while !command.is_done() {
        std::thread::yield_now();
    }
    // As after a wait.
    let mut got = [bf16::NAN; 65];
    whole.download(n - 1, &mut got).unwrap();
    assert_eq!(got[1..], row);
    assert!(got[0].is_finite());
    command.wait().unwrap();
    assert!(bytes(&whole).ends_with(bytemuck::bytes_of(&row)));
}

/// The caller may free its memory, or use it on another stream, once a copy has returned.
#[test]
fn copies_of_a_callers_memory_have_run_when_they_return() {
    let Some(device) = cuda() else { return };
    let len = 64 << 20;
    // SAFETY: freed below, after the last use.
    let at = unsafe { result::malloc_sync(len) }.unwrap();
    // SAFETY: the memory has as many bytes, and lives until the handle is gone.
    let theirs = unsafe { device.cuda_wrap(at, len, DType::U8, vec![len]) }.unwrap();
    let ours = device.alloc_buffer(len, DType::U8, vec![len]).unwrap();
    let mut got = vec![0u8; len];
    for round in 1..=20u8 {
        theirs.upload(0, &vec![round; len]).unwrap();
        // SAFETY: as many bytes; nothing else uses them.
        unsafe { result::memcpy_dtoh_sync(&mut got, at) }.unwrap();
        assert!(got.iter().all(|x| *x == round), "an upload");
        // Written unseen, and read as it is.
        // SAFETY: as above.
        unsafe { result::memset_d8_sync(at, round + 100, len) }.unwrap();
        // A memset may still be under way, and a stream that does not block does not wait for it.
        result::ctx::synchronize().unwrap();
        ours.copy_from(0, &theirs, 0..len).unwrap();
        // SAFETY: as above.
        unsafe { result::memset_d8_sync(at, 0, len) }.unwrap();
        ours.download(0, &mut got).unwrap();
        assert!(got.iter().all(|x| *x == round + 100), "a copy");
        theirs.download(0, &mut got).unwrap();
        assert!(got.iter().all(|x| *x == 0), "a download");
    }
    drop(theirs);
    // SAFETY: made above, used no more.
    unsafe { result::free_sync(at) }.unwrap();
}
