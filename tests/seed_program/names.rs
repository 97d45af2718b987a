//! What a program can name besides the dispatchers: the crate root, raw dispatches in each of the
//! encoder's ways, kernels' names and texts, captures, ranges of memory.

use mlx_flash_attn as mlx_native;
use mlx_native::ops::encode_helpers::{self, as_bytes};
use mlx_native::ops::flash_attn_prefill::{
    AttnParamsGpu, FLASH_ATTN_PREFILL_SHADER_SOURCE, FlashAttnPrefillParams,
    dispatch_flash_attn_prefill_bf16_d64, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_native::ops::flash_attn_prefill_blk::{
    BlkParams, FLASH_ATTN_PREFILL_BLK_SHADER_SOURCE, K_BLK_BF16, alloc_blk_buffer,
    dispatch_flash_attn_prefill_blk,
};
use mlx_native::ops::flash_attn_prefill_d512::{
    self, FLASH_ATTN_PREFILL_D512_SHADER_SOURCE, K_LLAMACPP_BF16_D512,
    K_LLAMACPP_BF16_D512_BOOLMASK, K_LLAMACPP_F16_D512, K_LLAMACPP_F16_D512_BOOLMASK,
};
use mlx_native::ops::flash_attn_prefill_mask::{
    FLASH_ATTN_PREFILL_MASK_SHADER_SOURCE, K_FILL_BF16,
};
use mlx_native::ops::flash_attn_vec::FLASH_ATTN_VEC_SHADER_SOURCE;
use mlx_native::{
    BufferRange, CapturedNode, DType, KernelArg, KernelRegistry, MTLSize, MemRangeRole, MemRanges,
    MlxBuffer, MlxDevice, MlxError, Result,
};

use crate::call::{Call, Dispatcher, Program};
use crate::common::{self, Qkv, shape};

const D64: Dispatcher = Dispatcher::MaskLayout(dispatch_flash_attn_prefill_bf16_d64);
const D256_BLK: Dispatcher = Dispatcher::MaskBlk(dispatch_flash_attn_prefill_bf16_d256_with_blk);
const K_BF16_D64: &str = "flash_attn_prefill_bf16_d64";
/// Elements before K in its buffer.
const PAD: usize = 64;

fn prefill(head_dim: u32, causal: bool) -> FlashAttnPrefillParams {
    FlashAttnPrefillParams {
        n_heads: 4,
        n_kv_heads: 2,
        head_dim,
        seq_len_q: 37,
        seq_len_k: 45,
        batch: 1,
        scale: 1.0 / (head_dim as f32).sqrt(),
        do_causal: causal,
    }
}

/// What [`prefill`] says at head dim 64, as the kernel reads it.
fn raw_params() -> AttnParamsGpu {
    let (q_strides, k_strides) = ([4 * 37 * 64, 37 * 64, 64], [2 * 45 * 64, 45 * 64, 64]);
    AttnParamsGpu {
        b: 1,
        h: 4,
        d: 64,
        ql: 37,
        kl: 45,
        gqa_factor: 2,
        scale: 0.125,
        softcapping: 1.0,
        nq: 2,
        nk: 3,
        nq_aligned: 1,
        nk_aligned: 2,
        ql_rem: 5,
        kl_rem: 13,
        ql_off: 0,
        _pad: 0,
        q_strides,
        k_strides,
        v_strides: k_strides,
        o_strides: q_strides,
    }
}

/// Q, K after [`PAD`] elements, K alone, V, each from the start of its buffer.
fn inputs(device: &MlxDevice, head_dim: usize) -> [MlxBuffer; 4] {
    let data = Qkv::new(62, DType::BF16, shape([1, 4, 2], (37, 45), head_dim));
    let padded = [&vec![f32::NAN; PAD], &data.k[..]].concat();
    [&data.q, &padded, &data.k, &data.v].map(|x| common::upload(device, x, DType::BF16, &[x.len()]))
}

#[test]
fn every_way_to_encode_a_dispatch_gives_the_dispatchers_bits() -> Result<()> {
    for device in common::devices() {
        let [q, padded, k, v] = inputs(&device, 64);
        let output = || common::output(&device, 4 * 37 * 64, DType::BF16);
        let want = output();
        let mut program = Program::new(&device);
        let call = prefill(64, true);
        program.prefill(D64, &Call::new([&q, &k, &v, &want], &call))?;
        program.encoder.commit_and_wait()?;
        let mut registry = program.registry;
        let want = common::bytes(&want);

        let params = raw_params();
        let mut stored = device.alloc_buffer(size_of_val(&params), DType::U8, vec![160])?;
        stored
            .as_mut_slice::<u8>()?
            .copy_from_slice(as_bytes(&params));
        let bools = [(200, false), (201, false), (300, false), (301, true)];
        let (groups, threads) = (MTLSize::new(2, 4, 1), MTLSize::new(32, 4, 1));
        let grid = MTLSize::new(64, 16, 1);
        let shared = [(0, 7_680)];
        for way in 0..13 {
            let out = output();
            let buffers = [(0, &q), (1, &k), (2, &v), (3, &out), (4, &stored)];
            let args = [
                (0, KernelArg::Buffer(&q)),
                (1, KernelArg::BufferWithOffset(&padded, 2 * PAD as u64)),
                (2, KernelArg::Buffer(&v)),
                (3, KernelArg::Buffer(&out)),
                (4, KernelArg::Bytes(as_bytes(&params))),
            ];
            let (reads, writes) = ([&q, &k, &v], [&out]);
            let metal = device.metal_device();
            let p = registry.get_pipeline_with_bool_constants(K_BF16_D64, metal, &bools)?;
            assert_eq!(p.label(), K_BF16_D64);
            let mut e = device.command_encoder()?;
            match way {
                0 => e.encode(p, &buffers, grid, threads),
                1 => e.encode_with_args(p, &args, grid, threads),
                2 => e.encode_threadgroups(p, &buffers, groups, threads),
                3 => e.encode_threadgroups_with_args(p, &args, groups, threads),
                4 => e.encode_threadgroups_with_shared(p, &buffers, &shared, groups, threads),
                5 => e.encode_threadgroups_with_args_and_shared(p, &args, &shared, groups, threads),
                6 => e.dispatch_tracked_threadgroups(p, &buffers, &reads, &writes, groups, threads),
                7 => e.dispatch_tracked_threadgroups_with_args(
                    p, &args, &reads, &writes, groups, threads,
                ),
                8 => e.dispatch_tracked_threadgroups_with_args_and_shared(
                    p, &args, &shared, &reads, &writes, groups, threads,
                ),
                9 => e.dispatch_tracked_threads_with_args(p, &args, &reads, &writes, grid, threads),
                10 => encode_helpers::encode_with_args(&mut e, p, &args, grid, threads),
                11 => e.dispatch_tracked_threadgroups_with_shared(
                    p, &buffers, &shared, &reads, &writes, groups, threads,
                ),
                _ => {
                    encode_helpers::encode_threadgroups_with_args(&mut e, p, &args, groups, threads)
                }
            }
            match way % 2 {
                0 => e.commit_and_wait_labeled("attention")?,
                _ => {
                    e.commit_labeled("attention");
                    e.wait_until_completed()?;
                }
            }
            assert_eq!(common::bytes(&out), want, "way {way}");
        }

        // A part of a threadgroup runs nowhere.
        let out = output();
        let buffers = [(0, &q), (1, &k), (2, &v), (3, &out), (4, &stored)];
        let p =
            registry.get_pipeline_with_bool_constants(K_BF16_D64, device.metal_device(), &bools)?;
        let mut e = device.command_encoder()?;
        e.encode(p, &buffers, MTLSize::new(63, 16, 1), threads);
        let error = e.commit_and_wait().unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(K_BF16_D64) && text.contains("multiple of the threadgroup, 32"),
            "{text}"
        );
        assert!(!error.is_transient());
    }
    Ok(())
}

#[test]
fn an_error_of_the_device_says_which_labelled_command_failed() -> Result<()> {
    let device = MlxDevice::new()?;
    let mut registry = KernelRegistry::new();
    let small = device.alloc_buffer(2, DType::BF16, vec![1])?;
    let params = raw_params();
    let p = registry.get_pipeline(K_BF16_D64, device.metal_device())?;
    let mut e = device.command_encoder()?;
    let args = [
        (0, KernelArg::Buffer(&small)),
        (4, KernelArg::Bytes(as_bytes(&params))),
    ];
    let size = MTLSize::new(2, 4, 1);
    e.encode_threadgroups_with_args(p, &args, size, MTLSize::new(32, 4, 1));
    match e.commit_and_wait_labeled("layer 7") {
        Err(MlxError::CommandBufferError(text)) => assert!(text.starts_with("layer 7: "), "{text}"),
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn pipelines_are_found_by_name_and_by_name_with_constants() -> Result<()> {
    let device = MlxDevice::new()?;
    let mut registry = KernelRegistry::new();
    let texts = [
        (K_BF16_D64, FLASH_ATTN_PREFILL_SHADER_SOURCE),
        (K_LLAMACPP_BF16_D512, FLASH_ATTN_PREFILL_D512_SHADER_SOURCE),
        (K_BLK_BF16, FLASH_ATTN_PREFILL_BLK_SHADER_SOURCE),
        (K_FILL_BF16, FLASH_ATTN_PREFILL_MASK_SHADER_SOURCE),
    ];
    for (name, text) in texts {
        assert!(text.contains("kernel"), "{name}");
        registry.register_source(name, text);
        registry.get_pipeline(name, device.metal_device())?;
        assert!(registry.is_cached(name));
    }
    assert!(FLASH_ATTN_VEC_SHADER_SOURCE.contains("kernel"));
    let wide = [
        K_LLAMACPP_BF16_D512,
        K_LLAMACPP_BF16_D512_BOOLMASK,
        K_LLAMACPP_F16_D512,
        K_LLAMACPP_F16_D512_BOOLMASK,
    ];
    assert_eq!(flash_attn_prefill_d512::ALL_KERNEL_NAMES, wide);
    for name in wide {
        let bools = [(300, true), (301, false)];
        let metal = device.metal_device();
        let p = registry.get_pipeline_with_constants(name, metal, &bools, &[(322, 4)])?;
        assert_eq!(p.label(), name);
        assert!(registry.is_cached(&format!("{name}|300:b1|301:b0|322:i4")));
        assert!(!registry.is_cached(&format!("{name}|300:b0|301:b0|322:i4")));
        assert!(!registry.is_cached(&format!("{name}|300:b1|301:b0|322:i8")));
    }
    Ok(())
}

#[test]
fn captures_and_ranges_say_what_runs_side_by_side() -> Result<()> {
    let device = MlxDevice::new()?;
    let [q, _, k, v] = inputs(&device, 64);
    let (one, two) = (
        common::output(&device, 4 * 37 * 64, DType::BF16),
        common::output(&device, 4 * 37 * 64, DType::BF16),
    );
    let mut program = Program::new(&device);
    assert_eq!(program.encoder.mem_ranges_len(), 0);
    program.encoder.start_capture();
    let params = prefill(64, false);
    let attend = |program: &mut Program<'_>, out: &MlxBuffer| {
        program.prefill(D64, &Call::new([&q, &k, &v, out], &params))
    };
    attend(&mut program, &one)?;
    attend(&mut program, &two)?;
    let touched = program.encoder.mem_ranges_len();
    assert_eq!(touched, 8, "three inputs and an output each");
    program.encoder.force_barrier_and_reset_tracker();
    assert_eq!(program.encoder.mem_ranges_len(), 0);
    attend(&mut program, &one)?;
    attend(&mut program, &one)?;
    let nodes = program.encoder.take_capture().unwrap_or_default();
    let kinds = nodes.iter().map(|node| match node {
        CapturedNode::Dispatch { .. } => 'd',
        CapturedNode::Barrier => '|',
    });
    assert_eq!(kinds.collect::<String>(), "dd|d|d");

    let mut ranges = MemRanges::new();
    ranges.add_dispatch(&[&q, &k, &v], &[&one]);
    assert!(ranges.check_dispatch(&[&q, &k, &v], &[&two]));
    assert!(!ranges.check_dispatch(&[&one], &[&two]));
    assert_eq!(
        (ranges.len(), ranges.checks(), ranges.barriers_forced()),
        (4, 2, 1)
    );
    assert!(!ranges.check_and_record(&[&one], &[&two]) && ranges.len() == 4);
    assert!(ranges.check_and_record(&[&q], &[&two]) && ranges.len() == 6);
    ranges.reset();
    ranges.push(BufferRange::from_buffer(&one, MemRangeRole::Src));
    assert!(!ranges.is_empty() && ranges.check_dispatch(&[&one], &[]));
    Ok(())
}

#[test]
fn tile_classes_go_with_the_rank_4_mask_of_a_single_head() -> Result<()> {
    for device in common::devices() {
        let [q, _, k, v] = inputs(&device, 256);
        let params = FlashAttnPrefillParams {
            n_heads: 1,
            n_kv_heads: 1,
            ..prefill(256, false)
        };
        let cells: Vec<f32> = (0..37 * 45)
            .map(|c| match (c % 45) / 5 == (c / 45) / 9 {
                true => 0.0,
                false => f32::NEG_INFINITY,
            })
            .collect();
        let run = |rank: &[usize], classes: bool| -> Result<Vec<u8>> {
            let mask = common::upload(&device, &cells, DType::BF16, rank);
            let tiles = BlkParams {
                seq_len_q: 37,
                seq_len_k: 45,
                bq: 32,
                bk: 16,
            };
            let blk = alloc_blk_buffer(&device, &tiles)?;
            let out = common::output(&device, 37 * 256, DType::BF16);
            let mut program = Program::new(&device);
            let (e, r) = (&mut program.encoder, &mut program.registry);
            dispatch_flash_attn_prefill_blk(e, &device, r, &mask, &blk, &tiles)?;
            let call = Call {
                mask: Some(&mask),
                blk: classes.then_some(&blk),
                ..Call::new([&q, &k, &v, &out], &params)
            };
            program.prefill(D256_BLK, &call)?;
            program.encoder.commit_and_wait()?;
            Ok(common::bytes(&out))
        };
        let want = run(&[37, 45], false)?;
        assert_eq!(run(&[37, 45], true)?, want);
        assert_eq!(run(&[1, 1, 37, 45], true)?, want);
        assert_eq!(run(&[1, 1, 37, 45], false)?, want);
    }
    Ok(())
}
