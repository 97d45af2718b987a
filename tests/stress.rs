//! Threads that share buffers, devices and encoders and do with them what they like, from safe code
//! alone: nothing crashes or hangs, and nobody ever sees half of what a command or a guard wrote.
//!
//! `MLX_FLASH_STRESS_SECONDS` says how long each device is tried; two seconds when not given.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[path = "common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mlx_flash_attn::attention::Problem;
use mlx_flash_attn::encoder::{CapturedNode, CommandEncoder};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::verify::Random;
use mlx_flash_attn::{CpuOptions, DType, DeviceKind, MlxBuffer, MlxDevice};

const THREADS: u64 = 8;
const ROWS: usize = 6;
const DIM: usize = 64;
const ELEMENTS: usize = 2 * ROWS * DIM;

/// What the threads do, and how often it was done and not refused.
const ACTIONS: [&str; 12] = [
    "attend",
    "commit",
    "done",
    "wait",
    "read",
    "write",
    "copy",
    "upload",
    "download",
    "copy from",
    "replay",
    "renew",
];

struct World {
    /// Handles on the same few devices.
    devices: Vec<MlxDevice>,
    buffers: Vec<MlxBuffer>,
    encoders: Vec<Mutex<CommandEncoder>>,
    captures: Vec<Vec<CapturedNode>>,
    problem: Problem,
    done: [AtomicUsize; ACTIONS.len()],
}

/// Every buffer holds one value, whoever wrote it last: the mean of equal rows of V is that row.
fn assert_whole(values: &[f32]) {
    assert_eq!(values.len(), ELEMENTS);
    let first = values[0];
    assert!(first.is_finite());
    for x in values {
        assert!(
            (x - first).abs() <= 1e-3 * first.abs(),
            "{x} beside {first}"
        );
    }
}

impl World {
    fn new(device: &MlxDevice) -> Self {
        let shape = common::shape([1, 2, 2], (ROWS, ROWS), DIM);
        let problem = Problem::builder(DType::F32, shape).causal(true).build();
        let mut devices = vec![device.clone()];
        if device.kind() == DeviceKind::Cpu {
            // Buffers of one CPU device serve the others.
            for threads in [1, 3] {
                let options = CpuOptions {
                    threads: Some(threads),
                    ..CpuOptions::default()
                };
                devices.push(MlxDevice::cpu(options).unwrap());
            }
        }
        let buffers: Vec<MlxBuffer> = (0..6)
            .map(|i| {
                common::upload(
                    device,
                    &[(1 << i) as f32; ELEMENTS],
                    DType::F32,
                    &[ELEMENTS],
                )
            })
            .collect();
        let mut world = Self {
            encoders: (0..5)
                .map(|i| Mutex::new(devices[i % devices.len()].command_encoder().unwrap()))
                .collect(),
            problem: problem.unwrap(),
            captures: Vec::new(),
            done: std::array::from_fn(|_| AtomicUsize::new(0)),
            devices,
            buffers,
        };
        for i in 0..3 {
            let mut encoder = device.command_encoder().unwrap();
            encoder.start_capture();
            world.attend(&mut encoder, [i, i + 1, i + 2, i + 3]);
            world.attend(&mut encoder, [i + 3, i, i + 1, i + 2]);
            world.captures.push(encoder.take_capture().unwrap());
        }
        world
    }

    fn attend(&self, encoder: &mut CommandEncoder, at: [usize; 4]) -> bool {
        let [q, k, v, out] = at.map(|i| &self.buffers[i]);
        let operands = Operands::new(q, k, v, out);
        ops::attention(encoder, &self.problem, &operands).is_ok()
    }

    fn act(&self, random: &mut Random, mine: &mut Vec<MlxBuffer>) {
        let mut pick = |n: usize| random.below(n);
        let action = pick(ACTIONS.len());
        let buffer = &self.buffers[pick(self.buffers.len())];
        let encoder = &self.encoders[pick(self.encoders.len())];
        let encoder = || encoder.lock().unwrap_or_else(PoisonError::into_inner);
        let ok = match ACTIONS[action] {
            "attend" => {
                let at = std::array::from_fn(|_| pick(self.buffers.len()));
                self.attend(&mut encoder(), at)
            }
            "commit" => {
                encoder().commit();
                true
            }
            "done" => encoder().commit().is_done(),
            "wait" => encoder().commit_and_wait().is_ok(),
            "read" => buffer.read::<f32>().is_ok_and(|guard| {
                assert_whole(&guard);
                std::thread::yield_now();
                assert_whole(&guard);
                true
            }),
            "write" => buffer.write::<f32>().is_ok_and(|mut guard| {
                assert_whole(&guard);
                guard.fill((1 << pick(6)) as f32);
                true
            }),
            "copy" => {
                // A handle of one's own, so that copies do not pile up.
                mine.truncate(3);
                mine.push(buffer.clone());
                let last = mine.len() - 1;
                mine.swap(0, last);
                match mine[0].as_slice::<f32>() {
                    Err(_) => false,
                    Ok(slice) => {
                        assert_whole(slice);
                        let before = slice[0];
                        std::thread::yield_now();
                        if let Ok(again) = mine[0].as_slice::<f32>() {
                            assert_whole(again);
                        }
                        assert_whole(slice);
                        assert_eq!(slice[0], before);
                        true
                    }
                }
            }
            "upload" => {
                let values = [(1 << pick(6)) as f32; ELEMENTS];
                buffer.upload(0, &values).is_ok()
            }
            "download" => {
                let mut values = [f32::NAN; ELEMENTS];
                let done = buffer.download(0, &mut values).is_ok();
                if done {
                    assert_whole(&values);
                }
                done
            }
            "copy from" => {
                let source = &self.buffers[pick(self.buffers.len())];
                buffer.copy_from(0, source, 0..ELEMENTS).is_ok()
            }
            "replay" => encoder()
                .replay(&self.captures[pick(self.captures.len())])
                .is_ok(),
            _ => {
                // What was recorded is dropped; what runs is waited for.
                let device = &self.devices[pick(self.devices.len())];
                *encoder() = device.command_encoder().unwrap();
                true
            }
        };
        self.done[action].fetch_add(usize::from(ok), Ordering::Relaxed);
    }
}

#[test]
fn threads_that_share_everything_see_whole_buffers() {
    let seconds = std::env::var("MLX_FLASH_STRESS_SECONDS").ok();
    let seconds = seconds.map_or(2.0, |s| s.parse().unwrap());
    // All devices at once, each with its own buffers and threads.
    std::thread::scope(|scope| {
        for device in common::devices() {
            scope.spawn(move || stress(&device, seconds));
        }
    });
}

fn stress(device: &MlxDevice, seconds: f64) {
    let world = World::new(device);
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    std::thread::scope(|scope| {
        for seed in 0..THREADS {
            let world = &world;
            scope.spawn(move || {
                let mut random = Random::new(900 + seed);
                let mut mine = Vec::new();
                while Instant::now() < end {
                    world.act(&mut random, &mut mine);
                }
            });
        }
    });
    let done = ACTIONS.iter().zip(&world.done);
    let done: Vec<_> = done
        .map(|(name, n)| (*name, n.load(Ordering::Relaxed)))
        .collect();
    eprintln!("{}: {done:?}", device.kind());
    assert!(done.iter().all(|(_, n)| *n > 0), "some were always refused");
}
