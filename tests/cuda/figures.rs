//! Figures of start-up and dispatch. Run with `--ignored --nocapture`.

use mlx_flash_attn::attention::{Problem, QueryOffset, Shape};
use mlx_flash_attn::ops::{self, Operands};

use crate::common::{Qkv, shape};
use crate::{BF16, cuda};

/// A figure: seconds from nothing to the first result. `MLX_FLASH_CUDA_CACHE=off` has it compile.
#[test]
#[ignore = "prints a figure"]
fn first_result() {
    let data = Qkv::new(12, BF16, shape([1, 2, 2], (256, 256), 128));
    let problem = data.builder().causal(true).build().unwrap();
    let begin = std::time::Instant::now();
    let Some(device) = cuda() else { return };
    let opened = begin.elapsed();
    data.run(&device, &problem);
    let done = begin.elapsed();
    eprintln!("first result after {done:.3?}, the device open after {opened:.3?}");
}

/// A figure: what recording a dispatch and giving it to the driver takes of the host.
#[test]
#[ignore = "prints a figure"]
fn host_time_of_a_dispatch() {
    let Some(device) = cuda() else { return };
    for (heads, rows, keys) in [(2, 256, 256), (2, 1, 256), (8, 1, 8_192)] {
        let data = Qkv::new(13, BF16, shape([1, heads, heads], (rows, keys), 128));
        let problem = data.builder().build().unwrap();
        let [q, k, v, out] = data.buffers(&device);
        let operands = Operands::new(&q, &k, &v, &out);
        let mut encoder = device.command_encoder().unwrap();
        let (mut recorded, mut encoded) = (Vec::new(), Vec::new());
        let n = 100u32;
        for _ in 0..20 {
            let begin = std::time::Instant::now();
            for _ in 0..n {
                ops::attention(&mut encoder, &problem, &operands).unwrap();
            }
            recorded.push(begin.elapsed() / n);
            // SAFETY: the default stream is always there.
            let in_flight = unsafe { encoder.encode_into_stream(std::ptr::null_mut()) }.unwrap();
            encoded.push(begin.elapsed() / n);
            in_flight.wait().unwrap();
        }
        recorded.sort();
        encoded.sort();
        eprintln!(
            "{heads} heads, {rows} x {keys}: recorded in {:?}, with the launch {:?}",
            recorded[10], encoded[10]
        );
    }
}

/// A figure: host time of a decode step, encoded anew and as a replay of a prepared command over other
/// lengths.
#[test]
#[ignore = "prints a figure"]
fn host_time_of_a_replay() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(14, BF16, shape([1, 8, 2], (1, 4_096), 128));
    let problem = |key_len: usize| {
        Problem::builder(
            BF16,
            Shape {
                key_len,
                ..data.shape
            },
        )
        .key_capacity(4_096)
        .query_offset(QueryOffset::BottomRight)
        .causal(true)
        .build()
        .unwrap()
    };
    let [q, k, v, out] = data.buffers(&device);
    let operands = Operands::new(&q, &k, &v, &out);
    let mut prepared = device
        .prepare_command(|encoder| ops::attention(encoder, &problem(1), &operands))
        .unwrap();
    let mut encoder = device.command_encoder().unwrap();
    for anew in [true, false, true, false] {
        let (mut recorded, mut encoded) = (Vec::new(), Vec::new());
        let n = 100u32;
        for round in 0..20 {
            let begin = std::time::Instant::now();
            for i in 0..n as usize {
                let len = round * 100 + i + 1;
                if anew {
                    ops::attention(&mut encoder, &problem(len), &operands).unwrap();
                } else {
                    prepared.set_key_len(len).unwrap();
                    encoder.replay_prepared(&prepared).unwrap();
                }
            }
            recorded.push(begin.elapsed() / n);
            // SAFETY: the default stream is always there.
            let in_flight = unsafe { encoder.encode_into_stream(std::ptr::null_mut()) }.unwrap();
            encoded.push(begin.elapsed() / n);
            in_flight.wait().unwrap();
        }
        recorded.sort();
        encoded.sort();
        eprintln!(
            "{}: recorded in {:?}, with the launch {:?}",
            if anew { "anew" } else { "replayed" },
            recorded[10],
            encoded[10]
        );
    }
}
