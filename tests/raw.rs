//! Dispatches put together by hand, in the geometry of the kernels that programs know: every device reads
//! them back into the attention that they state.
#![allow(clippy::unwrap_used)]

mod common;

use bytemuck::Zeroable;
use common::{Qkv, attend, commit, devices, normal, output, shape};
use mlx_flash_attn::abi::bindings::names;
use mlx_flash_attn::abi::params::{
    AttnExtraParamsGpu, AttnMaskParamsGpu, AttnPagesParamsGpu, AttnParamsGpu, BlkParamsGpu,
    BlockFillParamsGpu, MaskFillParamsGpu,
};
use mlx_flash_attn::attention::{KeyLengths, Pages, QueryOffset};
use mlx_flash_attn::encoder::{KernelArg, MTLSize, as_bytes};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::ops::flash_attn_prefill_mask::{
    SdpaMaskParams, build_block_diagonal_sdpa_mask_bf16, build_sdpa_mask_f16,
};
use mlx_flash_attn::{DType, KernelRegistry, MlxBuffer, MlxDevice};

const ROWS: usize = 37;
const KEYS: usize = 50;
const HEADS: usize = 2;

/// What a program fills in for dense operands, one key/value head.
fn params(dim: usize, tile: usize) -> AttnParamsGpu {
    let int = |n: usize| i32::try_from(n).unwrap();
    let strides = |heads: usize, len: usize| [heads * len * dim, len * dim, dim].map(|n| n as i64);
    AttnParamsGpu {
        b: 1,
        h: int(HEADS),
        d: int(dim),
        ql: int(ROWS),
        kl: int(KEYS),
        gqa_factor: int(HEADS),
        scale: 1.0 / (dim as f32).sqrt(),
        softcapping: 1.0,
        nq: int(ROWS.div_ceil(tile)),
        nk: int(KEYS.div_ceil(tile)),
        nq_aligned: int(ROWS / tile),
        nk_aligned: int(KEYS / tile),
        ql_rem: int(ROWS % tile),
        kl_rem: int(KEYS % tile),
        ql_off: 0,
        _pad: 0,
        q_strides: strides(HEADS, ROWS),
        k_strides: strides(1, KEYS),
        v_strides: strides(1, KEYS),
        o_strides: strides(HEADS, ROWS),
    }
}

struct Raw {
    kernel: &'static str,
    tile: usize,
    simdgroups: u64,
    /// Params in buffers, a byte into them, and not as bytes of the command.
    in_buffers: bool,
}

fn run(device: &MlxDevice, data: &Qkv, raw: &Raw) -> Vec<f32> {
    let dim = data.shape.qk_dim;
    let [q, k, v, _] = data.buffers(device);
    let out = output(device, data.q.len(), data.dtype);
    let params = params(dim, raw.tile);
    let mask_params = AttnMaskParamsGpu::zeroed();
    let extra = AttnExtraParamsGpu::zeroed();
    let mut registry = KernelRegistry::new();
    let handle = device.metal_device();
    let bools = [(301, true)];
    let pipeline = registry
        .get_pipeline_with_bool_constants(raw.kernel, handle, &bools)
        .unwrap();
    let mut bytes = vec![0u8];
    bytes.extend_from_slice(as_bytes(&params));
    let len = bytes.len();
    let stored = device
        .buffer_from_slice(&bytes, DType::U8, vec![len])
        .unwrap();
    let mut args = vec![
        (0, KernelArg::Buffer(&q)),
        (1, KernelArg::Buffer(&k)),
        (2, KernelArg::Buffer(&v)),
        (3, KernelArg::Buffer(&out)),
        // Bound by habit, and not read where no constant says so.
        (5, KernelArg::Bytes(as_bytes(&mask_params))),
        (8, KernelArg::Bytes(as_bytes(&extra))),
    ];
    args.push(match raw.in_buffers {
        true => (4, KernelArg::BufferWithOffset(&stored, 1)),
        false => (4, KernelArg::Bytes(as_bytes(&params))),
    });
    let grid = MTLSize::new(ROWS.div_ceil(raw.tile) as u64, HEADS as u64, 1);
    let threads = MTLSize::new(32, raw.simdgroups, 1);
    commit(device, |e| {
        e.encode_threadgroups_with_args(pipeline, &args, grid, threads);
        Ok(())
    });
    common::download(&out)
}

#[test]
fn dispatches_in_the_named_kernels_own_geometry_give_what_the_problem_gives() {
    for device in devices() {
        let (wide, plain) = (
            "flash_attn_prefill_bf16_d512",
            "flash_attn_prefill_bf16_d64",
        );
        for (kernel, dim, tile, simdgroups) in [
            (plain, 64, 32, 4),
            // How the plain kernels of head dim 512 were dispatched at first: tiles of 8 x 8, 32 threads.
            (wide, 512, 8, 1),
            (wide, 512, 8, 8),
            ("flash_attn_prefill_llamacpp_bf16_d512", 512, 8, 8),
        ] {
            let data = Qkv::new(31, DType::BF16, shape([1, HEADS, 1], (ROWS, KEYS), dim));
            let builder = data.builder().causal(true);
            let builder = builder.query_offset(QueryOffset::At(0));
            let (_, want) = data.run(&device, &builder.build().unwrap());
            for in_buffers in [false, true] {
                let raw = Raw {
                    kernel,
                    tile,
                    simdgroups,
                    in_buffers,
                };
                let what = format!("{} {kernel} {simdgroups} {in_buffers}", device.kind());
                assert_eq!(run(&device, &data, &raw), want, "{what}");
            }
        }
    }
}

/// The first 41 of 50 keys, in pages of 16, with the length in a buffer.
#[test]
fn pages_and_lengths_by_constants_give_what_the_problem_gives() {
    let (dim, pages, page_size, length) = (64, 7, 16, 41u32);
    let mut data = Qkv::new(33, DType::BF16, shape([1, HEADS, 1], (ROWS, KEYS), dim));
    let pool = pages * page_size * dim;
    (data.k, data.v) = (normal(1, pool, data.dtype), normal(2, pool, data.dtype));
    let problem = data
        .builder()
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .pages(Pages {
            count: pages,
            page_size,
            per_sequence: 5,
        })
        .key_lengths(KeyLengths::Device);
    let problem = problem.build().unwrap();
    for device in devices() {
        if device.supports(&problem).is_err() {
            continue;
        }
        let [q, k, v, out] = data.buffers(&device);
        let table = device.buffer_from_slice(&[6i32, 0, 3, 2, -1], DType::I32, vec![5]);
        let lengths = device.buffer_from_slice(&[length], DType::U32, vec![1]);
        let (table, lengths) = (table.unwrap(), lengths.unwrap());
        let operands = Operands {
            block_table: Some(&table),
            key_lengths: Some(&lengths),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(&device, &problem, &operands);
        let want = common::bytes(&out);

        let strides = [page_size * dim, page_size * dim, dim].map(|n| n as i64);
        let params = AttnParamsGpu {
            k_strides: strides,
            v_strides: strides,
            ..params(dim, 32)
        };
        let extra = AttnExtraParamsGpu {
            window: -1,
            window_right: -1,
            bottom_right: 1,
            ..Zeroable::zeroed()
        };
        let in_pages = AttnPagesParamsGpu {
            count: 7,
            shift: 4,
            per_sequence: 5,
        };
        let (mut registry, handle) = (KernelRegistry::new(), device.metal_device());
        let bools = [(301, true), (313, true), (314, true)];
        let kernel = "flash_attn_prefill_bf16_d64";
        let pipeline = registry.get_pipeline_with_bool_constants(kernel, handle, &bools);
        let out = output(&device, data.q.len(), data.dtype);
        let args = [
            (0, KernelArg::Buffer(&q)),
            (1, KernelArg::Buffer(&k)),
            (2, KernelArg::Buffer(&v)),
            (3, KernelArg::Buffer(&out)),
            (4, KernelArg::Bytes(as_bytes(&params))),
            (8, KernelArg::Bytes(as_bytes(&extra))),
            (14, KernelArg::Buffer(&table)),
            (15, KernelArg::Buffer(&lengths)),
            (16, KernelArg::Bytes(as_bytes(&in_pages))),
        ];
        let grid = MTLSize::new(ROWS.div_ceil(32) as u64, HEADS as u64, 1);
        commit(&device, |e| {
            e.encode_threadgroups_with_args(pipeline.unwrap(), &args, grid, MTLSize::new(32, 4, 1));
            Ok(())
        });
        assert_eq!(common::bytes(&out), want, "{}", device.kind());
    }
}

/// Runs one kernel that is no prefill, in threadgroups of 32.
fn run_other(
    device: &MlxDevice,
    (kernel, ints): (&str, &[(usize, i32)]),
    args: &[(u64, KernelArg<'_>)],
    grid: [u64; 2],
) {
    let (mut registry, handle) = (KernelRegistry::new(), device.metal_device());
    let pipeline = registry.get_pipeline_with_constants(kernel, handle, &[], ints);
    let pipeline = pipeline.unwrap();
    commit(device, |e| {
        let (grid, threads) = (MTLSize::new(grid[0], grid[1], 1), MTLSize::new(32, 1, 1));
        e.encode_threadgroups_with_args(pipeline, args, grid, threads);
        Ok(())
    });
}

#[test]
fn mask_kernels_by_name_give_what_the_builders_give() {
    for device in devices() {
        let registry = &mut KernelRegistry::new();
        let built = SdpaMaskParams {
            seq_len_q: 9,
            seq_len_k: 40,
            window_size: Some(6),
            causal: true,
            q_abs_offset: 20,
        };
        let want = commit(&device, |e| {
            build_sdpa_mask_f16(&device, registry, e, &built)
        });
        let params = MaskFillParamsGpu {
            seq_len_q: 9,
            seq_len_k: 40,
            window: 6,
            causal: 1,
            q_abs_offset: 20,
        };
        let mask = output(&device, 9 * 40, DType::F16);
        let args = [
            (0, KernelArg::Buffer(&mask)),
            (1, KernelArg::Bytes(as_bytes(&params))),
        ];
        run_other(&device, (names::MASK_FILL_F16, &[]), &args, [9, 1]);
        assert_eq!(common::bytes(&mask), common::bytes(&want));

        let params = BlkParamsGpu {
            seq_len_q: 9,
            seq_len_k: 40,
            nq: 2,
            nk: 5,
            row_stride: 40,
        };
        let classes = output(&device, 10, DType::U8);
        let args = [
            (0, KernelArg::Buffer(&mask)),
            (1, KernelArg::Buffer(&classes)),
            (2, KernelArg::Bytes(as_bytes(&params))),
        ];
        run_other(
            &device,
            (names::BLK_F16, &[(400, 8), (401, 8)]),
            &args,
            [5, 2],
        );
        // Rows 0 to 7 see keys 15 to 27, row 8 keys 23 to 28.
        assert_eq!(common::bytes(&classes), [0, 1, 1, 1, 0, 0, 0, 1, 1, 0]);

        let of = |of: fn(u32) -> u32| -> MlxBuffer {
            let tokens: Vec<u32> = (0..21).map(of).collect();
            let tokens = device.buffer_from_slice(&tokens, DType::U32, vec![21]);
            tokens.unwrap()
        };
        let (ids, positions) = (of(|t| t % 2), of(|t| t / 2));
        let want = commit(&device, |e| {
            let window = Some(3);
            build_block_diagonal_sdpa_mask_bf16(
                &device, registry, e, &ids, &positions, 21, window, true,
            )
        });
        let params = BlockFillParamsGpu {
            len: 21,
            window: 3,
            causal: 1,
        };
        let mask = output(&device, 21 * 21, DType::BF16);
        let args = [
            (0, KernelArg::Buffer(&mask)),
            (1, KernelArg::Bytes(as_bytes(&params))),
            (2, KernelArg::Buffer(&ids)),
            (3, KernelArg::Buffer(&positions)),
        ];
        run_other(&device, (names::MASK_FILL_BLOCKS, &[]), &args, [21, 1]);
        assert_eq!(common::bytes(&mask), common::bytes(&want));
    }
}
