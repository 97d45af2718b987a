//! Dispatches in parts, as the Metal device runs those that last too long: the same bits as in one.
#![allow(clippy::print_stderr)]

use std::sync::{Arc, Mutex};

use super::{Emulator, EmulatorOptions};
use crate::attention::{
    KeyLengths, Keys, MaskSpec, Pages, Problem, ProblemBuilder, QueryOffset, Shape,
};
use crate::ops::{self, Operands};
use crate::{DType, MlxBuffer, MlxDevice, Result};

/// Emulators that run `flops` operations at a time, for each of these, with the kernels that the first
/// of them has compiled.
fn devices(kernel: &str, flops: &[f64]) -> Result<Vec<MlxDevice>> {
    let options = EmulatorOptions {
        check: true,
        ..EmulatorOptions::default()
    };
    let first = Emulator::open(options)?;
    first.library(kernel, crate::backend::metal::sources::PREFILL_TEXT)?;
    let libraries = first.libraries.into_inner().unwrap();
    let device = |part_flops| {
        let mut emulator = Emulator::open(options)?;
        emulator.libraries = Mutex::new(libraries.clone());
        emulator.part_flops = part_flops;
        Ok(MlxDevice::from_backend(Arc::new(emulator)))
    };
    flops.iter().map(|flops| device(*flops)).collect()
}

fn values(n: usize, step: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * step + i / 7) % 41) as f32 / 16.0 - 1.25)
        .collect()
}

fn floats(device: &MlxDevice, values: &[f32]) -> MlxBuffer {
    device
        .buffer_from_slice(values, DType::F32, vec![values.len()])
        .unwrap()
}

/// Output and log-sum-exp of a problem with an operand of each kind.
fn run(device: &MlxDevice, problem: &Problem) -> Vec<u32> {
    use crate::attention::Role;
    let len = |role| problem.operand(role).map_or(1, |spec| spec.elements);
    let buffer = |role, step| floats(device, &values(len(role), step));
    let (q, k, v) = (
        buffer(Role::Query, 3),
        buffer(Role::Key, 5),
        buffer(Role::Value, 11),
    );
    let (mask, sinks, slopes) = (
        buffer(Role::Mask, 7),
        buffer(Role::Sinks, 13),
        buffer(Role::AlibiSlopes, 17),
    );
    let empty = |role| floats(device, &vec![f32::NAN; len(role)]);
    let (out, lse) = (empty(Role::Output), empty(Role::Lse));
    let mut operands = Operands::new(&q, &k, &v, &out);
    operands.mask = problem.mask().map(|_| &mask);
    operands.sinks = Some(&sinks);
    operands.alibi_slopes = Some(&slopes);
    operands.lse = Some(&lse);
    let lengths = (0..len(Role::KeyLengths)).map(|b| 50 - 33 * (b as u32 % 2));
    let lengths: Vec<u32> = lengths.collect();
    let lengths = device.buffer_from_slice(&lengths, DType::U32, vec![lengths.len()]);
    let lengths = lengths.unwrap();
    operands.key_lengths = Some(&lengths).filter(|_| problem.operand(Role::KeyLengths).is_some());
    let pages = match problem.keys() {
        Keys::Paged(pages) => pages.count,
        _ => 1,
    };
    let table = (0..len(Role::BlockTable)).map(|entry| ((5 * entry + 3) % pages) as i32);
    let table: Vec<i32> = table.collect();
    let table = device.buffer_from_slice(&table, DType::I32, vec![table.len()]);
    let table = table.unwrap();
    operands.block_table = Some(&table).filter(|_| problem.operand(Role::BlockTable).is_some());
    let mut encoder = device.command_encoder().unwrap();
    ops::attention(&mut encoder, problem, &operands).unwrap();
    encoder.commit_and_wait().unwrap();
    let mut bits = out.as_slice::<u32>().unwrap().to_vec();
    bits.extend_from_slice(lse.as_slice().unwrap());
    assert!(bits.iter().all(|bits| !f32::from_bits(*bits).is_nan()));
    bits
}

/// The GPU ends a command that outlasts its watchdog, so the Metal device spreads a dispatch over
/// several: by batch, by head, inside a group of heads, by query tile.
#[test]
fn a_dispatch_in_parts_gives_the_bits_of_one() {
    let (rows, keys, dim) = (70, 50, 32);
    let shape = Shape {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        query_len: rows,
        key_len: keys,
        qk_dim: dim,
        v_dim: dim,
    };
    let padded = Problem::builder(DType::F32, shape)
        .mask(MaskSpec::broadcast(DType::F32, [2, 4, rows, keys]))
        .causal(true)
        .query_offset(QueryOffset::At(-10));
    let packed = Problem::varlen(DType::F32, 4, 2, dim, &[0, 70, 75, 110], &[0, 50, 90, 100])
        .window(40)
        .query_offset(QueryOffset::BottomRight);
    // Of one tile, and as estimated: f32 counts twice.
    let tile = 2.0 * (4 * 32 * dim * keys) as f64;
    let flops = [f64::MAX, tile * 13.0, tile * 7.0, tile * 3.5, 1.0];
    let devices = match devices("flash_attn_prefill_f32_d32", &flops) {
        Ok(devices) => devices,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            return;
        }
    };
    let pages = Pages {
        count: 11,
        page_size: 16,
        per_sequence: 4,
    };
    let causal = |b: ProblemBuilder| b.causal(true).query_offset(QueryOffset::BottomRight);
    let of_device = causal(Problem::builder(DType::F32, shape)).key_lengths(KeyLengths::Device);
    let paged = causal(Problem::builder(DType::F32, shape))
        .pages(pages)
        .key_lengths(KeyLengths::Host([23, 50].into()));
    let chunks = Problem::varlen_queries(DType::F32, 4, 2, keys, dim, &[0, 70, 71, 105]);
    let chunks = causal(chunks).pages(pages).key_lengths(KeyLengths::Device);
    for builder in [padded, packed, of_device, paged, chunks] {
        let problem = builder.sinks(true).alibi(true).lse(true).build().unwrap();
        let want = run(&devices[0], &problem);
        for (device, flops) in devices.iter().zip(flops).skip(1) {
            assert_eq!(run(device, &problem), want, "{flops} operations at a time");
        }
    }
}
