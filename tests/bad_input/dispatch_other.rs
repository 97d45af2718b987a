//! Wrong dispatches of the mask fill, the tile classes and decode, given to the encoder itself.

use bytemuck::Zeroable;
use mlx_flash_attn::abi::bindings::names;
use mlx_flash_attn::abi::params::{
    BlkParamsGpu, BlockFillParamsGpu, MaskFillParamsGpu, VecParamsGpu,
};
use mlx_flash_attn::encoder::{KernelArg, MTLSize, as_bytes};
use mlx_flash_attn::{DType, MlxBuffer, Result};

use crate::world::{Row, World, row};

/// Encodes a kernel that is no prefill over given buffers and one struct of params.
fn other(
    w: &mut World,
    kernel: &str,
    ints: &[(usize, i32)],
    buffers: &[(u64, &MlxBuffer)],
    (index, params): (u64, &[u8]),
) -> Result<()> {
    let device = w.device.metal_device();
    let pipeline = w
        .registry
        .get_pipeline_with_constants(kernel, device, &[], ints)?;
    let buffers = buffers.iter().map(|(i, b)| (*i, KernelArg::Buffer(b)));
    let args: Vec<_> = buffers.chain([(index, KernelArg::Bytes(params))]).collect();
    let one = MTLSize::new(1, 1, 1);
    w.encoder
        .encode_threadgroups_with_args(pipeline, &args, one, one);
    w.encoder.commit_and_wait()
}

pub(crate) fn rows() -> Vec<Row> {
    let failed = |name, words, call: fn(&mut World) -> Result<()>| {
        row(name, words, call).gives("CommandBufferError")
    };
    vec![
        failed("a fill of nothing", &["overflow"], |w| {
            fill_with(w, MaskFillParamsGpu::zeroed())
        }),
        failed("a fill past its mask", &["buffer 0", "100 elements"], |w| {
            fill_with(
                w,
                MaskFillParamsGpu {
                    seq_len_q: 10,
                    seq_len_k: 10,
                    ..Zeroable::zeroed()
                },
            )
        }),
        failed("a fill of everything", &["buffer 0"], |w| {
            let all = u32::MAX;
            fill_with(
                w,
                MaskFillParamsGpu {
                    seq_len_q: all,
                    seq_len_k: all,
                    ..Zeroable::zeroed()
                },
            )
        }),
        failed("a block fill of nothing", &["overflow"], |w| {
            blocks_with(w, 0, 9)
        }),
        failed(
            "a block fill past its mask",
            &["buffer 0", "100 elements"],
            |w| blocks_with(w, 10, 10),
        ),
        failed(
            "a block fill past its tokens",
            &["buffer 3", "9 elements"],
            |w| blocks_with(w, 9, 8),
        ),
        failed("tiles of no side", &["constant 400"], |w| {
            classify_with(w, &[], 9, 11, 11)
        }),
        failed("tiles of a negative side", &["constant 401", "-16"], |w| {
            classify_with(w, &[(400, 32), (401, -16)], 9, 11, 11)
        }),
        failed("classes past the mask", &["buffer 0"], |w| {
            classify_with(w, &[(400, 32), (401, 16)], 10, 11, 11)
        }),
        failed("classes past their buffer", &["buffer 1"], |w| {
            classify_with(w, &[(400, 1), (401, 1)], 9, 11, 11)
        }),
        failed("classes of rows that run backwards", &["overflow"], |w| {
            classify_with(w, &[(400, 32), (401, 16)], 9, 11, -11)
        }),
        failed("classes of rows that overflow", &["overflow"], |w| {
            classify_with(w, &[(400, 32), (401, 16)], u32::MAX, 11, i64::MAX)
        }),
        failed("decode without splits", &["sizes"], |w| {
            vec_with(w, |p| p.splits = 0)
        }),
        failed("decode with too many splits", &["buffer 3"], |w| {
            vec_with(w, |p| p.splits = 33)
        }),
        failed("decode of sizes that overflow", &["sizes"], |w| {
            vec_with(w, |p| {
                (p.num_heads, p.head_dim, p.splits) = (u32::MAX, u32::MAX, u32::MAX)
            })
        }),
        failed("decode of no heads", &["n_heads"], |w| {
            vec_with(w, |p| p.num_heads = 0)
        }),
        failed("decode at an unknown head dim", &["head_dim"], |w| {
            vec_with(w, |p| p.head_dim = 63)
        }),
        failed("decode past the cache", &["key_capacity"], |w| {
            vec_with(w, |p| p.kv_seq_len = 99)
        }),
        failed("decode of a larger cache", &["buffer 1"], |w| {
            vec_with(w, |p| (p.kv_seq_len, p.kv_capacity) = (99, 99))
        }),
        failed("decode that starts past its end", &["window"], |w| {
            vec_with(w, |p| p.kv_start = 77)
        }),
        failed("decode with a scale that is no number", &["scale"], |w| {
            vec_with(w, |p| p.scale = f32::NAN)
        }),
        failed("decode with a negative softcap", &["softcap"], |w| {
            vec_with(w, |p| p.softcap = -1.0)
        }),
        failed("a reduce past its partial results", &["buffer 0"], |w| {
            let tmp = w.buffer(DType::F32, &[2 * 32 * 66 - 1]);
            let out = w.buffer(DType::F32, &[128]);
            let params = vec_params();
            other(
                w,
                names::VEC_REDUCE,
                &[],
                &[(0, &tmp), (1, &out)],
                (2, as_bytes(&params)),
            )
        }),
        failed("a reduce past its output", &["buffer 1"], |w| {
            let tmp = w.buffer(DType::F32, &[2 * 32 * 66]);
            let out = w.buffer(DType::F32, &[127]);
            let params = vec_params();
            other(
                w,
                names::VEC_REDUCE,
                &[],
                &[(0, &tmp), (1, &out)],
                (2, as_bytes(&params)),
            )
        }),
    ]
}

fn fill_with(w: &mut World, params: MaskFillParamsGpu) -> Result<()> {
    let out = w.buffer(DType::BF16, &[99]);
    other(
        w,
        names::MASK_FILL,
        &[],
        &[(0, &out)],
        (1, as_bytes(&params)),
    )
}

/// A block fill of `len` tokens into 99 cells. A binding has no dtype, only bytes.
fn blocks_with(w: &mut World, len: u32, positions: usize) -> Result<()> {
    let out = w.buffer(DType::BF16, &[99]);
    let (ids, positions) = (
        w.buffer(DType::F32, &[10]),
        w.buffer(DType::F32, &[positions]),
    );
    let params = BlockFillParamsGpu {
        len,
        ..Zeroable::zeroed()
    };
    let buffers = [(0, &out), (2, &ids), (3, &positions)];
    let params = (1, as_bytes(&params));
    other(w, names::MASK_FILL_BLOCKS, &[], &buffers, params)
}

fn classify_with(
    w: &mut World,
    tile: &[(usize, i32)],
    rows: u32,
    keys: u32,
    row_stride: i64,
) -> Result<()> {
    let (mask, blk) = (w.buffer(DType::BF16, &[99]), w.buffer(DType::U8, &[1]));
    let params = BlkParamsGpu {
        seq_len_q: rows,
        seq_len_k: keys,
        nq: 1,
        nk: 1,
        row_stride,
    };
    other(
        w,
        names::BLK,
        tile,
        &[(0, &mask), (1, &blk)],
        (2, as_bytes(&params)),
    )
}

fn vec_params() -> VecParamsGpu {
    VecParamsGpu {
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 64,
        kv_seq_len: 5,
        kv_capacity: 6,
        kv_start: 0,
        scale: 0.125,
        softcap: 0.0,
        splits: 32,
        _pad: 0,
    }
}

fn vec_with(w: &mut World, spoil: fn(&mut VecParamsGpu)) -> Result<()> {
    let mut params = vec_params();
    spoil(&mut params);
    let call = w.decode();
    let buffers = [(0, &call.q), (1, &call.k), (2, &call.v), (3, &call.tmp)];
    other(w, names::VEC_F32, &[], &buffers, (4, as_bytes(&params)))
}

/// Right operands, and a grid of one threadgroup of one thread: wrong for all of these kernels.
pub(crate) fn launch_rows() -> Vec<Row> {
    let failed = |name, words, call: fn(&mut World) -> Result<()>| {
        row(name, words, call).gives("CommandBufferError")
    };
    vec![
        failed("a fill over another grid", &["grid", "[9, 1, 1]"], |w| {
            fill_with(
                w,
                MaskFillParamsGpu {
                    seq_len_q: 9,
                    seq_len_k: 11,
                    ..Zeroable::zeroed()
                },
            )
        }),
        failed(
            "a block fill over another grid",
            &["grid", "[9, 1, 1]"],
            |w| blocks_with(w, 9, 9),
        ),
        failed(
            "classes by one thread",
            &["threadgroup", "[32, 1, 1]"],
            |w| classify_with(w, &[(400, 32), (401, 16)], 9, 11, 11),
        ),
        failed(
            "classes of more tiles than the params say",
            &["NQ and NK"],
            |w| {
                let (mask, blk) = (w.buffer(DType::BF16, &[99]), w.buffer(DType::U8, &[2]));
                let params = BlkParamsGpu {
                    seq_len_q: 9,
                    seq_len_k: 11,
                    nq: 1,
                    nk: 9,
                    row_stride: 11,
                };
                let buffers = [(0, &mask), (1, &blk)];
                let tile = [(400, 32), (401, 16)];
                other(w, names::BLK, &tile, &buffers, (2, as_bytes(&params)))
            },
        ),
        failed("decode over another grid", &["grid", "[32, 2, 1]"], |w| {
            vec_with(w, |_| {})
        }),
        failed("decode by one thread", &["threadgroup"], |w| {
            vec_with(w, |p| (p.splits, p.num_heads) = (1, 1))
        }),
        failed("a reduce over another grid", &["grid", "[2, 1, 1]"], |w| {
            let tmp = w.buffer(DType::F32, &[2 * 32 * 66]);
            let out = w.buffer(DType::F32, &[128]);
            let params = vec_params();
            other(
                w,
                names::VEC_REDUCE,
                &[],
                &[(0, &tmp), (1, &out)],
                (2, as_bytes(&params)),
            )
        }),
    ]
}
