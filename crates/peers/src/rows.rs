//! The table: which attention is timed, and what it is held against.

use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{Problem, QueryOffset, Shape};

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) number: u8,
    pub(crate) shape: Shape,
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    /// How many times as fast as the fastest peer of any dtype bf16 is to be ...
    pub(crate) bar_bf16: f64,
    /// ... and f32 as the fastest peer in f32.
    pub(crate) bar_f32: f64,
}

/// f16 is to be as fast as our own f32, less what two runs differ by.
pub(crate) const BAR_F16: f64 = 0.95;

const fn row(
    number: u8,
    [batch, heads, kv_heads, query_len, key_len, head_dim]: [usize; 6],
) -> Row {
    Row {
        number,
        shape: Shape {
            batch,
            heads,
            kv_heads,
            query_len,
            key_len,
            qk_dim: head_dim,
            v_dim: head_dim,
        },
        causal: false,
        window: None,
        bar_bf16: 2.0,
        bar_f32: 1.1,
    }
}

/// All rows, by number.
pub(crate) const ROWS: [Row; 7] = [
    Row {
        causal: true,
        ..row(1, [1, 16, 8, 1024, 1024, 256])
    },
    Row {
        bar_bf16: 1.8,
        bar_f32: 1.0,
        ..row(2, [1, 16, 8, 1024, 1024, 256])
    },
    Row {
        bar_bf16: 1.8,
        ..row(3, [1, 8, 8, 512, 512, 512])
    },
    row(4, [4, 12, 12, 512, 512, 64]),
    Row {
        causal: true,
        ..row(5, [1, 32, 8, 2048, 2048, 128])
    },
    Row {
        bar_bf16: 1.5,
        ..row(6, [1, 12, 12, 128, 128, 64])
    },
    Row {
        causal: true,
        window: Some(256),
        bar_bf16: 5.0,
        bar_f32: 3.0,
        ..row(7, [1, 16, 8, 2048, 2048, 256])
    },
];

/// `B,H,Hkv,Sq,Sk,D`.
pub(crate) fn sizes(shape: Shape) -> [usize; 6] {
    let s = shape;
    [
        s.batch,
        s.heads,
        s.kv_heads,
        s.query_len,
        s.key_len,
        s.qk_dim,
    ]
}

impl Row {
    /// The row as the library is asked for it.
    pub(crate) fn problem(&self, dtype: DType) -> mlx_flash_attn::Result<Problem> {
        let builder = Problem::builder(dtype, self.shape)
            .causal(self.causal)
            .query_offset(QueryOffset::At(0));
        match self.window {
            Some(window) => builder.window(window).build(),
            None => builder.build(),
        }
    }

    /// What the row is, in words.
    pub(crate) fn label(&self) -> String {
        let shape = sizes(self.shape).map(|n| n.to_string()).join(",");
        match (self.causal, self.window) {
            (_, Some(window)) => format!("{shape} causal, window {window}"),
            (true, None) => format!("{shape} causal"),
            (false, None) => format!("{shape} full"),
        }
    }
}
