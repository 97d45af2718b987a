//! Figures of start-up and dispatch. Run with `--ignored --nocapture`.

use std::time::Duration;

use mlx_flash_attn::CommandEncoder;
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
        let [recorded, launched] = host_times(&mut encoder, |encoder, _| {
            ops::attention(encoder, &problem, &operands).unwrap();
        });
        eprintln!(
            "{heads} heads, {rows} x {keys}: recorded in {recorded:?}, with the launch {launched:?}"
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
        let [recorded, launched] = host_times(&mut encoder, |encoder, i| {
            if anew {
                ops::attention(encoder, &problem(i + 1), &operands).unwrap();
            } else {
                prepared.set_key_len(i + 1).unwrap();
                encoder.replay_prepared(&prepared).unwrap();
            }
        });
        let what = if anew { "anew" } else { "replayed" };
        eprintln!("{what}: recorded in {recorded:?}, with the launch {launched:?}");
    }
}

/// Host time of one of 100 dispatches, recorded and with the launch: medians of 20 commands. `encode` gets
/// the dispatch's number among all of them.
fn host_times(
    encoder: &mut CommandEncoder,
    mut encode: impl FnMut(&mut CommandEncoder, usize),
) -> [Duration; 2] {
    let (mut recorded, mut launched) = (Vec::new(), Vec::new());
    let n = 100u32;
    for round in 0..20 {
        let begin = std::time::Instant::now();
        for i in 0..n as usize {
            encode(encoder, round * 100 + i);
        }
        recorded.push(begin.elapsed() / n);
        // SAFETY: the default stream is always there.
        let in_flight = unsafe { encoder.encode_into_stream(std::ptr::null_mut()) }.unwrap();
        launched.push(begin.elapsed() / n);
        in_flight.wait().unwrap();
    }
    [recorded, launched].map(|mut times| {
        times.sort();
        times[10]
    })
}
