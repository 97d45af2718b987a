//! Wrong dispatches given to the encoder itself, which any caller may do: they must not crash, and
//! the commit must say what was wrong.

use bytemuck::Zeroable;
use mlx_flash_attn::abi::params::{
    AttnExtraParamsGpu, AttnMaskParamsGpu, AttnPagesParamsGpu, AttnParamsGpu,
};
use mlx_flash_attn::encoder::{KernelArg, as_bytes};
use mlx_flash_attn::{DType, MlxBuffer, Result};

use crate::world::{Row, World, row};

const KERNEL: &str = "flash_attn_prefill_bf16_d64";

/// What a raw prefill binds; a row spoils some of it.
struct Raw {
    kernel: &'static str,
    bools: Vec<(usize, bool)>,
    ints: Vec<(usize, i32)>,
    buffers: Vec<(u64, MlxBuffer, u64)>,
    bytes: Vec<(u64, Vec<u8>)>,
    params: AttnParamsGpu,
    grid: [u64; 3],
    threads: [u64; 3],
}

impl Raw {
    fn new(w: &mut World) -> Self {
        let bf16 = DType::BF16;
        let strides = |len: i64| [len * 64, len * 64, 64];
        Self {
            kernel: KERNEL,
            bools: vec![],
            ints: vec![],
            buffers: vec![
                (0, w.buffer(bf16, &[9 * 64]), 0),
                (1, w.buffer(bf16, &[11 * 64]), 0),
                (2, w.buffer(bf16, &[11 * 64]), 0),
                (3, w.buffer(bf16, &[9 * 64]), 0),
            ],
            bytes: vec![],
            grid: [1, 1, 1],
            threads: [32, 4, 1],
            params: AttnParamsGpu {
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
            },
        }
    }

    fn run(mut self, w: &mut World) -> Result<()> {
        if !self.bytes.iter().any(|(index, _)| *index == 4) {
            self.bytes.push((4, as_bytes(&self.params).to_vec()));
        }
        let pipeline = w.registry.get_pipeline_with_constants(
            self.kernel,
            w.device.metal_device(),
            &self.bools,
            &self.ints,
        )?;
        let buffers = self.buffers.iter().map(|(i, b, offset)| match offset {
            0 => (*i, KernelArg::Buffer(b)),
            _ => (*i, KernelArg::BufferWithOffset(b, *offset)),
        });
        let bytes = self.bytes.iter().map(|(i, b)| (*i, KernelArg::Bytes(b)));
        let args: Vec<_> = buffers.chain(bytes).collect();
        w.encoder.encode_threadgroups_with_args(
            pipeline,
            &args,
            self.grid.into(),
            self.threads.into(),
        );
        w.encoder.commit_and_wait()
    }
}

fn raw(
    name: &'static str,
    words: &'static [&'static str],
    spoil: impl Fn(&mut World, &mut Raw) + 'static,
) -> Row {
    let failed = row(name, words, move |w| {
        let mut call = Raw::new(w);
        spoil(w, &mut call);
        call.run(w)
    });
    failed.gives("CommandBufferError")
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = anywhere();
    rows.extend(prefill());
    rows.extend(crate::dispatch_other::rows());
    rows.extend(launches());
    rows.extend(crate::dispatch_other::launch_rows());
    rows
}

/// What the encoder itself refuses, on every device.
fn anywhere() -> Vec<Row> {
    let invalid = |row: Row| row.gives("InvalidArgument");
    vec![
        invalid(raw("a view past its memory", &["slice_view"], |_, c| {
            c.buffers[0].1 = c.buffers[0].1.slice_view(2, 9 * 64);
        })),
        invalid(raw(
            "an offset past the buffer",
            &["buffer offset", "1408", "9999"],
            |_, c| {
                c.buffers[1].2 = 9999;
            },
        )),
        invalid(raw("out is K", &["buffer 3", "buffer 1"], |_, c| {
            c.buffers[3].1 = c.buffers[1].1.clone();
        })),
        invalid(raw(
            "out overlaps Q by an offset",
            &["buffer 3", "buffer 0"],
            |w, c| {
                let whole = w.buffer(DType::BF16, &[18 * 64]);
                c.buffers[0].1 = whole.slice_view(0, 9 * 64 + 1);
                (c.buffers[3].1, c.buffers[3].2) = (whole, 9 * 64 * 2);
            },
        )),
        invalid(raw("an index twice", &["buffer 2", "two"], |_, c| {
            let again = c.buffers[2].clone();
            c.buffers.push(again);
        })),
    ]
}

fn prefill() -> Vec<Row> {
    let mut rows = vec![
        raw("nothing bound", &["buffer"], |_, c| c.buffers.clear()),
        raw("params missing", &["buffer 4", "160 bytes", "0"], |_, c| {
            c.bytes.push((4, vec![]))
        }),
        raw(
            "params too short",
            &["buffer 4", "160 bytes", "159"],
            |_, c| {
                c.bytes.push((4, vec![1; 159]));
            },
        ),
        raw("params of zeros", &["head counts"], |_, c| {
            c.params = AttnParamsGpu::zeroed()
        }),
        raw("params of ones", &["negative size"], |_, c| {
            c.bytes.push((4, vec![255; 160]))
        }),
        raw("another head dim", &["head dim"], |_, c| c.params.d = 65),
        raw("a group of none", &["head counts"], |_, c| {
            c.params.gqa_factor = 0
        }),
        raw("a group that does not divide", &["head counts"], |_, c| {
            (c.params.h, c.params.gqa_factor) = (3, 2);
        }),
        raw("a negative batch", &["negative size"], |_, c| {
            c.params.b = -1
        }),
        raw("no queries", &["seq_len_q"], |_, c| c.params.ql = 0),
        raw("the most negative keys", &["negative size"], |_, c| {
            c.params.kl = i32::MIN
        }),
        raw("more queries than there are", &["buffer 0"], |_, c| {
            c.params.ql = 10
        }),
        raw("a great many keys", &["buffer 1"], |_, c| {
            c.params.kl = i32::MAX - 1023
        }),
        raw("a great many batches", &["buffer 0"], |_, c| {
            c.params.b = i32::MAX;
        }),
        raw("a negative stride", &["negative stride"], |_, c| {
            c.params.k_strides[2] = -64
        }),
        raw("a stride that overflows", &["overflow"], |_, c| {
            c.params.v_strides[2] = i64::MAX;
        }),
        raw("a stride past the buffer", &["buffer 2"], |_, c| {
            c.params.v_strides[2] = 65
        }),
        raw("outputs on one another", &["overlap"], |_, c| {
            c.params.o_strides = [0, 0, 0]
        }),
        raw("output rows that overlap by one", &["overlap"], |_, c| {
            c.params.o_strides[2] = 63
        }),
        raw("a scale that is no number", &["scale"], |_, c| {
            c.params.scale = f32::NAN
        }),
        raw("a softcap that is no number", &["softcap"], |_, c| {
            c.bools.push((312, true));
            c.params.softcapping = f32::NAN;
        }),
        raw("Q missing", &["buffer 0", "none"], |_, c| {
            c.buffers.remove(0);
        }),
        raw("out missing", &["buffer 3", "none"], |_, c| {
            c.buffers.remove(3);
        }),
        raw("out given as bytes", &["buffer 3", "bytes"], |_, c| {
            c.buffers.remove(3);
            c.bytes.push((3, vec![0; 9 * 128]));
        }),
        raw("Q off its alignment", &["buffer 0", "2 bytes"], |w, c| {
            let buffer = w.buffer(DType::BF16, &[9 * 64 + 1]);
            c.buffers[0] = (0, buffer, 1);
        }),
        raw("a mask said and not bound", &["buffer 5"], |_, c| {
            c.bools.push((300, true))
        }),
        raw("a mask without its cells", &["buffer 6"], |_, c| {
            c.bools.push((300, true));
            let params = AttnMaskParamsGpu {
                m_strides: [0, 0, 11],
            };
            c.bytes.push((5, as_bytes(&params).to_vec()));
        }),
        raw(
            "a mask with negative strides",
            &["negative stride"],
            |_, c| {
                c.bools.push((300, true));
                let params = AttnMaskParamsGpu {
                    m_strides: [0, 0, -1],
                };
                c.bytes.push((5, as_bytes(&params).to_vec()));
            },
        ),
        raw("an unknown mask dtype", &["dtype"], |_, c| {
            c.bools.push((300, true));
            c.ints.push((309, 77));
            let params = AttnMaskParamsGpu {
                m_strides: [0, 0, 11],
            };
            c.bytes.push((5, as_bytes(&params).to_vec()));
        }),
        raw("an unknown key dtype", &["dtype"], |_, c| {
            c.ints.push((310, -1))
        }),
        raw("keys in f32 under bf16", &["K and V"], |_, c| {
            c.ints.push((310, 1))
        }),
        raw("classes without a mask", &["blk"], |_, c| {
            c.bools.push((303, true))
        }),
        raw("sinks said and not bound", &["buffer 9"], |_, c| {
            c.bools.push((302, true))
        }),
        raw("slopes said and not bound", &["buffer 10"], |_, c| {
            c.bools.push((306, true))
        }),
        raw(
            "a log-sum-exp said and not bound",
            &["buffer 11"],
            |_, c| c.bools.push((307, true)),
        ),
        raw("a window said and not given", &["buffer 8"], |_, c| {
            c.bools.push((311, true))
        }),
        raw("a window of no key", &["window"], |_, c| {
            c.bools.push((311, true));
            c.bytes
                .push((8, as_bytes(&AttnExtraParamsGpu::zeroed()).to_vec()));
        }),
        raw("packed and no boundaries", &["buffer 12"], |_, c| {
            c.bools.push((308, true))
        }),
        raw(
            "packed with too few boundaries",
            &["buffer 13", "8 bytes", "4"],
            |_, c| {
                c.bools.push((308, true));
                c.bytes.push((12, vec![0; 8]));
                c.bytes.push((13, vec![0; 4]));
            },
        ),
        raw("packed with wild boundaries", &["cu_seqlens"], |_, c| {
            c.bools.push((308, true));
            c.bytes.push((8, vec![255; 32]));
            c.bytes.push((12, vec![7; 8]));
            c.bytes.push((13, vec![9; 8]));
        }),
        raw("packed past the buffers", &["buffer 0"], |_, c| {
            c.bools.push((308, true));
            c.bytes.push((8, vec![255; 32]));
            let cu = bytemuck::bytes_of(&[0u32, 1 << 30]).to_vec();
            c.bytes.extend([(12, cu.clone()), (13, cu)]);
        }),
        raw("pages said and not stated", &["buffer 16"], |_, c| {
            c.bools.push((313, true))
        }),
        raw("pages of 2,048 keys", &["page_size", "2048"], |_, c| {
            c.bools.push((313, true));
            c.bytes.push((16, in_pages(11)));
        }),
        raw("pages of a negative size", &["page_size"], |_, c| {
            c.bools.push((313, true));
            c.bytes.push((16, in_pages(-1)));
        }),
        raw("pages past the pool", &["buffer 1"], |_, c| {
            c.bools.push((313, true));
            c.bytes.push((16, in_pages(4)));
        }),
        raw("pages without a table", &["buffer 14"], |w, c| {
            for index in [1, 2] {
                c.buffers[index].1 = w.buffer(DType::BF16, &[16 * 64]);
            }
            c.bools.push((313, true));
            c.bytes.push((16, in_pages(4)));
        }),
        raw("lengths said and not bound", &["buffer 15"], |_, c| {
            c.bools.push((314, true));
            c.bytes.push((8, vec![255; 32]));
        }),
        raw("lengths and no extra params", &["buffer 8"], |_, c| {
            c.bools.push((314, true))
        }),
        raw(
            "packed queries and no boundaries",
            &["buffer 12"],
            |_, c| c.bools.push((315, true)),
        ),
    ];
    rows.push(raw(
        "a bool mask of the bool kernel too short",
        &["buffer 6", "99"],
        |w, c| {
            c.kernel = "flash_attn_prefill_bf16_d64_boolmask";
            c.bools.push((300, true));
            let params = AttnMaskParamsGpu {
                m_strides: [0, 0, 11],
            };
            c.bytes.push((5, as_bytes(&params).to_vec()));
            let mask = w.buffer(DType::U8, &[98]);
            c.buffers.push((6, mask, 0));
        },
    ));
    rows
}

/// One page for each sequence of a pool of one page of `2^shift` keys.
fn in_pages(shift: i32) -> Vec<u8> {
    let pages = AttnPagesParamsGpu {
        count: 1,
        shift,
        per_sequence: 1,
    };
    as_bytes(&pages).to_vec()
}

/// Right operands under a grid, a threadgroup or constants that say something else.
fn launches() -> Vec<Row> {
    let lse = |strides: Option<[i64; 2]>| {
        move |w: &mut World, c: &mut Raw| {
            c.bools.push((307, true));
            let lse = w.buffer(DType::F32, &[9]);
            c.buffers.push((11, lse, 0));
            if let Some(lse_strides) = strides {
                let extra = AttnExtraParamsGpu {
                    lse_strides,
                    ..Zeroable::zeroed()
                };
                c.bytes.push((8, as_bytes(&extra).to_vec()));
            }
        }
    };
    vec![
        raw("a grid of more tiles", &["grid", "[2, 1, 1]"], |_, c| {
            c.grid[0] = 2
        }),
        raw("a grid of more heads", &["grid", "[1, 2, 1]"], |_, c| {
            c.grid[1] = 2
        }),
        raw("a grid of more batches", &["grid"], |_, c| c.grid[2] = 2),
        raw("an empty grid", &["grid", "[0, 1, 1]"], |_, c| {
            c.grid[0] = 0
        }),
        raw("a grid past 32 bits", &["grid"], |_, c| c.grid[0] = 1 << 40),
        raw("too few simdgroups", &["threadgroup"], |_, c| {
            c.threads[1] = 2
        }),
        raw("too many simdgroups", &["threadgroup"], |_, c| {
            c.threads[1] = 8
        }),
        raw("other simdgroups by a constant", &["simdgroups"], |_, c| {
            c.ints.push((322, 8))
        }),
        raw("a log-sum-exp without strides", &["buffer 8"], lse(None)),
        raw(
            "a log-sum-exp with wild strides",
            &["log-sum-exp"],
            lse(Some([1 << 40, 1 << 20])),
        ),
    ]
}
