//! Random problems in memory, with poison wherever nothing may be read or written.

use std::ptr::null;

use half::{bf16, f16};

use crate::DType;
use crate::attention::oracle::{self, Inputs, Precision, Reference, Values};
use crate::attention::tolerance::{self, Comparison};
use crate::attention::{Problem, ProblemBuilder, Role, Shape};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::job::{Job, Pointers};
use crate::backend::cpu::kernels::table::{self, Kernels};
use crate::backend::cpu::kernels::types::Float;
use crate::backend::cpu::kernels::{self, Team};

/// Elements around outputs that must stay as they are.
const GUARD: usize = 48;

pub(super) fn shape(
    batch: usize,
    (heads, kv_heads): (usize, usize),
    (query_len, key_len): (usize, usize),
    head_dim: usize,
) -> Shape {
    Shape {
        batch,
        heads,
        kv_heads,
        query_len,
        key_len,
        qk_dim: head_dim,
        v_dim: head_dim,
    }
}

pub(super) fn build(builder: ProblemBuilder) -> Problem {
    builder.build().unwrap()
}

pub(super) fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// The kernels for K and V of `dtype`.
pub(super) fn kernels_for(isa: Isa, dtype: DType) -> &'static Kernels {
    table::select(isa, Float::of(dtype).unwrap())
}

/// The kernels for K and V of `dtype` of every instruction set here, and tiles in plain Rust, whose panels
/// are as wide as AVX-512's.
pub(super) fn everywhere(dtype: DType) -> Vec<(&'static str, &'static Kernels)> {
    let kernels = isas().map(|isa| (isa.name(), kernels_for(isa, dtype)));
    let tiles = (dtype == DType::BF16).then(|| ("plain tiles", table::plain_tiles()));
    kernels.chain(tiles).collect()
}

/// Uniform and normal numbers from a seed.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }

    pub(super) fn uniform(&mut self) -> f64 {
        self.below(1 << 40) as f64 / (1u64 << 40) as f64
    }

    pub(super) fn normal(&mut self) -> f64 {
        let (a, b) = (self.uniform().max(1e-12), self.uniform());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
}

/// Elements of any dtype, aligned for all.
#[derive(Debug, Clone)]
pub(super) struct Array {
    pub(super) dtype: DType,
    words: Vec<u64>,
    len: usize,
}

impl Array {
    /// NaN everywhere (bools: all true).
    fn poisoned(dtype: DType, len: usize) -> Self {
        let word = if dtype == DType::U8 {
            0x0101_0101_0101_0101
        } else {
            u64::MAX >> 1 | 1 << 31
        };
        let words = (len * dtype.size_of()).div_ceil(8) + 1;
        Self {
            dtype,
            words: vec![word; words],
            len,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len * self.dtype.size_of()]
    }

    pub(super) fn values(&self) -> Values<'_> {
        Values::from_bytes(self.dtype, self.bytes()).unwrap()
    }

    fn set(&mut self, i: usize, x: f64) {
        let size = self.dtype.size_of();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words);
        let to = &mut bytes[i * size..(i + 1) * size];
        match self.dtype {
            DType::BF16 => to.copy_from_slice(&bf16::from_f64(x).to_ne_bytes()),
            DType::F16 => to.copy_from_slice(&f16::from_f64(x).to_ne_bytes()),
            DType::F32 => to.copy_from_slice(&(x as f32).to_ne_bytes()),
            _ => to[0] = x as u8,
        }
    }
}

/// A problem with its inputs.
#[derive(Debug, Clone)]
pub(super) struct Data {
    pub(super) problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    mask: Option<Array>,
    classes: Option<Vec<u8>>,
    sinks: Option<Vec<f32>>,
    slopes: Option<Vec<f32>>,
}

/// A result: O and the log-sum-exp in the reference's order, and O as it lies in memory.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Output {
    pub(super) o: Vec<f64>,
    pub(super) lse: Vec<f32>,
    pub(super) bits: Vec<u8>,
}

impl Data {
    /// Unit normal Q, K and V, so that scores deviate by about 1 under the usual scale; a mask of
    /// zeros, sinks and slopes where the problem has them.
    pub(super) fn new(problem: Problem, seed: u64) -> Self {
        let shape = problem.shape();
        let operand = |role| {
            problem
                .operand(role)
                .map(|s| Array::poisoned(s.dtype, s.elements))
        };
        let mut data = Self {
            q: operand(Role::Query).unwrap(),
            k: operand(Role::Key).unwrap(),
            v: operand(Role::Value).unwrap(),
            mask: operand(Role::Mask),
            classes: None,
            sinks: None,
            slopes: None,
            problem: problem.clone(),
        };
        let mut random = Random::new(seed);
        for b in 0..shape.batch {
            let s = problem.sequence(b);
            for h in 0..shape.heads {
                for i in 0..s.query_len {
                    let at = problem.q_at(&s, h, i);
                    (0..shape.qk_dim).for_each(|d| data.q.set(at + d, random.normal()));
                }
            }
            for h in 0..shape.kv_heads {
                for j in 0..s.key_len {
                    let (k, v) = (problem.k_at(&s, h, j), problem.v_at(&s, h, j));
                    (0..shape.qk_dim).for_each(|d| {
                        data.k.set(k + d, random.normal());
                        data.v.set(v + d, random.normal());
                    });
                }
            }
        }
        if problem.has_sinks() {
            data.sinks = Some(
                (0..shape.heads)
                    .map(|_| random.normal() as f32 * 2.0)
                    .collect(),
            );
        }
        if problem.has_alibi() {
            data.slopes = Some((0..shape.heads).map(|h| 0.5 / (h + 1) as f32).collect());
        }
        if problem.mask().is_some() {
            data.set_mask(|_, _, _| 0.0);
        }
        data
    }

    /// Sets cell `(head, row, key)` of the mask in additive terms; bool masks take `-inf` as false.
    pub(super) fn set_mask(&mut self, mut cell: impl FnMut(usize, usize, usize) -> f64) {
        let mask = self.mask.as_mut().unwrap();
        for b in 0..self.problem.shape().batch {
            let s = self.problem.sequence(b);
            for h in 0..self.problem.shape().heads {
                for i in 0..s.query_len {
                    let at = self.problem.mask_at(&s, h, i);
                    for j in 0..s.key_len {
                        let x = cell(h, i, j);
                        let is_bool = mask.dtype == DType::U8;
                        // Any nonzero byte attends.
                        let x = if !is_bool {
                            x
                        } else if x == f64::NEG_INFINITY {
                            0.0
                        } else {
                            (1 + j % 255) as f64
                        };
                        mask.set(at + j, x);
                    }
                }
            }
        }
    }

    /// Sets every element of K and V of a key.
    pub(super) fn set_key(&mut self, (b, h, j): (usize, usize, usize), k: f64, v: f64) {
        let s = self.problem.sequence(b);
        let (k_at, v_at) = (self.problem.k_at(&s, h, j), self.problem.v_at(&s, h, j));
        for d in 0..self.problem.shape().qk_dim {
            self.k.set(k_at + d, k);
            self.v.set(v_at + d, v);
        }
    }

    pub(super) fn set_slopes(&mut self, slope: impl Fn(usize) -> f32) {
        self.slopes = Some((0..self.problem.shape().heads).map(slope).collect());
    }

    /// Sets one column of V of a key.
    pub(super) fn set_value(&mut self, (b, h, j): (usize, usize, usize), column: usize, v: f64) {
        let s = self.problem.sequence(b);
        let at = self.problem.v_at(&s, h, j) + column;
        self.v.set(at, v);
    }

    /// Runs the kernels their own way.
    pub(super) fn run_by(
        &self,
        kernels: &'static Kernels,
        way: impl FnOnce(&Job<'_>, &'static Kernels),
    ) -> Output {
        self.collect(|job| way(job, kernels))
    }

    pub(super) fn set_classes(&mut self, classes: Vec<u8>) {
        assert_eq!(
            classes.len(),
            self.problem.operand(Role::TileClasses).unwrap().elements
        );
        self.classes = Some(classes);
    }

    /// The same inputs' values under another problem of the same sizes.
    pub(super) fn with_problem(&self, problem: Problem) -> Self {
        let mut data = Self::new(problem, 0);
        let (from, to) = (&self.problem, data.problem.clone());
        let shape = from.shape();
        for b in 0..shape.batch {
            let (s, t) = (from.sequence(b), to.sequence(b));
            for d in 0..shape.qk_dim {
                for h in 0..shape.heads {
                    for i in 0..s.query_len {
                        data.q.set(
                            to.q_at(&t, h, i) + d,
                            self.q.values().get(from.q_at(&s, h, i) + d),
                        );
                    }
                }
                for h in 0..shape.kv_heads {
                    for j in 0..s.key_len {
                        let at = (to.k_at(&t, h, j) + d, to.v_at(&t, h, j) + d);
                        data.k
                            .set(at.0, self.k.values().get(from.k_at(&s, h, j) + d));
                        data.v
                            .set(at.1, self.v.values().get(from.v_at(&s, h, j) + d));
                    }
                }
            }
        }
        data
    }

    pub(super) fn reference(&self, precision: Precision) -> Reference {
        let inputs = Inputs {
            mask: self.mask.as_ref().map(Array::values),
            sinks: self.sinks.as_deref(),
            alibi_slopes: self.slopes.as_deref(),
            ..Inputs::new(self.q.values(), self.k.values(), self.v.values())
        };
        oracle::attention(&self.problem, &inputs, precision).unwrap()
    }

    pub(super) fn run(&self, isa: Isa, threads: usize) -> Output {
        self.run_with(kernels_for(isa, self.problem.kv_dtype()), threads)
    }

    /// Runs the kernels and checks that they wrote what they own and nothing else.
    pub(super) fn run_with(&self, kernels: &'static Kernels, threads: usize) -> Output {
        let team = Team {
            pool: None,
            threads,
        };
        self.collect(|job| {
            let run = || kernels::run_with(job, kernels, team).unwrap();
            if threads == 1 {
                run();
            } else {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                pool.install(run);
            }
        })
    }

    fn collect(&self, run: impl FnOnce(&Job<'_>)) -> Output {
        let problem = &self.problem;
        let shape = problem.shape();
        let elements = problem.operand(Role::Output).unwrap().elements;
        let mut o = Array::poisoned(problem.dtype(), elements + 2 * GUARD);
        let rows = problem.query_rows() * shape.heads * self.dense_batch();
        let untouched = f32::from_bits(0x7fc0_1234);
        let mut lse = vec![untouched; rows + 2 * GUARD];
        let before = o.bytes().to_vec();
        let size = problem.dtype().size_of();
        let o_at = o.words.as_mut_ptr().cast::<u8>().wrapping_add(GUARD * size);
        run(&self.job(o_at, lse.as_mut_ptr().wrapping_add(GUARD)));
        let mut owned = vec![false; elements + 2 * GUARD];
        let mut dense = vec![0.0; rows * shape.qk_dim];
        for b in 0..shape.batch {
            let s = problem.sequence(b);
            for h in 0..shape.heads {
                for i in 0..s.query_len {
                    let at = GUARD + problem.o_at(&s, h, i);
                    let row = oracle::reference_row(problem, &s, h, i);
                    for d in 0..shape.qk_dim {
                        owned[at + d] = true;
                        dense[row * shape.qk_dim + d] = o.values().get(at + d);
                    }
                }
            }
        }
        for (i, owned) in owned.iter().enumerate() {
            let cell = i * size..(i + 1) * size;
            assert!(
                *owned || o.bytes()[cell.clone()] == before[cell],
                "element {i} was touched"
            );
        }
        let edges = lse[..GUARD].iter().chain(&lse[rows + GUARD..]);
        assert!(
            edges
                .into_iter()
                .all(|x| x.to_bits() == untouched.to_bits())
        );
        Output {
            o: dense,
            lse: if problem.has_lse() {
                lse[GUARD..GUARD + rows].to_vec()
            } else {
                vec![]
            },
            bits: o.bytes()[GUARD * size..(GUARD + elements) * size].to_vec(),
        }
    }

    fn job(&self, o: *mut u8, lse: *mut f32) -> Job<'_> {
        let floats = |v: &Option<Vec<f32>>| v.as_ref().map_or(null(), |v| v.as_ptr());
        let at = Pointers {
            q: self.q.bytes().as_ptr(),
            k: self.k.bytes().as_ptr(),
            v: self.v.bytes().as_ptr(),
            o,
            mask: self.mask.as_ref().map_or(null(), |m| m.bytes().as_ptr()),
            tile_classes: self.classes.as_ref().map_or(null(), |c| c.as_ptr()),
            sinks: floats(&self.sinks),
            alibi_slopes: floats(&self.slopes),
            lse: if self.problem.has_lse() {
                lse
            } else {
                std::ptr::null_mut()
            },
            block_table: null(),
            key_lengths: null(),
        };
        Job {
            problem: &self.problem,
            at,
        }
    }

    /// Runs something on this problem with outputs that nobody looks at.
    pub(super) fn with_job<R: Send>(&self, body: impl FnOnce(&Job<'_>) -> R) -> R {
        let elements = self.problem.operand(Role::Output).unwrap().elements;
        let mut o = Array::poisoned(self.problem.dtype(), elements);
        let mut lse =
            vec![0.0; self.problem.query_rows() * self.problem.shape().heads * self.dense_batch()];
        body(&self.job(o.words.as_mut_ptr().cast(), lse.as_mut_ptr()))
    }

    fn dense_batch(&self) -> usize {
        if self.problem.cu_seqlens().is_some() {
            1
        } else {
            self.problem.shape().batch
        }
    }

    /// Holds every instruction set, and tiles in plain Rust, against the oracle; gives the largest relative
    /// error.
    pub(super) fn check(&self, what: &str) -> f64 {
        let (exact, naive) = (
            self.reference(Precision::Exact),
            self.reference(Precision::Naive),
        );
        let mut worst = 0.0f64;
        let dtype = self.problem.kv_dtype();
        for (name, kernels) in everywhere(dtype) {
            let got = self.run_with(kernels, 1);
            let result = tolerance::compare(&self.problem, &got.o, &exact, &naive);
            assert!(result.ok, "{what}, {name}: {result:?}");
            if self.problem.has_lse() {
                let (error, bound) = tolerance::compare_lse(&got.lse, &exact);
                assert!(
                    error <= bound,
                    "{what}, {name}: lse off by {error}, may be {bound}"
                );
            }
            worst = worst.max(result.rel_fro);
        }
        worst
    }

    pub(super) fn compare(&self, got: &[f64]) -> Comparison {
        let (exact, naive) = (
            self.reference(Precision::Exact),
            self.reference(Precision::Naive),
        );
        tolerance::compare(&self.problem, got, &exact, &naive)
    }
}
