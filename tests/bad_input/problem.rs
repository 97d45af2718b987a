//! Wrong problems and wrong calls of the entry that takes them.

use mlx_flash_attn::attention::{
    Layout, MaskSpec, Pages, Problem, ProblemBuilder, QueryOffset, Role, Shape, Strides,
};
use mlx_flash_attn::{DType, Result};

use crate::common::shape;
use crate::world::{Attention, Row, World, builder, row};

fn attention(
    name: &'static str,
    words: &'static [&'static str],
    spoil: fn(&mut World, &mut Attention),
) -> Row {
    row(name, words, move |w| {
        let mut call = w.attention();
        spoil(w, &mut call);
        call.run(w, Attention::problem())
    })
}

pub(crate) fn attention_rows() -> Vec<Row> {
    vec![
        attention(
            "the mask is missing",
            &["mask", "a buffer", "none"],
            |_, c| c.mask = None,
        ),
        attention(
            "the classes are missing",
            &["blk", "a buffer", "none"],
            |_, c| c.blk = None,
        ),
        attention("the sinks are missing", &["sinks", "none"], |_, c| {
            c.sinks = None
        }),
        attention(
            "the slopes are missing",
            &["alibi_slopes", "none"],
            |_, c| c.slopes = None,
        ),
        attention("the log-sum-exp is missing", &["lse", "none"], |_, c| {
            c.lse = None
        }),
        row("a mask too many", &["mask", "no such operand"], |w| {
            let mut call = w.attention();
            (call.blk, call.sinks, call.slopes, call.lse) = (None, None, None, None);
            call.run(w, builder())
        }),
        row("a log-sum-exp too many", &["lse", "no such operand"], |w| {
            let mut call = w.attention();
            (call.mask, call.blk, call.sinks, call.slopes) = (None, None, None, None);
            call.run(w, builder())
        }),
        attention("sinks in bf16", &["sinks", "f32", "bf16"], |w, c| {
            c.sinks = Some(w.buffer(DType::BF16, &[2]));
        }),
        attention(
            "a sink too few",
            &["sinks", "2 elements", "4 bytes"],
            |w, c| {
                c.sinks = Some(w.buffer(DType::F32, &[1]));
            },
        ),
        attention(
            "a slope too few",
            &["alibi_slopes", "2 elements"],
            |w, c| {
                c.slopes = Some(w.buffer(DType::F32, &[1]));
            },
        ),
        attention("a log-sum-exp in f16", &["lse", "f32", "f16"], |w, c| {
            c.lse = Some(w.buffer(DType::F16, &[18]));
        }),
        attention(
            "a log-sum-exp too short",
            &["lse", "18 elements"],
            |w, c| {
                c.lse = Some(w.buffer(DType::F32, &[17]));
            },
        ),
        attention("a mask in another dtype", &["mask", "f32", "u8"], |w, c| {
            c.mask = Some(w.buffer(DType::U8, &[9, 11]));
        }),
        attention("a mask too short", &["mask", "99 elements"], |w, c| {
            c.mask = Some(w.buffer(DType::F32, &[98]));
        }),
        attention(
            "K in f16 where f32 was said",
            &["K", "f32", "f16"],
            |w, c| {
                c.k = w.buffer(DType::F16, &[11, 64]);
            },
        ),
        attention(
            "classes of other tiles",
            &["blk", "[1, 1]", "[2, 1]"],
            |w, c| {
                c.blk = Some(w.buffer(DType::U8, &[2, 1]));
            },
        ),
        attention("out is Q", &["out", "the memory of Q"], |_, c| {
            c.out = c.q.clone()
        }),
        attention(
            "the log-sum-exp is the sinks",
            &["lse", "the memory of sinks"],
            |w, c| {
                let whole = w.buffer(DType::F32, &[18]);
                c.sinks = Some(whole.slice_view(0, 2));
                c.lse = Some(whole);
            },
        ),
        attention(
            "the log-sum-exp is inside out",
            &["out", "the memory of lse"],
            |_, c| {
                c.lse = Some(c.out.slice_view(64, 18));
            },
        ),
        attention(
            "out is inside the slopes",
            &["out", "the memory of alibi_slopes"],
            |_, c| {
                c.slopes = Some(c.out.clone());
            },
        ),
        attention("a view past its memory", &["slice_view"], |_, c| {
            c.sinks = c.sinks.as_ref().map(|s| s.slice_view(4, 2));
        }),
        row(
            "a capacity that the buffer lacks",
            &["K", "elements"],
            |w| {
                let mut call = w.attention();
                (call.mask, call.blk, call.sinks, call.slopes, call.lse) =
                    (None, None, None, None, None);
                let shape = Shape {
                    kv_heads: 2,
                    ..shape([1, 2, 1], (9, 11), 64)
                };
                call.run(w, Problem::builder(DType::F32, shape).key_capacity(12))
            },
        ),
    ]
}

fn refused(
    name: &'static str,
    words: &'static [&'static str],
    make: impl Fn() -> ProblemBuilder + 'static,
) -> Row {
    row(name, words, move |_| make().build().map(|_| ()))
}

/// Something that depends on positions, over 9 queries and 11 keys whose corners nobody aligned.
fn unplaced(name: &'static str, change: fn(ProblemBuilder) -> ProblemBuilder) -> Row {
    let words = &[
        "query_offset",
        "query_offset(QueryOffset::At(0))",
        "query_offset(QueryOffset::BottomRight)",
        "9 queries over 11 keys",
    ];
    refused(name, words, move || change(builder()))
}

fn sized(spoil: fn(&mut Shape)) -> impl Fn() -> ProblemBuilder {
    move || {
        let mut shape = shape([1, 2, 1], (9, 11), 64);
        spoil(&mut shape);
        Problem::builder(DType::F32, shape)
    }
}

const ZEROS: Strides = Strides {
    batch: 0,
    head: 0,
    seq: 0,
};

pub(crate) fn builder_rows() -> Vec<Row> {
    let plane = |dtype| MaskSpec::plane(dtype, 11);
    vec![
        refused("no heads", &["n_heads", "0"], sized(|s| s.heads = 0)),
        refused(
            "no key heads",
            &["n_kv_heads", "0"],
            sized(|s| s.kv_heads = 0),
        ),
        refused(
            "no head dim",
            &["head_dim", "0"],
            sized(|s| (s.qk_dim, s.v_dim) = (0, 0)),
        ),
        refused(
            "a head dim between",
            &["head_dim", "[32, ", "100"],
            sized(|s| (s.qk_dim, s.v_dim) = (100, 100)),
        ),
        refused(
            "a head dim beyond",
            &["head_dim", "512]", "1024"],
            sized(|s| (s.qk_dim, s.v_dim) = (1024, 1024)),
        ),
        refused(
            "rows of Q and K between",
            &["qk_dim", "[32, ", "100"],
            sized(|s| s.qk_dim = 100),
        ),
        refused(
            "rows of V and O between",
            &["v_dim", "[32, ", "100"],
            sized(|s| s.v_dim = 100),
        ),
        refused(
            "a capacity beside pages",
            &["key_capacity", "pages", "64"],
            || {
                let pages = Pages {
                    count: 9,
                    page_size: 16,
                    per_sequence: 9,
                };
                builder().pages(pages).key_capacity(64)
            },
        ),
        refused(
            "heads that do not divide",
            &["(3)", "(2)"],
            sized(|s| {
                (s.heads, s.kv_heads) = (3, 2);
            }),
        ),
        refused(
            "the largest batch",
            &["batch", "2147483647"],
            sized(|s| s.batch = usize::MAX),
        ),
        refused(
            "queries that overflow",
            &["overflow"],
            sized(|s| {
                (s.batch, s.heads, s.query_len) = (1 << 30, 1 << 20, 1 << 30);
            }),
        ),
        refused(
            "keys that overflow",
            &["overflow"],
            sized(|s| {
                (s.batch, s.heads, s.kv_heads, s.key_len) = (1 << 30, 1 << 20, 1 << 20, 1 << 30);
            }),
        ),
        refused("queries in u8", &["Q", "bf16", "u8"], || {
            Problem::builder(DType::U8, shape([1, 1, 1], (1, 1), 64))
        })
        .gives("UnsupportedDtype"),
        refused(
            "keys in bf16 under f32",
            &["K and V", "f16", "bf16"],
            || builder().kv_dtype(DType::BF16),
        )
        .gives("UnsupportedDtype"),
        refused(
            "keys in f32 under bf16",
            &["K and V", "bf16", "f32"],
            || Problem::builder(DType::BF16, shape([1, 1, 1], (1, 1), 64)).kv_dtype(DType::F32),
        )
        .gives("UnsupportedDtype"),
        refused("a mask in i32", &["mask", "u8 (bool)", "i32"], move || {
            builder().mask(plane(DType::I32))
        })
        .gives("UnsupportedDtype"),
        refused("a scale that is no number", &["scale", "NaN"], || {
            builder().scale(f32::NAN)
        }),
        refused("a softcap of 0", &["softcap", "above 0"], || {
            builder().softcap(0.0)
        }),
        refused(
            "a softcap whose inverse is infinite",
            &["softcap", "normal"],
            || builder().softcap(1e-39),
        ),
        refused("a negative softcap", &["softcap", "-3"], || {
            builder().softcap(-3.0)
        }),
        refused("a softcap that is no number", &["softcap", "NaN"], || {
            builder().softcap(f32::NAN)
        }),
        refused("a window of no key", &["window", "0"], || {
            builder().window(0)
        }),
        refused("a window past i32", &["window", "2147483648"], || {
            builder().window(1 << 31)
        }),
        refused(
            "a right window past i32",
            &["window_right", "4294967295"],
            || builder().window_right(u32::MAX as usize),
        ),
        refused("an offset past i32", &["q_offset", "2147483648"], || {
            builder().query_offset(QueryOffset::At(1 << 31))
        }),
        refused("an offset below i32", &["q_offset"], || {
            builder().query_offset(QueryOffset::At(i64::MIN))
        }),
        unplaced("a causal bound", |b| b.causal(true)),
        unplaced("a window", |b| b.window(3)),
        unplaced("a right window", |b| b.window_right(3)),
        unplaced("slopes", |b| b.alibi(true)),
        refused(
            "a capacity below the keys",
            &["key_capacity", "11", "10"],
            || builder().key_capacity(10),
        ),
        refused("a capacity that overflows", &["K", "overflow"], || {
            builder().layout(Layout::SeqMajor).key_capacity(usize::MAX)
        }),
        refused("outputs on one another", &["out", "overlap"], || {
            builder().strides(Role::Output, ZEROS)
        }),
        refused(
            "output rows that overlap by one",
            &["out", "64", "63"],
            || {
                builder().strides(
                    Role::Output,
                    Strides {
                        batch: 0,
                        head: 9 * 63,
                        seq: 63,
                    },
                )
            },
        ),
        refused("strides that overflow", &["K", "overflows"], || {
            builder().strides(
                Role::Key,
                Strides {
                    seq: usize::MAX / 2,
                    ..ZEROS
                },
            )
        }),
        refused(
            "a stride that nothing steps over",
            &["Q", "overflows"],
            || {
                builder().strides(
                    Role::Query,
                    Strides {
                        batch: usize::MAX,
                        head: 576,
                        seq: 64,
                    },
                )
            },
        ),
        refused("mask strides that overflow", &["mask", "overflows"], || {
            builder().mask(MaskSpec {
                dtype: DType::F32,
                batch_stride: 0,
                head_stride: usize::MAX,
                row_stride: 11,
            })
        }),
        refused(
            "classes without a mask",
            &["blk", "a mask", "no mask"],
            || builder().tile_classes(true),
        ),
        refused("classes of a bool mask", &["blk", "additive"], move || {
            builder().mask(plane(DType::U8)).tile_classes(true)
        }),
        refused("classes of a per-head mask", &["blk", "one plane"], || {
            builder()
                .mask(MaskSpec::broadcast(DType::F32, [1, 2, 9, 11]))
                .tile_classes(true)
        }),
    ]
}

fn packed(q: &[u32], k: &[u32]) -> Result<()> {
    Problem::varlen(DType::F32, 2, 1, 64, q, k)
        .build()
        .map(|_| ())
}

pub(crate) fn packed_rows() -> Vec<Row> {
    vec![
        row("no boundaries", &["cu_seqlens_q", "0", "none"], |_| {
            packed(&[], &[0, 1])
        }),
        row(
            "key boundaries of no sequence for one of queries",
            &["cu_seqlens_k", "1 sequences", "0"],
            |_| packed(&[0, 1], &[0]),
        ),
        row(
            "boundaries that do not start at 0",
            &["cu_seqlens_q", "0", "1"],
            |_| packed(&[1, 2], &[0, 1]),
        ),
        row(
            "boundaries that fall",
            &["cu_seqlens_k", "4 after 5", "index 2"],
            |_| packed(&[0, 5, 9], &[0, 5, 4]),
        ),
        row(
            "more query sequences than key sequences",
            &["cu_seqlens_k", "2 sequences", "1"],
            |_| packed(&[0, 1, 2], &[0, 1]),
        ),
        row(
            "packed sequences of other lengths, without an offset",
            &[
                "query_offset",
                "At(0)",
                "BottomRight",
                "1 queries over 4 keys",
            ],
            |_| {
                Problem::varlen(DType::F32, 2, 1, 64, &[0, 3, 4], &[0, 3, 7])
                    .causal(true)
                    .build()
                    .map(|_| ())
            },
        ),
        row("a sequence past i32", &["seq_len_k", "4294967295"], |_| {
            packed(&[0, 1], &[0, u32::MAX])
        }),
        row(
            "packed sequences with classes",
            &["blk", "not packed"],
            |_| {
                Problem::varlen(DType::F32, 2, 1, 64, &[0, 1], &[0, 1])
                    .mask(MaskSpec::plane(DType::F32, 1))
                    .tile_classes(true)
                    .build()
                    .map(|_| ())
            },
        ),
        row("packed sequences without heads", &["n_heads", "0"], |_| {
            Problem::varlen(DType::F32, 0, 1, 64, &[0, 1], &[0, 1])
                .build()
                .map(|_| ())
        }),
        row(
            "a packed capacity below the keys",
            &["key_capacity", "11", "10"],
            |_| {
                Problem::varlen(DType::F32, 2, 1, 64, &[0, 1, 2], &[0, 5, 11])
                    .key_capacity(10)
                    .build()
                    .map(|_| ())
            },
        ),
    ]
}
