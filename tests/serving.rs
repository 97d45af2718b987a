//! Many sequences in one call: lengths of their own, pages, packed queries over either. Each sequence's rows are those of a
//! call of its own over dense keys, bit for bit on the CPU, whatever lies in rows, pages and table entries that are not its.
#![allow(clippy::unwrap_used)]

mod common;

use common::{assert_close, attend, bytes, devices, distance, download, normal, output, upload};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{
    KeyLengths, MaskSpec, Pages, Problem, ProblemBuilder, QueryOffset, Role, Shape, Strides,
};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxBuffer, MlxDevice, MlxError};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// Sequences of an engine.
struct Batch {
    dtype: DType,
    dim: usize,
    /// Queries and keys of each sequence.
    lengths: Vec<(usize, usize)>,
    /// Of each sequence: Q `[H, qL, D]`, K and V `[Hkv, kL, D]`.
    data: Vec<[Vec<f32>; 3]>,
}

/// Where the keys of a batch lie.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// `[B, Hkv, kL, D]` with room for so many more keys than the longest has.
    Dense { room: usize },
    /// Pages of so many keys, `[pages, Hkv, page_size, D]` or, `rows_first`, `[pages, page_size, Hkv, D]`.
    Pages { size: usize, rows_first: bool },
}

/// How a batch is asked for.
#[derive(Debug, Clone, Copy)]
struct Form {
    place: Place,
    packed_queries: bool,
    lengths_on_device: bool,
    build: fn(ProblemBuilder) -> ProblemBuilder,
}

/// K and V of a batch where a form has them.
struct Pool {
    k: Vec<f32>,
    v: Vec<f32>,
    strides: Strides,
    pages: Option<(Pages, Vec<i32>)>,
}

impl Batch {
    fn new(seed: u64, dtype: DType, dim: usize, lengths: &[(usize, usize)]) -> Self {
        let draw = |(i, (queries, keys)): (usize, &(usize, usize))| {
            let of = |n: u64, count| normal(seed + 10 * i as u64 + n, count, dtype);
            [
                of(0, HEADS * queries * dim),
                of(1, KV_HEADS * keys * dim),
                of(2, KV_HEADS * keys * dim),
            ]
        };
        Self {
            dtype,
            dim,
            lengths: lengths.to_vec(),
            data: lengths.iter().enumerate().map(draw).collect(),
        }
    }

    fn shape(&self, batch: usize, query_len: usize, key_len: usize) -> Shape {
        Shape {
            batch,
            heads: HEADS,
            kv_heads: KV_HEADS,
            query_len,
            key_len,
            qk_dim: self.dim,
            v_dim: self.dim,
        }
    }

    fn longest(&self) -> usize {
        self.lengths.iter().map(|(_, keys)| *keys).max().unwrap()
    }

    /// O of each sequence in a call of its own; zeros without keys.
    fn alone(&self, device: &MlxDevice, form: Form) -> Vec<Vec<u8>> {
        let of = |(lengths, [q, k, v]): (&(usize, usize), &[Vec<f32>; 3])| {
            if lengths.0 == 0 || lengths.1 == 0 {
                return vec![0; q.len() * self.dtype.size_of()];
            }
            let shape = self.shape(1, lengths.0, lengths.1);
            let problem = (form.build)(Problem::builder(self.dtype, shape));
            let buffer = |x: &[f32]| upload(device, x, self.dtype, &[x.len()]);
            let out = output(device, q.len(), self.dtype);
            let (q, k, v) = (buffer(q), buffer(k), buffer(v));
            let operands = Operands::new(&q, &k, &v, &out);
            attend(device, &problem.build().unwrap(), &operands);
            bytes(&out)
        };
        self.lengths.iter().zip(&self.data).map(of).collect()
    }

    /// NaN but for the rows of the batch; the pages of a sequence are those that a walk over all pages by a step meets.
    fn pool(&self, place: Place) -> Pool {
        let (dim, longest) = (self.dim, self.longest());
        let (strides, len, pages) = match place {
            Place::Dense { room } => {
                let capacity = longest + room;
                let strides = Strides {
                    batch: KV_HEADS * capacity * dim,
                    head: capacity * dim,
                    seq: dim,
                };
                (strides, self.lengths.len() * strides.batch, None)
            }
            Place::Pages { size, rows_first } => {
                let strides = Strides {
                    batch: KV_HEADS * size * dim,
                    head: if rows_first { dim } else { size * dim },
                    seq: if rows_first { KV_HEADS * dim } else { dim },
                };
                let used: usize = self
                    .lengths
                    .iter()
                    .map(|(_, keys)| keys.div_ceil(size))
                    .sum();
                let count = (used + 3).next_power_of_two();
                let per_sequence = longest.div_ceil(size) + 1;
                // Entries that stand for no key name no page.
                let odd = [-1, i32::MIN, i32::MAX, i32::try_from(count).unwrap()];
                let mut table: Vec<i32> = (0..self.lengths.len() * per_sequence)
                    .map(|i| odd[i % 4])
                    .collect();
                let mut next = 0;
                for (b, (_, keys)) in self.lengths.iter().enumerate() {
                    for i in 0..keys.div_ceil(size) {
                        // An odd step meets each of a power of two once.
                        table[b * per_sequence + i] =
                            i32::try_from((next * 5 + 3) % count).unwrap();
                        next += 1;
                    }
                }
                let pages = Pages {
                    count,
                    page_size: size,
                    per_sequence,
                };
                (strides, count * strides.batch, Some((pages, table)))
            }
        };
        let place = |of: usize| {
            let mut pool = vec![f32::NAN; len];
            for (b, (_, keys)) in self.lengths.iter().enumerate() {
                for (h, j) in (0..KV_HEADS * keys).map(|n| (n / keys, n % keys)) {
                    let (batch, position) = match &pages {
                        None => (b, j),
                        Some((pages, table)) => {
                            let row = pages.row(table, b, j).unwrap();
                            (row.batch, row.position)
                        }
                    };
                    let to = batch * strides.batch + h * strides.head + position * strides.seq;
                    let from = (h * keys + j) * dim;
                    pool[to..to + dim].copy_from_slice(&self.data[b][of][from..from + dim]);
                }
            }
            pool
        };
        Pool {
            k: place(1),
            v: place(2),
            strides,
            pages,
        }
    }

    /// The problem of a form over a pool.
    fn problem(&self, form: Form, pool: &Pool) -> Problem {
        let (batch, longest) = (self.lengths.len(), self.longest());
        let builder = if form.packed_queries {
            let mut cu = vec![0];
            for (queries, _) in &self.lengths {
                cu.push(cu[cu.len() - 1] + u32::try_from(*queries).unwrap());
            }
            Problem::varlen_queries(self.dtype, HEADS, KV_HEADS, longest, self.dim, &cu)
        } else {
            Problem::builder(self.dtype, self.shape(batch, self.lengths[0].0, longest))
        };
        let builder = (form.build)(builder)
            .strides(Role::Key, pool.strides)
            .strides(Role::Value, pool.strides);
        let builder = match &pool.pages {
            Some((pages, _)) => builder.pages(*pages),
            None => builder,
        };
        let lengths = self
            .lengths
            .iter()
            .map(|(_, keys)| u32::try_from(*keys).unwrap());
        builder
            .key_lengths(if form.lengths_on_device {
                KeyLengths::Device
            } else {
                KeyLengths::Host(lengths.collect())
            })
            .build()
            .unwrap()
    }

    /// O of each sequence in one call of the form; None where the device has no such kernel.
    fn together(&self, device: &MlxDevice, form: Form) -> Option<Vec<Vec<u8>>> {
        let pool = self.pool(form.place);
        let problem = self.problem(form, &pool);
        device.supports(&problem).ok()?;
        let rows: usize = self.lengths.iter().map(|(queries, _)| queries).sum();
        let dim = self.dim;
        // Packed queries are [total, H, D].
        let at = |b: usize, h: usize, i: usize| {
            let before: usize = self.lengths[..b].iter().map(|(queries, _)| queries).sum();
            if form.packed_queries {
                ((before + i) * HEADS + h) * dim
            } else {
                ((b * HEADS + h) * self.lengths[0].0 + i) * dim
            }
        };
        let each = || {
            let all = self.lengths.iter().enumerate();
            all.flat_map(|(b, (queries, _))| {
                (0..HEADS * queries).map(move |n| (b, n / queries, n % queries, n))
            })
        };
        let mut q = vec![0.0; rows * HEADS * dim];
        for (b, h, i, n) in each() {
            q[at(b, h, i)..][..dim].copy_from_slice(&self.data[b][0][n * dim..][..dim]);
        }
        let buffer = |x: &[f32]| upload(device, x, self.dtype, &[x.len()]);
        let (q, k, v) = (buffer(&q), buffer(&pool.k), buffer(&pool.v));
        let out = output(device, rows * HEADS * dim, self.dtype);
        let table = pool
            .pages
            .map(|(_, table)| integers(device, &table, DType::I32));
        let lengths: Vec<u32> = self
            .lengths
            .iter()
            .map(|(_, keys)| u32::try_from(*keys).unwrap())
            .collect();
        let lengths = form.lengths_on_device.then(|| {
            integers(
                device,
                &lengths,
                [DType::U32, DType::I32][lengths.len() % 2],
            )
        });
        let operands = Operands {
            block_table: table.as_ref(),
            key_lengths: lengths.as_ref(),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(device, &problem, &operands);
        let (got, size) = (bytes(&out), self.dtype.size_of());
        let mut of_each = vec![Vec::new(); self.lengths.len()];
        for (b, h, i, _) in each() {
            of_each[b].extend_from_slice(&got[at(b, h, i) * size..][..dim * size]);
        }
        Some(of_each)
    }
}

fn integers<T: bytemuck::Pod>(device: &MlxDevice, values: &[T], dtype: DType) -> MlxBuffer {
    device
        .buffer_from_slice(values, dtype, vec![values.len()])
        .unwrap()
}

fn values(bytes: &[u8], device: &MlxDevice, dtype: DType) -> Vec<f32> {
    let count = bytes.len() / dtype.size_of();
    let mut buffer = device
        .alloc_buffer(bytes.len(), dtype, vec![count])
        .unwrap();
    buffer.as_mut_slice::<u8>().unwrap().copy_from_slice(bytes);
    download(&buffer)
}

/// Each device that serves the form gives each sequence what it has alone; the CPU serves all.
fn agrees(batch: &Batch, form: Form) {
    for device in devices() {
        let Some(got) = batch.together(&device, form) else {
            assert!(device.kind() != DeviceKind::Cpu, "{form:?}");
            continue;
        };
        for (b, (got, want)) in got.iter().zip(batch.alone(&device, form)).enumerate() {
            let what = || {
                format!(
                    "{} {} d{} {form:?}: sequence {b}",
                    device.kind(),
                    batch.dtype,
                    batch.dim
                )
            };
            if device.kind() == DeviceKind::Cpu {
                assert!(*got == want, "{}", what());
            } else if !want.is_empty() {
                let [got, want] = [got, &want].map(|x| values(x, &device, batch.dtype));
                let want: Vec<f64> = want.into_iter().map(f64::from).collect();
                assert!(
                    distance(&got, &want) <= 2.0 * relative_bound(batch.dtype),
                    "{}",
                    what()
                );
            }
        }
    }
}

const BUILDS: [fn(ProblemBuilder) -> ProblemBuilder; 4] = [
    |b| b,
    |b| {
        b.causal(true)
            .query_offset(QueryOffset::BottomRight)
            .softcap(3.0)
    },
    |b| {
        b.causal(true)
            .window(37)
            .query_offset(QueryOffset::BottomRight)
    },
    |b| {
        b.query_offset(QueryOffset::BottomRight)
            .window(20)
            .window_right(3)
    },
];

const PLACES: [Place; 7] = [
    Place::Dense { room: 0 },
    Place::Dense { room: 9 },
    Place::Pages {
        size: 1,
        rows_first: false,
    },
    Place::Pages {
        size: 4,
        rows_first: true,
    },
    Place::Pages {
        size: 16,
        rows_first: false,
    },
    Place::Pages {
        size: 64,
        rows_first: true,
    },
    Place::Pages {
        size: 1024,
        rows_first: false,
    },
];

/// Every place with every bound; dtype, head dim and kind of lengths take turns.
fn every_form(lengths: &[(usize, usize)], packed_queries: bool) {
    let kinds = [
        (DType::F32, 64),
        (DType::BF16, 128),
        (DType::F16, 80),
        (DType::BF16, 512),
        (DType::F32, 40),
    ];
    // Of wide heads a few keys do.
    let long = lengths.iter().any(|(_, keys)| *keys > 1000);
    let kinds = kinds.into_iter().filter(|(_, dim)| !long || *dim < 128);
    let batches: Vec<_> = kinds
        .map(|(dtype, dim)| Batch::new(3, dtype, dim, lengths))
        .collect();
    for (n, place) in PLACES.into_iter().enumerate() {
        for (m, build) in BUILDS.into_iter().enumerate() {
            let form = Form {
                place,
                packed_queries,
                lengths_on_device: (n + m) % 2 == 1,
                build,
            };
            agrees(&batches[(n + 2 * m) % batches.len()], form);
        }
    }
}

#[test]
fn decode_of_sequences_of_any_length() {
    every_form(&[(1, 130), (1, 1), (1, 0), (1, 77), (1, 64)], false);
}

#[test]
fn decode_over_keys_in_chunks() {
    every_form(&[(1, 1300), (1, 3), (1, 1025)], false);
}

#[test]
fn few_and_many_queries_of_sequences_of_any_length() {
    every_form(&[(21, 300), (21, 21), (21, 0)], false);
    every_form(&[(3, 300), (3, 5)], false);
}

#[test]
fn chunks_of_prompts_beside_tokens() {
    every_form(&[(1, 90), (40, 200), (0, 10), (7, 7), (2, 0)], true);
}

/// Where a row sees a key of a table entry that names no page, this is an error on the CPU, and page 0 stands for it on a
/// GPU. Where no row does, the entry may hold anything.
#[test]
fn an_entry_that_names_no_page_is_an_error_or_page_0_where_a_key_is_seen() {
    let batch = Batch::new(5, DType::F32, 64, &[(1, 40)]);
    let windowed = |b: ProblemBuilder| {
        b.causal(true)
            .window(8)
            .query_offset(QueryOffset::BottomRight)
    };
    let form = Form {
        place: Place::Pages {
            size: 4,
            rows_first: false,
        },
        packed_queries: false,
        lengths_on_device: false,
        build: windowed,
    };
    let pool = batch.pool(form.place);
    let problem = batch.problem(form, &pool);
    let (pages, table) = pool.pages.unwrap();
    let run = |device: &MlxDevice, entry: usize, page: i32| {
        let mut table = table.clone();
        table[entry] = page;
        let buffer = |x: &[f32]| upload(device, x, DType::F32, &[x.len()]);
        let (q, k, v) = (buffer(&batch.data[0][0]), buffer(&pool.k), buffer(&pool.v));
        let out = output(device, HEADS * 64, DType::F32);
        let table = integers(device, &table, DType::I32);
        let operands = Operands {
            block_table: Some(&table),
            ..Operands::new(&q, &k, &v, &out)
        };
        let mut encoder = device.command_encoder().unwrap();
        ops::attention(&mut encoder, &problem, &operands).unwrap();
        encoder.commit_and_wait().map(|()| bytes(&out))
    };
    for device in devices() {
        if device.supports(&problem).is_err() {
            continue;
        }
        // The window shows keys 32 to 39: entries 8 and 9.
        let want = run(&device, 9, table[9]).unwrap();
        for hidden in [-1, i32::MAX] {
            assert_eq!(run(&device, 7, hidden).unwrap(), want);
        }
        for wrong in [-1, i32::MAX, i32::try_from(pages.count).unwrap()] {
            let ran = run(&device, 8, wrong);
            if device.kind() != DeviceKind::Cpu {
                assert_eq!(ran, run(&device, 8, 0), "{wrong}");
                continue;
            }
            let error = ran.unwrap_err();
            assert!(
                matches!(
                    error,
                    MlxError::InvalidArgument(_) | MlxError::CommandBufferError(_)
                ),
                "{error}"
            );
            assert!(error.to_string().contains("block_table"), "{error}");
        }
    }
}

/// A mask of each batch entry, sinks, slopes and the log-sum-exp, over pages and lengths from the device.
#[test]
fn masks_sinks_and_slopes_follow_each_length() {
    for queries in [1, 5, 30] {
        let batch = Batch::new(
            9,
            DType::F32,
            64,
            &[(queries, 150), (queries, 33), (queries, 0)],
        );
        let form = Form {
            place: Place::Pages {
                size: 8,
                rows_first: false,
            },
            packed_queries: false,
            lengths_on_device: true,
            build: |b| {
                b.causal(true)
                    .query_offset(QueryOffset::BottomRight)
                    .mask(MaskSpec {
                        batch_stride: HEADS * 150,
                        head_stride: 150,
                        row_stride: 0,
                        ..MaskSpec::plane(DType::F32, 150)
                    })
                    .sinks(true)
                    .alibi(true)
                    .lse(true)
            },
        };
        let pool = batch.pool(form.place);
        let problem = batch.problem(form, &pool);
        let (_, table) = pool.pages.unwrap();
        let q: Vec<f32> = batch.data.iter().flat_map(|[q, ..]| q.clone()).collect();
        let mut mask = normal(10, 3 * HEADS * 150, DType::F32);
        mask.iter_mut()
            .step_by(7)
            .for_each(|x| *x = f32::NEG_INFINITY);
        let (sinks, slopes) = ([0.5, -1.0, 2.0, 0.0], [0.5, 0.25, 0.125, 0.0625]);
        let lengths = [150, 33, 0];
        let want = oracle::attention(
            &problem,
            &Inputs {
                mask: Some(Values::F32(&mask)),
                sinks: Some(&sinks),
                alibi_slopes: Some(&slopes),
                block_table: Some(&table),
                key_lengths: Some(&lengths),
                ..Inputs::new(Values::F32(&q), Values::F32(&pool.k), Values::F32(&pool.v))
            },
            Precision::Exact,
        )
        .unwrap();
        for device in devices() {
            if device.supports(&problem).is_err() {
                assert!(device.kind() != DeviceKind::Cpu);
                continue;
            }
            let buffer = |x: &[f32]| upload(&device, x, DType::F32, &[x.len()]);
            let (q, k, v, mask) = (buffer(&q), buffer(&pool.k), buffer(&pool.v), buffer(&mask));
            let (sinks, slopes) = (buffer(&sinks), buffer(&slopes));
            let (table, lengths) = (
                integers(&device, &table, DType::I32),
                integers(&device, &lengths, DType::U32),
            );
            let rows = 3 * HEADS * queries;
            let (out, lse) = (
                output(&device, rows * 64, DType::F32),
                output(&device, rows, DType::F32),
            );
            let operands = Operands {
                mask: Some(&mask),
                sinks: Some(&sinks),
                alibi_slopes: Some(&slopes),
                lse: Some(&lse),
                block_table: Some(&table),
                key_lengths: Some(&lengths),
                ..Operands::new(&q, &k, &v, &out)
            };
            attend(&device, &problem, &operands);
            let what = format!("{} {queries} queries", device.kind());
            assert_close(&what, &download(&out), &want.o, DType::F32);
            for (got, want) in download(&lse).iter().zip(&want.lse) {
                let (got, want) = (f64::from(*got), *want);
                assert!(
                    got == want || (got - want).abs() < 1e-4,
                    "{what}: {got} for {want}"
                );
            }
        }
    }
}
