//! Copies of ragged ranges, whole guards and commands by turns, held against plain vectors: on every device
//! a copy sees what was there before it, and leaves what was beside it.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use half::bf16;
use mlx_flash_attn::attention::Problem;
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::verify::Random;
use mlx_flash_attn::{DType, DeviceKind, MlxBuffer, MlxDevice};

use common::{attend, devices, shape};

const DIM: usize = 64;
const LEN: usize = 5 * DIM + 37;

/// A buffer, and what it should hold.
struct Twin {
    buffer: MlxBuffer,
    model: Vec<bf16>,
}

/// `count` elements that differ from others, all exact in bf16.
fn fresh(random: &mut Random, count: usize) -> Vec<bf16> {
    (0..count)
        .map(|_| bf16::from_f32(random.below(256) as f32))
        .collect()
}

/// A range of at most `most` elements, empty ones and those that end at the end among them.
fn ragged(random: &mut Random, most: usize) -> std::ops::Range<usize> {
    let count = random.below(most + 1);
    let start = random.below(LEN - count + 1);
    start..start + count
}

struct World {
    twins: [Twin; 2],
    /// One key: whatever the query, a row of the output is the row of V.
    problem: Problem,
    query: MlxBuffer,
}

impl World {
    fn new(device: &MlxDevice, random: &mut Random) -> Self {
        let twin = |random: &mut Random, given: bool| {
            // One buffer was filled through the host, the other is as it was allocated.
            let model = if given {
                fresh(random, LEN)
            } else {
                vec![bf16::ZERO; LEN]
            };
            let buffer = if given {
                device.buffer_from_slice(&model, DType::BF16, vec![LEN])
            } else {
                device.alloc_buffer(2 * LEN, DType::BF16, vec![LEN])
            };
            Twin {
                buffer: buffer.unwrap(),
                model,
            }
        };
        Self {
            twins: [twin(random, true), twin(random, false)],
            problem: Problem::builder(DType::BF16, shape([1, 1, 1], (1, 1), DIM))
                .build()
                .unwrap(),
            query: device
                .buffer_from_slice(&[bf16::ONE; DIM], DType::BF16, vec![DIM])
                .unwrap(),
        }
    }

    fn act(&mut self, device: &MlxDevice, random: &mut Random) {
        let (action, which) = (random.below(8), random.below(2));
        let range = ragged(random, LEN);
        let at = range.start;
        if let 4 | 5 = action {
            return self.copy(random, which);
        }
        if action == 6 {
            return self.command(device, random, which);
        }
        let Twin { buffer, model } = &mut self.twins[which];
        match action {
            0 | 1 => {
                let data = fresh(random, range.len());
                buffer.upload(at, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
            2 | 3 => {
                let mut into = vec![bf16::NAN; range.len()];
                buffer.download(at, &mut into).unwrap();
                assert_eq!(into, model[range], "from {at}");
            }
            _ => {
                let view = buffer.slice_view(2 * at as u64, range.len());
                let mut guard = view.write::<bf16>().unwrap();
                assert_eq!(*guard, model[range.clone()]);
                let data = fresh(random, range.len());
                guard.copy_from_slice(&data);
                model[range].copy_from_slice(&data);
            }
        }
    }

    /// A copy on the device, between the two or within one.
    fn copy(&mut self, random: &mut Random, which: usize) {
        let within = random.below(3) == 0;
        let from = ragged(random, if within { LEN / 2 } else { LEN });
        let to = random.below(LEN - from.len() + 1);
        let source = if within { which } else { 1 - which };
        let buffers = [which, source].map(|i| self.twins[i].buffer.clone());
        let copied = buffers[0].copy_from(to, &buffers[1], from.clone());
        if within && to < from.end && from.start < to + from.len() {
            return assert!(copied.is_err(), "{from:?} to {to}");
        }
        copied.unwrap();
        let data = self.twins[source].model[from].to_vec();
        self.twins[which].model[to..to + data.len()].copy_from_slice(&data);
    }

    /// A command that reads one buffer and writes the other.
    fn command(&mut self, device: &MlxDevice, random: &mut Random, which: usize) {
        let mut start = || random.below(LEN - DIM + 1);
        let (from, to) = (start(), start());
        let view = |i: usize, at: usize| self.twins[i].buffer.slice_view(2 * at as u64, DIM);
        let (value, out) = (view(1 - which, from), view(which, to));
        let operands = Operands::new(&self.query, &self.query, &value, &out);
        attend(device, &self.problem, &operands);
        let row = self.twins[1 - which].model[from..from + DIM].to_vec();
        self.twins[which].model[to..to + DIM].copy_from_slice(&row);
    }
}

#[test]
fn ragged_copies_leave_what_a_vector_would_hold() {
    for device in devices() {
        let steps = match device.kind() {
            DeviceKind::Emulator => 150,
            _ => 1500,
        };
        let mut random = Random::new(77);
        for _ in 0..4 {
            let mut world = World::new(&device, &mut random);
            for _ in 0..steps {
                world.act(&device, &mut random);
            }
            for Twin { buffer, model } in &world.twins {
                assert_eq!(*buffer.read::<bf16>().unwrap(), model[..]);
            }
        }
    }
}

#[test]
fn copies_between_devices_are_refused() {
    let open = devices();
    let buffer = |device: &MlxDevice| device.alloc_buffer(8, DType::F32, vec![2]).unwrap();
    for (i, device) in open.iter().enumerate() {
        for other in &open[i + 1..] {
            let error = buffer(device)
                .copy_from(0, &buffer(other), 0..1)
                .unwrap_err();
            let words = [device.kind(), other.kind()].map(|kind| kind.to_string());
            let error = error.to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
