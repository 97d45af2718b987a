//! Dispatches that a caller put together are checked before any device has them. The device here is
//! one of Metal's kind that runs nothing and counts what it is given.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{device, fill_params, mask, u8s};
use crate::attention::Problem;
use crate::backend::command::Work;
use crate::backend::host_memory::HostMemory;
use crate::backend::metal::bindings::{Constants, accesses, names};
use crate::backend::metal::params::AttnParamsGpu;
use crate::backend::shared_params::{BlkParamsGpu, MaskFillParamsGpu, VecParamsGpu};
use crate::backend::{Backend, DeviceKind, Done, Kernel, Limits, Memory, Pending, Step, Timing};
use crate::error::Unsupported;
use crate::runtime::encoder::{CommandEncoder, KernelArg, MTLSize, as_bytes};
use crate::{DType, KernelRegistry, MlxBuffer, MlxDevice, MlxError, Result};

/// Counts dispatches.
struct Fake(Arc<AtomicUsize>);

impl Backend for Fake {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Metal
    }

    fn name(&self) -> String {
        "counts".into()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        vec![]
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(HostMemory::zeroed(bytes)?))
    }

    fn supports(&self, _problem: &Problem) -> std::result::Result<(), Unsupported> {
        Ok(())
    }

    fn prepare(&self, _work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }

    fn build(&self, kernel: &str, source: &str, constants: &Constants) -> Result<Arc<Kernel>> {
        let limits = Limits {
            thread_execution_width: 32,
            max_threads: 1024,
            static_threadgroup_bytes: 0,
        };
        let built = Kernel::new(kernel, constants, limits, accesses(kernel), ());
        Ok(Arc::new(
            if crate::backend::metal::sources::is_own(kernel, source) {
                built
            } else {
                built.into_foreign()
            },
        ))
    }

    fn runs_text(&self) -> bool {
        true
    }

    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending> {
        let dispatches = steps.iter().filter(|s| !matches!(s, Step::Barrier));
        self.0.fetch_add(dispatches.count(), Ordering::Relaxed);
        let (start, end) = (1.0, 2.0);
        Arc::new(Done(Ok(Timing { start, end })))
    }
}

struct World {
    device: MlxDevice,
    encoder: CommandEncoder,
    registry: KernelRegistry,
    ran: Arc<AtomicUsize>,
}

impl World {
    fn new() -> Self {
        let ran = Arc::<AtomicUsize>::default();
        let device = MlxDevice::from_backend(Arc::new(Fake(Arc::clone(&ran))));
        Self {
            encoder: device.command_encoder().unwrap(),
            registry: KernelRegistry::new(),
            ran,
            device,
        }
    }

    fn buffer(&self, dtype: DType, elements: usize) -> MlxBuffer {
        let bytes = elements * dtype.size_of();
        self.device
            .alloc_buffer(bytes, dtype, vec![elements])
            .unwrap()
    }

    /// Commits one dispatch; what it gives, and how many the device had.
    fn run(
        &mut self,
        kernel: &str,
        ints: &[(usize, i32)],
        args: &[(u64, KernelArg<'_>)],
        grid: [u64; 3],
        threads: [u64; 3],
    ) -> (Result<()>, usize) {
        let device = self.device.metal_device();
        let pipeline = self
            .registry
            .get_pipeline_with_constants(kernel, device, &[], ints)
            .unwrap();
        self.encoder
            .encode_threadgroups_with_args(pipeline, args, grid.into(), threads.into());
        let result = self.encoder.commit_and_wait();
        (result, self.ran.swap(0, Ordering::Relaxed))
    }
}

#[track_caller]
fn refused(got: (Result<()>, usize), words: &str) {
    match got {
        (Err(MlxError::CommandBufferError(message)), 0) => {
            assert!(message.contains(words), "`{words}` is not in: {message}");
        }
        other => panic!("{other:?}, where `{words}` was expected"),
    }
}

const MILLION: u32 = 1_000_000;

#[test]
fn a_fill_of_a_million_rows_too_many_is_refused_before_the_device() {
    let mut w = World::new();
    let cells = w.buffer(DType::BF16, 6);
    let mut run = |rows: u32, grid: u64| {
        let params = fill_params(rows, 3);
        let args = [
            (0, KernelArg::Buffer(&cells)),
            (1, KernelArg::Bytes(as_bytes(&params))),
        ];
        w.run(names::MASK_FILL, &[], &args, [grid, 1, 1], [32, 1, 1])
    };
    assert_eq!(run(2, 2), (Ok(()), 1));
    refused(run(MILLION, MILLION.into()), "buffer 0");
    refused(run(2, MILLION.into()), "grid");
}

#[test]
fn classes_of_a_million_rows_too_many_are_refused_before_the_device() {
    let mut w = World::new();
    let (cells, classes) = (w.buffer(DType::BF16, 6), w.buffer(DType::U8, 32));
    let mut run = |rows: u32, tiles: u32, ints: &[(usize, i32)]| {
        let params = BlkParamsGpu {
            seq_len_q: rows,
            seq_len_k: 3,
            nq: tiles,
            nk: 1,
            row_stride: 3,
        };
        let args = [
            (0, KernelArg::Buffer(&cells)),
            (1, KernelArg::Buffer(&classes)),
            (2, KernelArg::Bytes(as_bytes(&params))),
        ];
        w.run(names::BLK, ints, &args, [1, tiles.into(), 1], [32, 1, 1])
    };
    let tile = [(400, 32), (401, 16)];
    assert_eq!(run(2, 1, &tile), (Ok(()), 1));
    refused(run(MILLION, MILLION / 32, &tile), "buffer 0");
    refused(run(2, 1, &[]), "constant 400");
}

#[test]
fn decode_of_a_million_keys_too_many_is_refused_before_the_device() {
    let mut w = World::new();
    let f32s = |w: &World, n| w.buffer(DType::F32, n);
    let (q, kv, tmp) = (f32s(&w, 64), f32s(&w, 5 * 64), f32s(&w, 32 * 66));
    let out = f32s(&w, 64);
    let mut params = VecParamsGpu {
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 64,
        kv_seq_len: 5,
        kv_capacity: 5,
        kv_start: 0,
        scale: 0.125,
        softcap: 0.0,
        splits: 32,
        _pad: 0,
    };
    let mut partials = |params: &VecParamsGpu| {
        let args = [
            (0, KernelArg::Buffer(&q)),
            (1, KernelArg::Buffer(&kv)),
            (2, KernelArg::Buffer(&kv)),
            (3, KernelArg::Buffer(&tmp)),
            (4, KernelArg::Bytes(as_bytes(params))),
        ];
        w.run(names::VEC_F32, &[], &args, [32, 1, 1], [32, 1, 1])
    };
    assert_eq!(partials(&params), (Ok(()), 1));
    (params.kv_seq_len, params.kv_capacity) = (MILLION, MILLION);
    refused(partials(&params), "buffer 1");
    (params.kv_seq_len, params.kv_capacity, params.splits) = (5, 5, MILLION);
    refused(partials(&params), "buffer 3");
    let args = [
        (0, KernelArg::Buffer(&tmp)),
        (1, KernelArg::Buffer(&out)),
        (2, KernelArg::Bytes(as_bytes(&params))),
    ];
    let reduce = w.run(names::VEC_REDUCE, &[], &args, [1, 1, 1], [32, 1, 1]);
    refused(reduce, "buffer 0");
}

#[test]
fn a_prefill_of_a_million_rows_too_many_is_refused_before_the_device() {
    let mut w = World::new();
    let bf16s = |w: &World, rows: usize| w.buffer(DType::BF16, rows * 64);
    let (q, kv, out) = (bf16s(&w, 9), bf16s(&w, 11), bf16s(&w, 9));
    let strides = |rows: i64| [rows * 64, rows * 64, 64];
    let params = AttnParamsGpu {
        b: 1,
        h: 1,
        d: 64,
        ql: 9,
        kl: 11,
        gqa_factor: 1,
        scale: 0.125,
        softcapping: 1.0,
        nq: 1,
        nk: 1,
        nq_aligned: 0,
        nk_aligned: 0,
        ql_rem: 9,
        kl_rem: 11,
        ql_off: 0,
        _pad: 0,
        q_strides: strides(9),
        k_strides: strides(11),
        v_strides: strides(11),
        o_strides: strides(9),
    };
    let mut run = |params: &AttnParamsGpu, grid: u64| {
        let args = [
            (0, KernelArg::Buffer(&q)),
            (1, KernelArg::Buffer(&kv)),
            (2, KernelArg::Buffer(&kv)),
            (3, KernelArg::Buffer(&out)),
            (4, KernelArg::Bytes(as_bytes(params))),
        ];
        let name = "flash_attn_prefill_bf16_d64";
        w.run(name, &[], &args, [grid, 1, 1], [32, 4, 1])
    };
    assert_eq!(run(&params, 1), (Ok(()), 1));
    refused(run(&params, 2), "grid");
    let rows = 9 + 1_000_000;
    let more = AttnParamsGpu {
        ql: rows,
        nq: (rows + 31) / 32,
        ..params
    };
    refused(run(&more, u64::from(more.nq.unsigned_abs())), "buffer 0");
    let more = AttnParamsGpu { kl: rows, ..params };
    refused(run(&more, 1), "buffer 1");
}

#[test]
fn params_in_a_buffer_are_checked_and_passed_on_as_bytes() {
    let mut w = World::new();
    let cells = w.buffer(DType::BF16, 6);
    let bound = w.buffer(DType::U32, 5);
    let mut run = |params: MaskFillParamsGpu| {
        let words = bytemuck::cast_slice::<u8, u32>(as_bytes(&params)).to_vec();
        bound.write::<u32>().unwrap().copy_from_slice(&words);
        let args = [
            (0, KernelArg::Buffer(&cells)),
            (1, KernelArg::Buffer(&bound)),
        ];
        w.run(names::MASK_FILL, &[], &args, [2, 1, 1], [32, 1, 1])
    };
    assert_eq!(run(fill_params(2, 3)), (Ok(()), 1));
    refused(run(fill_params(2, 4)), "buffer 0");
    refused(run(fill_params(MILLION, 3)), "buffer 0");
}

/// A fill's params, written by the tile classes of a mask: each cell is a tile, and 0, 1 and 2 are a
/// byte that is -inf, 1.0 and 0.0 there.
fn params_by_classes(
    device: &MlxDevice,
    encoder: &mut CommandEncoder,
    words: [u8; 5],
) -> MlxBuffer {
    let bytes: Vec<u8> = words.iter().flat_map(|w| [*w, 0, 0, 0]).collect();
    let cells = mask(device, bytes.len());
    let bits = bytes
        .iter()
        .map(|b| [0xff80_u16, 0x3f80, 0][usize::from(*b)]);
    let mut guard = cells.write::<u16>().unwrap();
    guard.iter_mut().zip(bits).for_each(|(to, b)| *to = b);
    drop(guard);
    let params = u8s(device, 20);
    super::classify(encoder, device, &cells, &params, 1, 20);
    params
}

#[test]
fn params_in_a_buffer_are_read_after_what_was_encoded_before_them() {
    let device = device();
    let mut encoder = device.command_encoder().unwrap();
    let mut registry = KernelRegistry::new();
    let pipeline = registry
        .get_pipeline(names::MASK_FILL, device.metal_device())
        .unwrap();
    for (words, ok) in [([2, 1, 0, 1, 0], true), ([2, 2, 0, 1, 0], false)] {
        let out = mask(&device, 2);
        out.write::<u16>().unwrap().fill(9);
        // As the buffer is now, its params say millions of rows.
        let params = params_by_classes(&device, &mut encoder, words);
        let args = [
            (0, KernelArg::Buffer(&out)),
            (1, KernelArg::Buffer(&params)),
        ];
        // The good params say two rows.
        let (grid, one) = (MTLSize::new(2, 1, 1), MTLSize::new(1, 1, 1));
        encoder.encode_threadgroups_with_args(pipeline, &args, grid, one);
        let result = encoder.commit_wait_with_gpu_time();
        assert_eq!(result.is_ok(), ok, "{result:?}");
        if let Ok((start, end)) = result {
            assert!(start <= end);
        }
        let expected = if ok { [0; 2] } else { [9; 2] };
        assert_eq!(*out.read::<u16>().unwrap(), expected);
    }
}

#[test]
fn a_text_that_is_not_ours_is_built_through_the_unsafe_entry_alone() {
    let mut w = World::new();
    let device = w.device.clone();
    let handle = device.metal_device();
    for name in ["mine", names::MASK_FILL] {
        w.registry.register_source(name, "a text");
        let error = w.registry.get_pipeline(name, handle).unwrap_err();
        assert!(
            error.to_string().contains("register_foreign_source"),
            "{error}"
        );
        assert!(!w.registry.is_cached(name));
        // SAFETY: the device runs nothing.
        unsafe { w.registry.register_foreign_source(name, "a text") };
        let kernel = w.registry.get_pipeline(name, handle).unwrap().kernel();
        assert!(kernel.foreign && kernel.accesses.of(0).writes());
        // What it does with what is bound is not known, and not checked.
        assert_eq!(w.run(name, &[], &[], [9, 9, 9], [1, 1, 1]), (Ok(()), 1));
        // Without the promise it is unknown again.
        w.registry.register_source(name, "a text");
        assert!(w.registry.get_pipeline(name, handle).is_err());
    }
    // Our own text is known again for what it is.
    crate::ops::flash_attn_prefill_mask::register(&mut w.registry);
    let kernel = w.registry.get_pipeline(names::MASK_FILL, handle).unwrap();
    assert!(!kernel.kernel().foreign);
}

#[cfg(not(miri))]
#[test]
fn more_bytes_than_a_command_may_copy_are_refused() {
    let mut w = World::new();
    let cells = w.buffer(DType::BF16, 6);
    let bytes = vec![0; (1 << 30) + 1];
    let args = [
        (0, KernelArg::Buffer(&cells)),
        (1, KernelArg::Bytes(&bytes)),
    ];
    let (result, ran) = w.run(names::MASK_FILL, &[], &args, [1, 1, 1], [1, 1, 1]);
    assert!(
        matches!(result, Err(MlxError::InvalidArgument(_))),
        "{result:?}"
    );
    assert_eq!(ran, 0);
}
