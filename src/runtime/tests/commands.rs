//! Handles of commits, and commands that are prepared once. The device of the first runs a command when a
//! test says so, as a GPU takes its time.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use super::guards::refused;
use super::{classify, device, fill, mask, u8s};
use crate::attention::{Layout, MaskSpec, Problem, QueryOffset, Shape};
use crate::backend::command::{Planned, Work};
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::backend::{Backend, DeviceKind, Memory, Pending, Step, Timing};
use crate::error::Unsupported;
use crate::ops::{self, Operands};
use crate::runtime::device::MlxDevice;
use crate::{DType, MlxBuffer, MlxError, Result};

/// Whether commands have run, and whether those that are submitted fail.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    fails: AtomicBool,
}

/// Ends when the gate opens, and fails where commands did when it was submitted.
struct Later(Arc<Gate>, bool);

impl Pending for Later {
    fn wait(&self) -> Result<Timing> {
        let mut open = self.0.open.lock().unwrap();
        while !*open {
            open = self.0.opened.wait(open).unwrap();
        }
        match self.1 {
            true => Err(MlxError::CommandBufferError("it failed".into())),
            false => Ok(Timing {
                start: 1.0,
                end: 2.0,
            }),
        }
    }

    fn is_done(&self) -> bool {
        *self.0.open.lock().unwrap()
    }
}

/// A device whose commands end when the gate opens. It counts what it prepares, anew and again.
struct Slow {
    cpu: Cpu,
    gate: Arc<Gate>,
    prepared: Arc<[AtomicUsize; 2]>,
}

impl Backend for Slow {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cpu
    }

    fn name(&self) -> String {
        "slow".into()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        self.cpu.allocate(bytes)
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        self.cpu.supports(problem)
    }

    fn prepare(&self, work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        self.prepared[0].fetch_add(1, Ordering::Relaxed);
        self.cpu.prepare(work)
    }

    fn prepare_again(&self, work: &Work, before: &Planned) -> Result<Box<dyn Any + Send + Sync>> {
        self.prepared[1].fetch_add(1, Ordering::Relaxed);
        self.cpu.prepare_again(work, before)
    }

    fn submit(&self, _steps: Vec<Step>) -> Arc<dyn Pending> {
        let fails = self.gate.fails.load(Ordering::Relaxed);
        Arc::new(Later(Arc::clone(&self.gate), fails))
    }
}

struct World {
    device: MlxDevice,
    gate: Arc<Gate>,
    prepared: Arc<[AtomicUsize; 2]>,
}

impl World {
    fn new() -> Self {
        let (gate, prepared) = (Arc::<Gate>::default(), Arc::default());
        let backend = Slow {
            cpu: Cpu::open(CpuOptions::default()).unwrap(),
            gate: Arc::clone(&gate),
            prepared: Arc::clone(&prepared),
        };
        Self {
            device: MlxDevice::from_backend(Arc::new(backend)),
            gate,
            prepared,
        }
    }

    fn open(&self) {
        *self.gate.open.lock().unwrap() = true;
        self.gate.opened.notify_all();
    }

    fn prepared(&self) -> [usize; 2] {
        [0, 1].map(|i| self.prepared[i].load(Ordering::Relaxed))
    }
}

#[test]
fn a_handle_tells_whether_its_command_has_run_and_frees_the_buffers_then() {
    let world = World::new();
    let out = mask(&world.device, 6);
    let mut encoder = world.device.command_encoder().unwrap();
    fill(&mut encoder, &world.device, &out, 2, 3);
    let command = encoder.commit();
    assert!(!command.is_done());
    refused(out.read::<u16>(), &["encoded"]);
    refused(out.upload(0, &[1_u16]), &["encoded"]);
    world.open();
    refused(out.read::<u16>(), &["encoded"]);
    assert!(command.is_done() && command.is_done());
    out.upload(0, &[1_u16]).unwrap();
    assert_eq!(out.read::<u16>().unwrap()[0], 1);
    command.wait().unwrap();
    encoder.wait_until_completed().unwrap();
}

#[test]
fn waits_of_several_threads_and_of_handles_past_their_encoder_give_one_answer() {
    let world = World::new();
    world.gate.fails.store(true, Ordering::Relaxed);
    let out = mask(&world.device, 6);
    let mut encoder = world.device.command_encoder().unwrap();
    fill(&mut encoder, &world.device, &out, 2, 3);
    let command = encoder.commit();
    std::thread::scope(|scope| {
        let waits = [(); 3].map(|()| scope.spawn(|| command.wait()));
        // A wait that is under way keeps nobody from asking.
        assert!(!command.is_done());
        world.open();
        for wait in waits {
            let error = wait.join().unwrap().unwrap_err();
            assert!(error.to_string().contains("it failed"), "{error}");
        }
    });
    // Heard of: the next commit has nothing to tell of it.
    world.gate.fails.store(false, Ordering::Relaxed);
    encoder.commit_and_wait().unwrap();
    drop(encoder);
    assert!(command.is_done());
}

#[test]
fn a_refused_commit_is_done_and_its_handle_says_why() {
    let device = device();
    let out = mask(&device, 6);
    let mut encoder = device.command_encoder().unwrap();
    let guard = out.read::<u16>().unwrap();
    fill(&mut encoder, &device, &out, 2, 3);
    let command = encoder.commit();
    assert!(command.is_done());
    refused(command.wait(), &["read guard"]);
    drop(guard);
    // A handle tells of its own command; the encoder's wait of both.
    fill(&mut encoder, &device, &out.slice_view(11, 6), 2, 3);
    encoder.commit();
    fill(&mut encoder, &device, &out, 2, 3);
    let second = encoder.commit();
    second.wait().unwrap();
    refused(encoder.wait_until_completed(), &["slice_view"]);
    // Told once: the commits that follow have nothing more to tell of it.
    encoder.commit_and_wait().unwrap();
}

#[test]
fn a_failure_outlives_a_handle_that_tells_of_a_later_command() {
    let device = device();
    let out = mask(&device, 6);
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &out.slice_view(11, 6), 2, 3);
    encoder.commit();
    fill(&mut encoder, &device, &out, 2, 3);
    encoder.commit().wait().unwrap();
    fill(&mut encoder, &device, &out, 2, 3);
    encoder.commit().wait().unwrap();
    refused(encoder.wait_until_completed(), &["slice_view"]);
}

const DIM: usize = 32;
const ROOM: usize = 6;

/// One query of two heads over a cache `[ROOM, 1, DIM]`.
struct Cache {
    q: MlxBuffer,
    k: MlxBuffer,
    v: MlxBuffer,
    out: MlxBuffer,
}

impl Cache {
    fn new(device: &MlxDevice) -> Self {
        let buffer = |n: usize, phase: f32| {
            let data: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37 + phase).sin()).collect();
            device
                .buffer_from_slice(&data, DType::F32, vec![n])
                .unwrap()
        };
        Self {
            q: buffer(2 * DIM, 0.0),
            k: buffer(ROOM * DIM, 1.0),
            v: buffer(ROOM * DIM, 2.0),
            out: buffer(2 * DIM, 3.0),
        }
    }

    fn problem(&self, key_len: usize) -> Problem {
        let shape = Shape {
            batch: 1,
            heads: 2,
            kv_heads: 1,
            query_len: 1,
            key_len,
            qk_dim: DIM,
            v_dim: DIM,
        };
        Problem::builder(DType::F32, shape)
            .layout(Layout::SeqMajor)
            .key_capacity(ROOM)
            .query_offset(QueryOffset::BottomRight)
            .causal(true)
            .window(4)
            .build()
            .unwrap()
    }

    fn operands(&self) -> Operands<'_> {
        Operands::new(&self.q, &self.k, &self.v, &self.out)
    }

    fn output(&self) -> Vec<f32> {
        self.out.read::<f32>().unwrap().to_vec()
    }

    /// What encoding anew gives.
    fn anew(&self, device: &MlxDevice, key_len: usize) -> Vec<f32> {
        let mut encoder = device.command_encoder().unwrap();
        ops::attention(&mut encoder, &self.problem(key_len), &self.operands()).unwrap();
        encoder.commit_and_wait().unwrap();
        self.output()
    }
}

#[test]
fn a_prepared_command_runs_over_other_lengths_and_contents_as_encoded_anew() {
    let device = device();
    let cache = Cache::new(&device);
    let mut step = device
        .prepare_command(|encoder| ops::attention(encoder, &cache.problem(1), &cache.operands()))
        .unwrap();
    let mut encoder = device.command_encoder().unwrap();
    for len in [1, 2, ROOM, 3] {
        cache.q.upload(len, &[len as f32]).unwrap();
        let want = cache.anew(&device, len);
        cache.out.upload(0, &[f32::NAN; 2 * DIM]).unwrap();
        step.set_key_len(len).unwrap();
        encoder.replay_prepared(&step).unwrap();
        encoder.commit_and_wait().unwrap();
        assert_eq!(cache.output(), want, "{len} keys");
    }
    // Twice in one command, one after the other; a length that is set later is not theirs.
    encoder.replay_prepared(&step).unwrap();
    encoder.replay_prepared(&step).unwrap();
    step.set_key_len(1).unwrap();
    encoder.commit_and_wait().unwrap();
    assert_eq!(cache.output(), cache.anew(&device, 3));
}

#[test]
fn a_length_without_room_changes_and_runs_nothing() {
    let device = device();
    let cache = Cache::new(&device);
    let record = |problem: Problem| {
        device.prepare_command(|encoder| ops::attention(encoder, &problem, &cache.operands()))
    };
    let mut step = record(cache.problem(3)).unwrap();
    refused(step.set_key_len(ROOM + 1), &["key_len", "1 to 6", "got 7"]);
    refused(step.set_key_len(0), &["1 to 6"]);
    let mut encoder = device.command_encoder().unwrap();
    encoder.replay_prepared(&step).unwrap();
    encoder.commit_and_wait().unwrap();
    assert_eq!(cache.output(), cache.anew(&device, 3), "as it was");
    // Room in the problem, but not in a buffer: the cache has 6 rows of the 9.
    let roomy = cache.problem(3);
    let roomy = Problem::builder(DType::F32, roomy.shape())
        .layout(Layout::SeqMajor)
        .key_capacity(9);
    let mut step = record(roomy.build().unwrap()).unwrap();
    step.set_key_len(6).unwrap();
    refused(
        step.set_key_len(7),
        &["K", "at least 224 elements", "768 bytes"],
    );
    // A mask, whose columns are those that it was stated with.
    let masked = Problem::builder(DType::F32, cache.problem(3).shape())
        .layout(Layout::SeqMajor)
        .key_capacity(ROOM)
        .mask(MaskSpec::broadcast(DType::F32, [1, 1, 1, 3]));
    let mask = device.alloc_buffer(12, DType::F32, vec![3]).unwrap();
    let operands = Operands {
        mask: Some(&mask),
        ..cache.operands()
    };
    let masked = masked.build().unwrap();
    let step = device.prepare_command(|encoder| ops::attention(encoder, &masked, &operands));
    refused(step.unwrap().set_key_len(4), &["1 to 3"]);
    // Nothing to attend to became a key that no row sees: no length of the cache.
    let mut none = record(cache.problem(0)).unwrap();
    refused(none.set_key_len(1), &["built with keys"]);
}

#[test]
fn what_has_no_lengths_of_its_own_and_other_devices_are_refused() {
    let device = device();
    let (cells, classes) = (mask(&device, 6), u8s(&device, 6));
    let cache = Cache::new(&device);
    let mut raw = device
        .prepare_command(|encoder| {
            ops::attention(encoder, &cache.problem(2), &cache.operands())?;
            classify(encoder, &device, &cells, &classes, 2, 3);
            Ok(())
        })
        .unwrap();
    refused(raw.set_key_len(1), &["ops::attention", "blk"]);
    // It runs as it is.
    let mut encoder = device.command_encoder().unwrap();
    encoder.replay_prepared(&raw).unwrap();
    encoder.commit_and_wait().unwrap();
    assert_eq!(*classes.read::<u8>().unwrap(), [2; 6]);
    assert_eq!(cache.output(), cache.anew(&device, 2));

    let mut other = super::device().command_encoder().unwrap();
    refused(other.replay_prepared(&raw), &["command", "prepared for"]);
    // What a commit would report is reported at once.
    let faulty = device.prepare_command(|encoder| {
        fill(encoder, &device, &cells.slice_view(11, 6), 2, 3);
        Ok(())
    });
    refused(faulty, &["slice_view"]);
    // Also where a commit inside met it first.
    let committed = device.prepare_command(|encoder| {
        fill(encoder, &device, &cells.slice_view(11, 6), 2, 3);
        encoder.commit();
        Ok(())
    });
    refused(committed, &["slice_view"]);
    let taken = device.prepare_command(|encoder| {
        encoder.take_capture();
        Ok(())
    });
    refused(taken, &["capture"]);
    // Replays check nothing, so no other device's encoder takes the place of the one that is lent.
    let swapped = device.prepare_command(|encoder| {
        let mut other = super::device().command_encoder()?;
        other.start_capture();
        std::mem::swap(encoder, &mut other);
        Ok(())
    });
    refused(swapped, &["prepare_command", "another device"]);
}

#[test]
fn a_prepared_command_keeps_what_its_device_prepared() {
    let world = World::new();
    let cache = Cache::new(&world.device);
    let mut step = world
        .device
        .prepare_command(|encoder| ops::attention(encoder, &cache.problem(2), &cache.operands()))
        .unwrap();
    assert_eq!(world.prepared(), [1, 0]);
    for (len, again) in [(2, 0), (3, 1), (3, 1), (4, 2)] {
        step.set_key_len(len).unwrap();
        assert_eq!(world.prepared(), [1, again], "{len} keys");
    }
    world.open();
    let mut encoder = world.device.command_encoder().unwrap();
    for _ in 0..3 {
        encoder.replay_prepared(&step).unwrap();
        encoder.commit_and_wait().unwrap();
    }
    assert_eq!(world.prepared(), [1, 2], "a replay prepares nothing");
}
