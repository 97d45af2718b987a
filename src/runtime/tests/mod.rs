//! Buffers, encoder and registry on the CPU device, small enough for miri.

mod checks;
mod commands;
mod copies;
mod guards;
mod turns;

use half::bf16;

use super::buffer::MlxBuffer;
use super::device::MlxDevice;
use super::encoder::{CapturedNode, CapturedOpKind, CommandEncoder, KernelArg, MTLSize, as_bytes};
use super::registry::{KernelRegistry, Pipeline};
use crate::backend::access::Access;
use crate::backend::cpu::CpuOptions;
use crate::backend::metal::bindings::{constant, names};
use crate::backend::shared_params::{BlkParamsGpu, MaskFillParamsGpu};
use crate::{DType, MlxError};

fn device() -> MlxDevice {
    MlxDevice::cpu(CpuOptions::default()).unwrap()
}

fn u8s(device: &MlxDevice, n: u8) -> MlxBuffer {
    let data: Vec<u8> = (0..n).collect();
    device
        .buffer_from_slice(&data, DType::U8, vec![n.into()])
        .unwrap()
}

fn fill_params(rows: u32, keys: u32) -> MaskFillParamsGpu {
    MaskFillParamsGpu {
        seq_len_q: rows,
        seq_len_k: keys,
        window: 0,
        causal: 1,
        q_abs_offset: 0,
    }
}

/// Encodes a causal fill of `keys` keys a row into `mask`, whatever its size.
fn fill(encoder: &mut CommandEncoder, device: &MlxDevice, mask: &MlxBuffer, rows: u32, keys: u32) {
    let mut registry = KernelRegistry::new();
    let pipeline = registry
        .get_pipeline(names::MASK_FILL, device.metal_device())
        .unwrap();
    let params = fill_params(rows, keys);
    let args = [
        (0, KernelArg::Buffer(mask)),
        (1, KernelArg::Bytes(as_bytes(&params))),
    ];
    let grid = MTLSize::new(rows.into(), 1, 1);
    encoder.encode_threadgroups_with_args(pipeline, &args, grid, MTLSize::new(1, 1, 1));
}

/// Encodes the classes of a mask's cells, each a tile of its own.
fn classify(
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    mask: &MlxBuffer,
    classes: &MlxBuffer,
    rows: u32,
    keys: u32,
) {
    let mut registry = KernelRegistry::new();
    let ints = [(constant::BLK_BQ, 1), (constant::BLK_BK, 1)];
    let pipeline = registry
        .get_pipeline_with_constants(names::BLK, device.metal_device(), &[], &ints)
        .unwrap();
    let params = BlkParamsGpu {
        seq_len_q: rows,
        seq_len_k: keys,
        nq: rows,
        nk: keys,
        row_stride: keys.into(),
    };
    let args = [
        (0, KernelArg::Buffer(mask)),
        (1, KernelArg::Buffer(classes)),
        (2, KernelArg::Bytes(as_bytes(&params))),
    ];
    let grid = MTLSize::new(keys.into(), rows.into(), 1);
    encoder.encode_threadgroups_with_args(pipeline, &args, grid, MTLSize::new(32, 1, 1));
}

fn mask(device: &MlxDevice, cells: usize) -> MlxBuffer {
    device
        .alloc_buffer(cells * 2, DType::BF16, vec![cells])
        .unwrap()
}

#[test]
fn everything_can_cross_threads() {
    fn check<T: Send + Sync>() {}
    check::<MlxBuffer>();
    check::<MlxDevice>();
    check::<KernelRegistry>();
    check::<Pipeline>();
    check::<CommandEncoder>();
    check::<CapturedNode>();
    check::<MlxError>();
}

#[test]
fn views_are_exact_to_the_byte() {
    let whole = u8s(&device(), 20);
    let view = whole.slice_view(4, 8);
    let inner = view.subview(3, 2);
    assert_eq!((view.byte_len(), view.byte_offset()), (8, 4));
    assert_eq!((view.element_count(), view.shape()), (8, &[8][..]));
    assert_eq!(view.as_slice::<u8>().unwrap(), [4, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(inner.byte_offset(), 7);
    assert_eq!(inner.as_slice::<u8>().unwrap(), [7, 8]);
    assert_eq!(view.as_slice::<u32>().unwrap().len(), 2);
    assert!(!whole.contents_ptr().is_null());
    assert_eq!(whole.slice_view(0, 3).contents_ptr(), whole.contents_ptr());
    // To the very end and no further; an empty view at the end is a view.
    assert_eq!(whole.slice_view(12, 8).as_slice::<u8>().unwrap()[7], 19);
    assert_eq!(whole.slice_view(20, 0).as_slice::<u8>().unwrap().len(), 0);
}

#[test]
fn views_out_of_bounds_are_refused_wherever_they_are_used() {
    let whole = u8s(&device(), 20);
    for (offset, n) in [(13, 8), (21, 0), (u64::MAX, 1), (0, usize::MAX), (20, 1)] {
        let view = whole.slice_view(offset, n);
        let error = view.as_slice::<u8>().unwrap_err().to_string();
        assert!(error.contains("slice_view"), "{error}");
        assert_eq!((view.byte_len(), view.element_count()), (0, 0));
        assert!(view.contents_ptr().is_null());
        // A view of it does not make it whole again.
        assert!(view.slice_view(0, 0).as_slice::<u8>().is_err());
    }
}

/// `mlx-native` counts these from the allocation, the view's own would be as plausible: neither is taken.
#[test]
fn an_offset_into_a_view_that_starts_further_on_is_refused() {
    let device = device();
    let whole = u8s(&device, 40);
    let view = whole.slice_view(4, 8);
    let words = ["ambiguous", "byte 4", "byte 0", "subview"];
    let refused = |error: MlxError| {
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    for offset in [0, 4] {
        let inner = view.slice_view(offset, 2);
        assert_eq!((inner.byte_len(), inner.element_count()), (0, 0));
        refused(inner.as_slice::<u8>().unwrap_err());
        refused(inner.subview(0, 0).as_slice::<u8>().unwrap_err());
    }
    assert!(view.contents_ptr().is_null());
    assert_eq!(view.subview(4, 2).as_slice::<u8>().unwrap(), [8, 9]);
    assert!(view.subview(7, 2).as_slice::<u8>().is_err());
    // A view from the start is where both readings agree.
    let head = whole.slice_view(0, 8);
    assert_eq!(head.slice_view(4, 2).as_slice::<u8>().unwrap(), [4, 5]);

    let (mask, size) = (mask(&device, 12), MTLSize::new(1, 1, 1));
    let tail = mask.slice_view(12, 6);
    let params = fill_params(1, 2);
    let mut registry = KernelRegistry::new();
    let pipeline = registry
        .get_pipeline(names::MASK_FILL, device.metal_device())
        .unwrap();
    let run = |out: KernelArg<'_>| {
        let mut encoder = device.command_encoder().unwrap();
        let args = [(0, out), (1, KernelArg::Bytes(as_bytes(&params)))];
        encoder.encode_threadgroups_with_args(pipeline, &args, size, size);
        encoder.commit_and_wait()
    };
    for offset in [0, 4] {
        let error = run(KernelArg::BufferWithOffset(&tail, offset)).unwrap_err();
        let error = error.to_string();
        let words = ["BufferWithOffset", "byte 12", "ambiguous"];
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let cells = || mask.as_slice::<u16>().unwrap().to_vec();
    assert_eq!(cells(), [0; 12]);
    run(KernelArg::Buffer(&tail.subview(4, 2))).unwrap();
    run(KernelArg::BufferWithOffset(&mask, 4)).unwrap();
    assert_eq!(cells(), [0, 0, 0, 0xff80, 0, 0, 0, 0, 0, 0xff80, 0, 0]);
}

#[test]
fn misaligned_and_partial_elements_are_refused() {
    let whole = u8s(&device(), 20);
    assert!(whole.slice_view(1, 4).as_slice::<u32>().is_err());
    assert!(whole.slice_view(0, 6).as_slice::<u32>().is_err());
    assert!(whole.slice_view(2, 4).as_slice::<u16>().is_ok());
}

#[test]
fn a_mutable_slice_needs_the_only_handle() {
    let mut buffer = u8s(&device(), 8);
    buffer.as_mut_slice::<u8>().unwrap()[0] = 9;
    let clone = buffer.clone();
    assert!(buffer.as_mut_slice::<u8>().is_err());
    assert_eq!(clone.as_slice::<u8>().unwrap()[0], 9);
    drop(clone);
    let view = buffer.slice_view(0, 1);
    assert!(buffer.as_mut_slice::<u8>().is_err());
    drop(view);
    buffer.as_mut_slice::<u8>().unwrap()[0] = 10;
}

#[test]
fn host_access_waits_for_encoded_writes() {
    let device = device();
    let mut out = mask(&device, 6);
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &out, 2, 3);
    assert!(out.as_slice::<bf16>().is_err());
    assert!(out.as_mut_slice::<bf16>().is_err());
    encoder.commit();
    encoder.wait_until_completed().unwrap();
    let (hidden, seen) = (bf16::NEG_INFINITY, bf16::ZERO);
    assert_eq!(
        out.as_slice::<bf16>().unwrap(),
        [seen, hidden, hidden, seen, seen, hidden]
    );
    out.as_mut_slice::<bf16>().unwrap()[0] = bf16::ONE;

    // An encoder that goes away without a commit releases what it recorded.
    fill(&mut encoder, &device, &out, 2, 3);
    assert!(out.as_slice::<bf16>().is_err());
    drop(encoder);
    assert_eq!(out.as_slice::<bf16>().unwrap()[0], bf16::ONE);
}

#[test]
fn what_cannot_be_encoded_is_reported_by_the_commit_and_runs_nothing() {
    let device = device();
    let (good, small) = (mask(&device, 6), mask(&device, 6));
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &good, 2, 3);
    fill(&mut encoder, &device, &small.slice_view(11, 6), 2, 3);
    assert!(encoder.commit_and_wait().is_err());
    assert!(encoder.wait_until_completed().is_err(), "the same answer");
    assert!(
        good.as_slice::<u8>().unwrap().iter().all(|b| *b == 0),
        "nothing ran"
    );
    // The encoder is usable again.
    fill(&mut encoder, &device, &good, 2, 3);
    encoder.commit_and_wait().unwrap();
    assert_eq!(good.as_slice::<u16>().unwrap()[1], 0xff80);
}

#[test]
fn a_failure_that_nobody_waited_for_is_reported_by_the_next_wait() {
    let device = device();
    let (good, small) = (mask(&device, 6), mask(&device, 2));
    let mut encoder = device.command_encoder().unwrap();
    fill(&mut encoder, &device, &small, 2, 3);
    encoder.commit();
    fill(&mut encoder, &device, &good, 2, 3);
    assert!(encoder.commit_and_wait().is_err());
    // Once told, it is over.
    fill(&mut encoder, &device, &good, 2, 3);
    encoder.commit_and_wait().unwrap();
}

#[test]
fn a_commit_of_nothing_is_fine_and_times_do_not_run_backwards() {
    let device = device();
    let mut encoder = device.command_encoder().unwrap();
    encoder.wait_until_completed().unwrap();
    let (start, end) = encoder.commit_wait_with_gpu_time().unwrap();
    assert!(start <= end);
}

#[test]
fn barriers_stand_where_one_dispatch_touches_what_another_wrote() {
    let device = device();
    let whole = mask(&device, 12);
    let (a, b) = (whole.slice_view(0, 6), whole.slice_view(12, 6));
    let mut encoder = device.command_encoder().unwrap();
    assert!(!encoder.is_capturing() && encoder.take_capture().is_none());
    encoder.start_capture();
    encoder.memory_barrier();
    encoder.set_op_kind(CapturedOpKind::Softmax);
    fill(&mut encoder, &device, &a, 2, 3);
    fill(&mut encoder, &device, &b, 2, 3);
    fill(&mut encoder, &device, &whole.slice_view(10, 4), 2, 2);
    encoder.memory_barrier();
    encoder.memory_barrier();
    fill(&mut encoder, &device, &a, 1, 1);
    assert!(encoder.is_capturing());
    let nodes = encoder.take_capture().unwrap();
    assert!(!encoder.is_capturing());
    let kinds: String = nodes
        .iter()
        .map(|node| match node {
            CapturedNode::Barrier => '|',
            CapturedNode::Dispatch(_) => 'd',
        })
        .collect();
    assert_eq!(kinds, "dd|d|d");
    let CapturedNode::Dispatch(first) = &nodes[0] else {
        unreachable!()
    };
    assert_eq!(first.kernel(), names::MASK_FILL);
    assert_eq!(first.op_kind(), CapturedOpKind::Softmax);
    let raw = first.raw().unwrap();
    assert_eq!(raw.grid(), MTLSize::new(2, 1, 1));
    assert_eq!(raw.threadgroup(), MTLSize::new(1, 1, 1));
    assert!(raw.constants().bools().is_empty());
    assert_eq!(first.buffers().count(), 1);
    let (index, binding) = &raw.bindings()[0];
    assert_eq!(*index, 0);
    assert!(matches!(
        binding,
        super::capture::CapturedBinding::Buffer(buffer, Access::Write) if buffer.byte_len() == 12
    ));

    // A capture runs nothing; a replay does, as often as wanted.
    encoder.commit_and_wait().unwrap();
    drop(nodes.clone());
    let bits = || whole.as_slice::<u16>().unwrap().to_vec();
    assert_eq!(bits(), [0; 12]);
    encoder.replay(&nodes).unwrap();
    encoder.replay(&nodes).unwrap();
    encoder.commit_and_wait().unwrap();
    let h = 0xff80;
    assert_eq!(bits(), [0, h, h, 0, 0, 0, h, 0, 0, 0, 0, h]);
}

#[test]
fn pipelines_are_built_once_and_shared_by_clones() {
    let device = device();
    let mut registry = KernelRegistry::new();
    let known = registry.source_count();
    let name = "flash_attn_prefill_bf16_d64";
    assert_eq!(registry.cached_count(), 0);
    assert!(!registry.is_cached(name));
    assert!(matches!(
        registry.get_pipeline("no such kernel", device.metal_device()),
        Err(MlxError::KernelNotFound(n)) if n == "no such kernel"
    ));
    let mut clone = registry.clone();
    let first = registry
        .get_pipeline_with_bool_constants(name, device.metal_device(), &[(300, true), (301, false)])
        .unwrap()
        .clone();
    // Another order, false spelled out or left out, another handle: the same pipeline.
    let second = clone
        .get_pipeline_with_constants(
            name,
            device.metal_device(),
            &[(200, false), (300, true)],
            &[],
        )
        .unwrap();
    assert!(std::sync::Arc::ptr_eq(first.kernel(), second.kernel()));
    assert_eq!((registry.cached_count(), clone.cached_count()), (1, 1));
    assert!(registry.is_cached(name) && clone.is_cached(name));
    for (key, there) in [
        ("|300:b1", true),
        ("|300:b1|301:b0", true),
        ("|301:b0|200:b0|300:b1", true),
        ("|300:b0", false),
        ("|300:b1|301:b1", false),
        ("|300:i1", false),
        ("|300:b1|322:i8", false),
        ("|", false),
        ("|300", false),
        ("|300:b2", false),
    ] {
        assert_eq!(registry.is_cached(&format!("{name}{key}")), there, "{key}");
    }
    assert_eq!(first.label(), name);
    assert_eq!(first.thread_execution_width(), 32);
    assert_eq!(first.max_total_threads_per_threadgroup(), 128);
    assert_eq!(first.static_threadgroup_memory_length(), 0);

    // The same text again changes nothing; another text drops what was built from the old one.
    let text = crate::ops::flash_attn_prefill::FLASH_ATTN_PREFILL_SHADER_SOURCE;
    registry.register_source(name, text);
    assert_eq!(registry.cached_count(), 1);
    registry.register_source(name, "another text");
    assert_eq!((registry.cached_count(), clone.cached_count()), (0, 1));
    registry.register_source("mine", "a text");
    assert_eq!(registry.source_count(), known + 1);
    assert!(matches!(
        registry.get_pipeline("mine", device.metal_device()),
        Err(MlxError::ShaderCompilationError { name, .. }) if name == "mine"
    ));
}

#[test]
fn devices_do_not_share_pipelines() {
    let mut registry = KernelRegistry::new();
    for device in [device(), device()] {
        registry
            .get_pipeline(names::BLK, device.metal_device())
            .unwrap();
        registry
            .get_pipeline(names::BLK, device.clone().metal_device())
            .unwrap();
    }
    assert_eq!(registry.cached_count(), 2);
}

#[test]
fn allocations_that_cannot_be_are_errors() {
    let device = device();
    let alloc = |bytes, shape: &[usize]| device.alloc_buffer(bytes, DType::F32, shape.to_vec());
    assert!(matches!(alloc(0, &[]), Err(MlxError::InvalidArgument(_))));
    assert!(matches!(alloc(4, &[2]), Err(MlxError::InvalidArgument(_))));
    assert!(alloc(usize::MAX, &[usize::MAX, 2]).is_err());
    assert!(matches!(
        alloc(isize::MAX as usize, &[1]),
        Err(MlxError::BufferAllocationError { .. })
    ));
    let buffer = alloc(8, &[2]).unwrap();
    assert_eq!(buffer.as_slice::<f32>().unwrap(), [0.0; 2]);
    assert_eq!((buffer.element_count(), buffer.dtype()), (2, DType::F32));
    assert!(
        device
            .buffer_from_slice(&[1u8], DType::F32, vec![1])
            .is_err()
    );
}

#[test]
fn wrapped_memory_is_the_callers_own() {
    let device = device();
    let mut cells = vec![1_u16; 12];
    let base = cells.as_mut_ptr();
    // SAFETY: `cells` outlives what wraps it, and is used again only after the command.
    let wrap = |base: *mut u16, bytes, dtype, shape| unsafe {
        device.host_wrap(base.cast(), bytes, dtype, shape)
    };
    for (base, bytes, dtype) in [
        (base, 23, DType::BF16),
        (std::ptr::null_mut(), 24, DType::BF16),
        (base.cast::<u8>().wrapping_add(1).cast(), 22, DType::BF16),
    ] {
        let refused = wrap(base, bytes, dtype, vec![bytes.div_ceil(2)]);
        assert!(matches!(refused, Err(MlxError::InvalidArgument(_))));
    }
    let whole = wrap(base, 24, DType::BF16, vec![12]).unwrap();
    let mut encoder = device.command_encoder().unwrap();
    // Rows of 3 keys, below and above the diagonal, between two cells that stay as they are.
    fill(&mut encoder, &device, &whole.slice_view(2, 9), 3, 3);
    encoder.commit_and_wait().unwrap();
    drop((encoder, whole));
    let (open, shut) = (0, bf16::NEG_INFINITY.to_bits());
    assert_eq!(
        cells,
        [
            1, open, shut, shut, open, open, shut, open, open, open, 1, 1
        ]
    );
}
