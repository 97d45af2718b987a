//! Wrong calls of the prefill dispatchers, the mask builder and the tile classes.

use mlx_flash_attn::DType;
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, blk_buffer_byte_len, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_mask::{SdpaMaskParams, build_sdpa_mask_bf16};

use crate::world::{Prefill, Row, World, row};

type Spoil = fn(&mut World, &mut Prefill);

fn d64(name: &'static str, words: &'static [&'static str], spoil: Spoil) -> Row {
    row(name, words, move |w| {
        let mut call = w.prefill(64);
        spoil(w, &mut call);
        call.d64(w)
    })
}

fn d256(name: &'static str, words: &'static [&'static str], spoil: Spoil) -> Row {
    row(name, words, move |w| {
        let mut call = w.classed(256);
        spoil(w, &mut call);
        call.d256(w)
    })
}

fn d512(name: &'static str, words: &'static [&'static str], spoil: Spoil) -> Row {
    row(name, words, move |w| {
        let mut call = w.classed(512);
        spoil(w, &mut call);
        call.d512(w)
    })
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = vec![
        d64(
            "head dim of another dispatcher",
            &["head_dim", "64", "256"],
            |_, c| {
                c.params.head_dim = 256;
            },
        ),
        d256("head dim 64 at 256", &["head_dim", "256", "64"], |_, c| {
            c.params.head_dim = 64
        }),
        d512(
            "head dim 256 at 512",
            &["head_dim", "512", "256"],
            |_, c| c.params.head_dim = 256,
        ),
        d64("no heads", &["n_heads", "0"], |_, c| c.params.n_heads = 0),
        d64("no key heads", &["n_kv_heads", "0"], |_, c| {
            c.params.n_kv_heads = 0
        }),
        d64(
            "heads that do not divide",
            &["n_heads (3)", "n_kv_heads (2)"],
            |_, c| {
                (c.params.n_heads, c.params.n_kv_heads) = (3, 2);
            },
        ),
        d64("more key heads than heads", &["divisible"], |_, c| {
            c.params.n_kv_heads = 4
        }),
        d64("no queries", &["seq_len_q", "0"], |_, c| {
            c.params.seq_len_q = 0
        }),
        d64("no keys", &["seq_len_k", "0"], |_, c| {
            c.params.seq_len_k = 0
        }),
        d64("no batch", &["batch", "0"], |_, c| c.params.batch = 0),
        d64(
            "more queries than i32",
            &["seq_len_q", "2147483648"],
            |_, c| {
                c.params.seq_len_q = 1 << 31;
            },
        ),
        d64("sizes that overflow", &["overflow"], |_, c| {
            c.params.batch = i32::MAX as u32;
            c.params.n_heads = i32::MAX as u32;
            c.params.seq_len_q = (1 << 31) - 1024;
        }),
        d64("a scale that is no number", &["scale", "NaN"], |_, c| {
            c.params.scale = f32::NAN
        }),
        d256("an infinite scale", &["scale", "inf"], |_, c| {
            c.params.scale = f32::INFINITY
        }),
        d512("a scale of minus infinity", &["scale", "-inf"], |_, c| {
            c.params.scale = f32::NEG_INFINITY;
        }),
        d64("Q in f16", &["Q", "bf16", "f16"], |w, c| {
            c.q = w.buffer(DType::F16, &[2, 9, 64]);
        }),
        d64("K in f32", &["K", "bf16", "f32"], |w, c| {
            c.k = w.buffer(DType::F32, &[11, 64])
        }),
        d256("V in u8", &["V", "bf16", "u8"], |w, c| {
            c.v = w.buffer(DType::U8, &[11, 512])
        }),
        d512("out in f16", &["out", "bf16", "f16"], |w, c| {
            c.out = w.buffer(DType::F16, &[2, 9, 512]);
        }),
        d64(
            "Q one element short",
            &["Q", "1152 elements", "2302 bytes"],
            |_, c| {
                c.q = c.q.slice_view(0, 1151);
            },
        ),
        d64(
            "K one row short",
            &["K", "704 elements", "1280 bytes"],
            |w, c| {
                c.k = w.buffer(DType::BF16, &[10, 64]);
            },
        ),
        d256("V one row short", &["V", "elements"], |w, c| {
            c.v = w.buffer(DType::BF16, &[10, 256]);
        }),
        d512("out one row short", &["out", "elements"], |w, c| {
            c.out = w.buffer(DType::BF16, &[17, 512]);
        }),
        d64("room for one batch of two", &["Q", "elements"], |_, c| {
            c.params.batch = 2
        }),
        d64("a mask in f32", &["mask", "bf16", "f32"], |w, c| {
            c.mask = Some(w.buffer(DType::F32, &[9, 11]));
        }),
        d64(
            "a bool mask where biases are expected",
            &["mask", "bf16", "u8"],
            |w, c| {
                c.mask = Some(w.buffer(DType::U8, &[9, 11]));
            },
        ),
        d64("a plane one row short", &["mask", "99 elements"], |w, c| {
            c.mask = Some(w.buffer(DType::BF16, &[8, 11]));
        }),
        d64(
            "a rank-4 mask of one head",
            &["mask", "198 elements"],
            |w, c| {
                c.mask = Some(w.buffer(DType::BF16, &[1, 1, 9, 11]));
            },
        ),
        d64("out is Q", &["out", "the memory of Q"], |_, c| {
            c.out = c.q.clone()
        }),
        d64("out is K", &["out", "the memory of K"], |_, c| {
            c.params.seq_len_q = 5;
            c.out = c.k.clone();
        }),
        d256("out overlaps V", &["out", "the memory of V"], |w, c| {
            let whole = w.buffer(DType::BF16, &[40 * 256]);
            c.v = whole.slice_view(0, 11 * 256);
            c.out = whole.slice_view(11 * 256 * 2 - 2, 18 * 256);
        }),
        d256(
            "out overlaps the mask",
            &["out", "the memory of mask"],
            |w, c| {
                let whole = w.buffer(DType::BF16, &[19 * 256]);
                c.mask = Some(whole.clone());
                c.params.seq_len_k = 11;
                c.blk = None;
                c.out = whole.slice_view(0, 18 * 256);
            },
        ),
        d256("classes without a mask", &["blk", "mask"], |_, c| {
            c.mask = None
        }),
        d256("classes in i32", &["blk", "u8", "i32"], |w, c| {
            let classes = w.device.alloc_buffer(4, DType::I32, vec![1]);
            c.blk = classes.ok();
        }),
        d512(
            "one class too few",
            &["blk", "2 elements", "1 bytes"],
            |w, c| {
                c.blk = Some(w.buffer(DType::U8, &[1]));
            },
        ),
        d256(
            "classes of another tile",
            &["blk", "[1, 1]", "[2, 1]"],
            |w, c| {
                c.blk = Some(w.buffer(DType::U8, &[2, 1]));
            },
        ),
        d512(
            "classes of the small tile",
            &["blk", "8x64", "[1, 1]"],
            |w, c| {
                c.blk = Some(w.buffer(DType::U8, &[32]).slice_view(0, 32));
                let p = BlkParams {
                    seq_len_q: 9,
                    seq_len_k: 11,
                    bq: 32,
                    bk: 16,
                };
                c.blk = alloc_blk_buffer(&w.device, &p).ok();
            },
        ),
        d256(
            "classes beside a per-head mask",
            &["blk", "one plane"],
            |w, c| {
                c.mask = Some(w.buffer(DType::BF16, &[1, 2, 9, 11]));
            },
        ),
        d512("three simdgroups", &["nsg", "4 or 8", "3"], |_, c| {
            c.nsg = 3
        }),
        d512("no simdgroup", &["nsg", "4 or 8", "0"], |_, c| c.nsg = 0),
        d512("sixteen simdgroups", &["nsg", "4 or 8", "16"], |_, c| {
            c.nsg = 16
        }),
        d64(
            "a view past its memory",
            &["slice_view", "64 elements"],
            |_, c| {
                c.v = c.v.slice_view(1400, 64);
            },
        ),
        d64(
            "a view of a view past its memory",
            &["slice_view"],
            |_, c| {
                c.k = c.k.slice_view(9999, 1).slice_view(0, 0);
            },
        ),
    ];
    rows.push(row(
        "a float mask where booleans are expected",
        &["mask", "u8", "bf16"],
        |w| {
            let mut call = w.prefill(64);
            call.mask = Some(w.buffer(DType::BF16, &[9, 11]));
            call.d64_bool(w)
        },
    ));
    rows.push(row(
        "a view that starts inside an element",
        &["Q", "2 bytes", "byte 1"],
        |w| {
            let mut call = w.prefill(64);
            call.q = w.buffer(DType::BF16, &[1200]).slice_view(1, 1152);
            call.d64(w)
        },
    ));
    rows
}

fn tiles() -> BlkParams {
    BlkParams {
        seq_len_q: 9,
        seq_len_k: 11,
        bq: 32,
        bk: 16,
    }
}

fn classify(
    w: &mut World,
    spoil: impl Fn(&mut World, &mut Classify),
) -> mlx_flash_attn::Result<()> {
    let mut c = Classify {
        mask: w.buffer(DType::BF16, &[9, 11]),
        blk: w.buffer(DType::U8, &[1, 1]),
        params: tiles(),
    };
    spoil(w, &mut c);
    let (e, d, r) = (&mut w.encoder, &w.device, &mut w.registry);
    dispatch_flash_attn_prefill_blk(e, d, r, &c.mask, &c.blk, &c.params)
}

struct Classify {
    mask: mlx_flash_attn::MlxBuffer,
    blk: mlx_flash_attn::MlxBuffer,
    params: BlkParams,
}

fn build(w: &mut World, params: SdpaMaskParams) -> mlx_flash_attn::Result<()> {
    build_sdpa_mask_bf16(&w.device, &mut w.registry, &mut w.encoder, &params).map(|_| ())
}

const MASK: SdpaMaskParams = SdpaMaskParams {
    seq_len_q: 9,
    seq_len_k: 11,
    window_size: None,
    causal: true,
    q_abs_offset: 0,
};

pub(crate) fn pre_pass_rows() -> Vec<Row> {
    vec![
        row("a mask without rows", &["seq_len_q", "0"], |w| {
            build(
                w,
                SdpaMaskParams {
                    seq_len_q: 0,
                    ..MASK
                },
            )
        }),
        row("a mask without columns", &["seq_len_k", "0"], |w| {
            build(
                w,
                SdpaMaskParams {
                    seq_len_k: 0,
                    ..MASK
                },
            )
        }),
        row("a window of no key", &["window_size", "0"], |w| {
            build(
                w,
                SdpaMaskParams {
                    window_size: Some(0),
                    ..MASK
                },
            )
        }),
        row("a mask whose bytes overflow", &["mask", "overflow"], |w| {
            build(
                w,
                SdpaMaskParams {
                    seq_len_q: u32::MAX,
                    seq_len_k: u32::MAX,
                    ..MASK
                },
            )
        }),
        row("a mask that no memory holds", &["bytes"], |w| {
            build(
                w,
                SdpaMaskParams {
                    seq_len_q: 1 << 30,
                    seq_len_k: 1 << 30,
                    ..MASK
                },
            )
        })
        .gives("BufferAllocationError"),
        row("classes of no row", &["seq_len_q", "0"], |w| {
            classify(w, |_, c| c.params.seq_len_q = 0)
        }),
        row("classes of no column", &["seq_len_k", "0"], |w| {
            classify(w, |_, c| c.params.seq_len_k = 0)
        }),
        row("tiles of no row", &["bq", "0"], |w| {
            classify(w, |_, c| c.params.bq = 0)
        }),
        row("tiles of no column", &["bk", "0"], |w| {
            classify(w, |_, c| c.params.bk = 0)
        }),
        row("tiles past i32", &["bq", "4294967295"], |w| {
            classify(w, |_, c| c.params.bq = u32::MAX)
        }),
        row("classes of an f16 mask", &["mask", "bf16", "f16"], |w| {
            classify(w, |w, c| c.mask = w.buffer(DType::F16, &[9, 11]))
        }),
        row(
            "classes of a mask that is too small",
            &["mask", "99 elements"],
            |w| classify(w, |w, c| c.mask = w.buffer(DType::BF16, &[98])),
        ),
        row(
            "classes of a per-head mask",
            &["mask", "one plane", "[2, 9, 11]"],
            |w| classify(w, |w, c| c.mask = w.buffer(DType::BF16, &[2, 9, 11])),
        ),
        row(
            "room for too few classes",
            &["blk", "12 elements", "1 bytes"],
            |w| classify(w, |_, c| (c.params.bq, c.params.bk) = (4, 3)),
        ),
        row("classes written as bf16", &["blk", "u8", "bf16"], |w| {
            classify(w, |w, c| c.blk = w.buffer(DType::BF16, &[32]))
        }),
        row("a class buffer of no row", &["seq_len_q", "0"], |_| {
            blk_buffer_byte_len(&BlkParams {
                seq_len_q: 0,
                ..tiles()
            })
            .map(|_| ())
        }),
        row("a class buffer past i32", &["seq_len_k"], |w| {
            alloc_blk_buffer(
                &w.device,
                &BlkParams {
                    seq_len_k: 1 << 31,
                    ..tiles()
                },
            )
            .map(|_| ())
        }),
    ]
}
