//! The Metal device on a Mac: `cargo test --test metal -- --ignored`. Elsewhere these tests are
//! type-checked only.
#![cfg(all(feature = "metal", target_vendor = "apple"))]
// The lint's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use mlx_flash_attn::attention::{Problem, Shape};
use mlx_flash_attn::metal::objc2::rc::Retained;
use mlx_flash_attn::metal::objc2::runtime::ProtocolObject;
use mlx_flash_attn::metal::objc2_metal::{
    MTLBuffer, MTLCommandBuffer, MTLCommandEncoder, MTLCommandQueue, MTLComputeCommandEncoder,
    MTLComputePipelineState, MTLCreateSystemDefaultDevice, MTLDevice, MTLDispatchType,
    MTLResourceOptions, MTLSize,
};
use mlx_flash_attn::metal::{Access, ComputeTarget, DirectTarget};
use mlx_flash_attn::ops::flash_attn_prefill_mask::{SdpaMaskParams, build_sdpa_mask_bf16};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxBuffer, MlxDevice, MlxError};

const HEADS: usize = 2;
const LENGTH: usize = 50;
const DIM: usize = 64;
const ELEMENTS: usize = HEADS * LENGTH * DIM;

/// An engine's target: it finds hazards from the bindings, and writes down what it was told.
struct Engine<'a> {
    direct: DirectTarget<'a>,
    written: usize,
    dispatched: Vec<String>,
}

impl ComputeTarget for Engine<'_> {
    fn set_pipeline(&mut self, pipeline: &ProtocolObject<dyn MTLComputePipelineState>) {
        self.direct.set_pipeline(pipeline);
    }

    fn set_buffer(
        &mut self,
        index: usize,
        buffer: &ProtocolObject<dyn MTLBuffer>,
        offset: usize,
        access: Access,
    ) {
        self.written += usize::from(access.writes());
        self.direct.set_buffer(index, buffer, offset, access);
    }

    fn set_bytes(&mut self, index: usize, bytes: &[u8]) {
        self.direct.set_bytes(index, bytes);
    }

    fn barrier(&mut self) {
        self.direct.barrier();
    }

    fn dispatch(&mut self, kernel: &str, grid: MTLSize, threadgroup: MTLSize) {
        self.dispatched.push(kernel.into());
        self.direct.dispatch(kernel, grid, threadgroup);
    }
}

fn problem() -> Problem {
    let shape = Shape {
        batch: 1,
        heads: HEADS,
        kv_heads: HEADS,
        query_len: LENGTH,
        key_len: LENGTH,
        qk_dim: DIM,
        v_dim: DIM,
    };
    Problem::builder(DType::F16, shape)
        .causal(true)
        .build()
        .unwrap()
}

fn values(seed: usize) -> Vec<f16> {
    (0..ELEMENTS)
        .map(|i| f16::from_f32(((i * 7 + seed * 13) as f32 * 0.61).sin() * 2.0))
        .collect()
}

fn operands(device: &MlxDevice) -> [MlxBuffer; 3] {
    [1, 2, 3].map(|seed| {
        device
            .buffer_from_slice(&values(seed), DType::F16, vec![1, HEADS, LENGTH, DIM])
            .unwrap()
    })
}

fn output(device: &MlxDevice) -> MlxBuffer {
    device
        .alloc_buffer(ELEMENTS * 2, DType::F16, vec![1, HEADS, LENGTH, DIM])
        .unwrap()
}

/// Attention by a device's own encoder.
fn committed(device: &MlxDevice) -> Vec<f16> {
    let out = output(device);
    let [q, k, v] = operands(device);
    let mut encoder = device.command_encoder().unwrap();
    let operands = Operands::new(&q, &k, &v, &out);
    ops::attention(&mut encoder, &problem(), &operands).unwrap();
    let (start, end) = encoder.commit_wait_with_gpu_time().unwrap();
    assert!(end >= start);
    out.as_slice().unwrap().to_vec()
}

#[test]
#[ignore = "needs an Apple GPU"]
fn attention_agrees_with_the_cpu() {
    let metal = committed(&MlxDevice::open(DeviceKind::Metal).unwrap());
    let cpu = committed(&MlxDevice::open(DeviceKind::Cpu).unwrap());
    for (i, (a, b)) in metal.iter().zip(&cpu).enumerate() {
        let (a, b) = (a.to_f32(), b.to_f32());
        assert!((a - b).abs() <= 4e-3, "element {i}: {a} and {b}");
    }
}

#[test]
#[ignore = "needs an Apple GPU"]
fn a_mask_has_the_cpus_bits() {
    let mask = |kind| -> Vec<bf16> {
        let device = MlxDevice::open(kind).unwrap();
        let mut encoder = device.command_encoder().unwrap();
        let params = SdpaMaskParams {
            seq_len_q: 33,
            seq_len_k: 47,
            window_size: Some(9),
            causal: true,
            q_abs_offset: 14,
        };
        let mut registry = mlx_flash_attn::KernelRegistry::new();
        let mask = build_sdpa_mask_bf16(&device, &mut registry, &mut encoder, &params).unwrap();
        encoder.commit_and_wait().unwrap();
        mask.as_slice().unwrap().to_vec()
    };
    assert_eq!(mask(DeviceKind::Metal), mask(DeviceKind::Cpu));
}

#[test]
#[ignore = "needs an Apple GPU"]
fn an_engines_encoder_and_buffers_give_the_same_bits() {
    let raw = MTLCreateSystemDefaultDevice().unwrap();
    let device = MlxDevice::from_metal_device(raw.clone()).unwrap();
    let options = MTLResourceOptions::StorageModeShared;
    let theirs: Retained<ProtocolObject<dyn MTLBuffer>> = raw
        .newBufferWithLength_options(ELEMENTS * 2, options)
        .unwrap();
    // SAFETY: nothing else uses the buffer while `out` lives.
    let out = unsafe {
        device
            .metal_wrap_buffer(&theirs, DType::F16, vec![1, HEADS, LENGTH, DIM])
            .unwrap()
    };

    let mut encoder = device.command_encoder().unwrap();
    let [q, k, v] = operands(&device);
    let operands = Operands::new(&q, &k, &v, &out);
    ops::attention(&mut encoder, &problem(), &operands).unwrap();

    let queue = raw.newCommandQueue().unwrap();
    let command = queue.commandBuffer().unwrap();
    let compute = command
        .computeCommandEncoderWithDispatchType(MTLDispatchType::Concurrent)
        .unwrap();
    let compute: &ProtocolObject<dyn MTLComputeCommandEncoder> = &compute;
    let mut engine = Engine {
        // SAFETY: the encoder is open, this thread's alone, and its command buffer retains buffers.
        direct: unsafe { DirectTarget::new(compute) },
        written: 0,
        dispatched: Vec::new(),
    };
    // SAFETY: the engine passes every call on; the result is dropped after the command completed.
    let in_flight = unsafe { encoder.encode_into(&mut engine).unwrap() };
    assert_eq!(engine.written, 1);
    assert_eq!(engine.dispatched, ["flash_attn_prefill_f16_d64"]);
    compute.endEncoding();
    command.commit();
    assert!(matches!(
        out.as_slice::<f16>(),
        Err(MlxError::InvalidArgument(_))
    ));
    command.waitUntilCompleted();
    drop(in_flight);
    assert_eq!(out.as_slice::<f16>().unwrap(), committed(&device));
}
