//! Sequences of different lengths as an engine holds them: alone, padded, or in pages.

use crate::common::{Build, attend, bytes, download, normal, output, shape, upload};
use mlx_flash_attn::attention::{KeyLengths, Pages, Problem, Role, Shape, Strides};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice};

pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;

/// Sequences of an engine.
pub(crate) struct Batch {
    pub(crate) dtype: DType,
    pub(crate) dim: usize,
    /// Queries and keys of each sequence.
    pub(crate) lengths: Vec<(usize, usize)>,
    /// The pages of a sequence are those that a walk over all pages by this odd step meets.
    pub(crate) step: usize,
    /// Of each sequence: Q `[H, qL, D]`, K and V `[Hkv, kL, D]`.
    pub(crate) data: Vec<[Vec<f32>; 3]>,
}

/// Where the keys of a batch lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Place {
    /// `[B, Hkv, kL, D]` with room for so many more keys than the longest has.
    Dense { room: usize },
    /// Pages of so many keys, `[pages, Hkv, page_size, D]` or, `rows_first`, `[pages, page_size, Hkv, D]`.
    Pages { size: usize, rows_first: bool },
}

/// How a batch is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) place: Place,
    pub(crate) packed_queries: bool,
    pub(crate) lengths_on_device: bool,
    pub(crate) build: Build,
}

/// K and V of a batch where a form has them.
pub(crate) struct Pool {
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    strides: Strides,
    pub(crate) pages: Option<(Pages, Vec<i32>)>,
}

impl Batch {
    pub(crate) fn new(seed: u64, dtype: DType, dim: usize, lengths: &[(usize, usize)]) -> Self {
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
            step: 5,
            data: lengths.iter().enumerate().map(draw).collect(),
        }
    }

    fn shape(&self, batch: usize, query_len: usize, key_len: usize) -> Shape {
        shape([batch, HEADS, KV_HEADS], (query_len, key_len), self.dim)
    }

    fn longest(&self) -> usize {
        self.lengths.iter().map(|(_, keys)| *keys).max().unwrap()
    }

    /// O of each sequence in a call of its own; zeros without keys.
    pub(crate) fn alone(&self, device: &MlxDevice, form: Form) -> Vec<Vec<u8>> {
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

    /// NaN but for the rows of the batch.
    pub(crate) fn pool(&self, place: Place) -> Pool {
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
                            i32::try_from((next * self.step + 3) % count).unwrap();
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
    pub(crate) fn problem(&self, form: Form, pool: &Pool) -> Problem {
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
    pub(crate) fn together(&self, device: &MlxDevice, form: Form) -> Option<Vec<Vec<u8>>> {
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

pub(crate) fn integers<T: bytemuck::Pod>(
    device: &MlxDevice,
    values: &[T],
    dtype: DType,
) -> MlxBuffer {
    device
        .buffer_from_slice(values, dtype, vec![values.len()])
        .unwrap()
}

pub(crate) fn values(bytes: &[u8], device: &MlxDevice, dtype: DType) -> Vec<f32> {
    let count = bytes.len() / dtype.size_of();
    let mut buffer = device
        .alloc_buffer(bytes.len(), dtype, vec![count])
        .unwrap();
    buffer.as_mut_slice::<u8>().unwrap().copy_from_slice(bytes);
    download(&buffer)
}
