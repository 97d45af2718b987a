//! Wrong decode calls.

use mlx_flash_attn::DType;

use crate::world::{Decode, Row, World, row};

fn vec(
    name: &'static str,
    words: &'static [&'static str],
    spoil: fn(&mut World, &mut Decode),
) -> Row {
    row(name, words, move |w| {
        let mut call = w.decode();
        spoil(w, &mut call);
        call.run(w)
    })
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        vec("no heads", &["num_heads", "0"], |_, c| {
            c.params.num_heads = 0
        }),
        vec("no key heads", &["num_kv_heads", "0"], |_, c| {
            c.params.num_kv_heads = 0
        }),
        vec(
            "heads that do not divide",
            &["num_heads (2)", "num_kv_heads (4)"],
            |_, c| {
                c.params.num_kv_heads = 4;
            },
        ),
        vec(
            "a head dim that is not there",
            &["head_dim", "512", "100"],
            |_, c| {
                c.params.head_dim = 100;
            },
        ),
        vec("no keys", &["kv_seq_len", "0"], |_, c| {
            c.params.kv_seq_len = 0
        }),
        vec("no capacity", &["kv_capacity", "0"], |_, c| {
            c.params.kv_capacity = 0
        }),
        vec(
            "more keys than capacity",
            &["kv_seq_len", "kv_capacity = 6", "7"],
            |_, c| {
                c.params.kv_seq_len = 7;
            },
        ),
        vec(
            "a capacity past i32",
            &["kv_capacity", "4294967295"],
            |_, c| {
                c.params.kv_capacity = u32::MAX;
            },
        ),
        vec(
            "a cache whose size overflows or is not there",
            &["K"],
            |_, c| {
                c.params.num_heads = i32::MAX as u32;
                c.params.num_kv_heads = i32::MAX as u32;
                c.params.kv_capacity = i32::MAX as u32;
            },
        ),
        vec("a scale that is no number", &["scale", "NaN"], |_, c| {
            c.params.scale = f32::NAN
        }),
        vec("an infinite scale", &["scale", "inf"], |_, c| {
            c.params.scale = f32::INFINITY
        }),
        vec(
            "a softcap that is no number",
            &["softcap", "NaN"],
            |_, c| {
                c.params.softcap = f32::NAN;
            },
        ),
        vec("a negative softcap", &["softcap", "-1"], |_, c| {
            c.params.softcap = -1.0
        }),
        vec("an unknown mask type", &["mask_type", "3"], |_, c| {
            c.params.mask_type = 3
        }),
        vec("Q in f16", &["Q", "f32", "f16"], |w, c| {
            c.q = w.buffer(DType::F16, &[2, 64])
        }),
        vec("K in bf16", &["K", "f32 or f16", "bf16"], |w, c| {
            c.k = w.buffer(DType::BF16, &[6, 64]);
        }),
        vec("V in another dtype than K", &["V", "f32", "f16"], |w, c| {
            c.v = w.buffer(DType::F16, &[6, 64]);
        }),
        vec("output in f16", &["output", "f32", "f16"], |w, c| {
            c.out = w.buffer(DType::F16, &[2, 64]);
        }),
        vec("partial results in u8", &["tmp", "f32", "u8"], |w, c| {
            c.tmp = w.buffer(DType::U8, &[100_000]);
        }),
        vec("Q too small", &["Q", "128 elements"], |_, c| {
            c.q = c.q.slice_view(0, 127)
        }),
        vec("K short of its capacity", &["K", "384 elements"], |_, c| {
            c.k = c.k.slice_view(0, 320);
        }),
        vec("V short of its capacity", &["V", "384 elements"], |_, c| {
            c.v = c.v.slice_view(4, 383);
        }),
        vec("output too small", &["output", "128 elements"], |_, c| {
            c.out = c.out.slice_view(0, 64);
        }),
        vec(
            "no room for the partial results",
            &["tmp", "4224 elements"],
            |_, c| {
                c.tmp = c.tmp.slice_view(0, 4223);
            },
        ),
        vec("output is Q", &["output", "the memory of Q"], |_, c| {
            c.out = c.q.clone()
        }),
        vec(
            "output is the partial results",
            &["output", "the memory of tmp"],
            |_, c| {
                c.out = c.tmp.slice_view(0, 128);
            },
        ),
        vec(
            "partial results over V",
            &["tmp", "the memory of V"],
            |w, c| {
                let whole = w.buffer(DType::F32, &[5000]);
                c.v = whole.slice_view(0, 384);
                c.tmp = whole.slice_view(383 * 4, 4224);
            },
        ),
    ]
}
