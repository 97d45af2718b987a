//! Problems from arbitrary bytes, tame and extreme alike; shared by the property tests and the fuzz
//! target. Nothing here may panic but its own assertions.

use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::tolerance::compare;
use mlx_flash_attn::attention::{
    HEAD_DIMS, Layout, MaskSpec, Problem, QueryOffset, Role, Shape, Strides,
};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::verify::Random;
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice, Result};

/// Bytes read one after another; zeros when they run out.
pub(crate) struct Source<'a>(pub(crate) &'a [u8]);

impl Source<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    pub(crate) fn word(&mut self) -> u64 {
        (0..8).fold(0, |word, _| word << 8 | u64::from(self.byte()))
    }

    pub(crate) fn below(&mut self, n: u8) -> u8 {
        self.byte() % n
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// True once in `n`; false when bytes run out.
    pub(crate) fn rarely(&mut self, n: u8) -> bool {
        self.below(n) == n - 1
    }

    pub(crate) fn some<T>(&mut self, n: u8, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.rarely(n).then(|| read(self))
    }

    pub(crate) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[usize::from(self.byte()) % items.len()]
    }

    /// A size: mostly small, sometimes around a tile's edge, and if `wild` now and then absurd.
    pub(crate) fn size(&mut self, wild: bool) -> usize {
        match self.byte() {
            0..=179 => 1 + usize::from(self.below(20)),
            180..=239 => self.pick(&[31, 32, 33, 63, 64, 65, 100, 128, 129]),
            _ if !wild => 1 + usize::from(self.below(70)),
            240..=250 => self.pick(&[
                0,
                i32::MAX as usize,
                1 << 31,
                u32::MAX as usize,
                1 << 32,
                isize::MAX as usize,
                isize::MAX as usize / 8,
                usize::MAX,
                usize::MAX / 2,
                1 << 40,
            ]),
            _ => self.word() as usize,
        }
    }

    pub(crate) fn float(&mut self, wild: bool) -> f32 {
        if wild && self.rarely(4) {
            let special = [
                0.0,
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::MAX,
                -1.0,
                1e-45,
            ];
            return match self.flag() {
                true => self.pick(&special),
                false => f32::from_bits(self.word() as u32),
            };
        }
        f32::from(self.byte()) / 64.0
    }
}

/// Everything that a problem is built from, checked by nobody yet.
#[derive(Debug, Clone)]
pub(crate) struct Wild {
    pub(crate) dtype: DType,
    pub(crate) kv_dtype: Option<DType>,
    pub(crate) shape: Shape,
    pub(crate) packed: Option<(Vec<u32>, Vec<u32>)>,
    pub(crate) layout: Layout,
    pub(crate) capacity: Option<usize>,
    pub(crate) strides: [Option<Strides>; 4],
    pub(crate) mask: Option<MaskSpec>,
    pub(crate) causal: bool,
    pub(crate) offset: QueryOffset,
    pub(crate) window: Option<usize>,
    pub(crate) window_right: Option<usize>,
    /// Times `1 / sqrt(D)`.
    pub(crate) gain: Option<f32>,
    pub(crate) softcap: Option<f32>,
    pub(crate) tile_classes: bool,
    pub(crate) sinks: bool,
    pub(crate) alibi: bool,
    pub(crate) lse: bool,
    pub(crate) seed: u64,
}

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];
const ANY_DTYPE: [DType; 7] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::U8,
    DType::U16,
    DType::U32,
    DType::I32,
];
const ROLES: [Role; 4] = [Role::Query, Role::Key, Role::Value, Role::Output];

impl Wild {
    /// Reads a problem. Unless `wild`, every part is within reason, and most of them are valid.
    pub(crate) fn read(s: &mut Source<'_>, wild: bool) -> Self {
        let dtype = match wild && s.rarely(20) {
            true => s.pick(&ANY_DTYPE),
            false => s.pick(&DTYPES),
        };
        let kv_heads = 1 + usize::from(s.below(3));
        let dims = &HEAD_DIMS;
        let qk_dim = s.pick(dims);
        let mut shape = Shape {
            batch: 1 + usize::from(s.below(3)),
            heads: kv_heads * (1 + usize::from(s.below(3))),
            kv_heads,
            query_len: s.size(wild),
            key_len: s.size(wild),
            qk_dim,
            v_dim: if s.rarely(16) { s.pick(dims) } else { qk_dim },
        };
        if wild && s.rarely(4) {
            let size = s.size(true);
            match s.below(4) {
                0 => shape.batch = size,
                1 => shape.heads = size,
                2 => shape.kv_heads = size,
                _ => shape.qk_dim = size,
            }
        }
        let packed = s.some(5, |s| {
            let count = 1 + s.below(4);
            let mut lengths = || {
                let mut at = 0u32;
                let mut cu = vec![0];
                for _ in 0..count {
                    at = at.wrapping_add(match wild && s.rarely(10) {
                        true => s.word() as u32,
                        false => u32::from(s.below(30)),
                    });
                    cu.push(at);
                }
                cu
            };
            (lengths(), lengths())
        });
        let stride = |s: &mut Source<'_>| Strides {
            batch: s.size(true),
            head: s.size(true),
            seq: s.size(true),
        };
        let (rows, keys) = (shape.query_len, shape.key_len);
        let mask = s.some(2, |s| {
            let dtype = match wild && s.rarely(8) {
                true => s.pick(&ANY_DTYPE),
                false => s.pick(&[dtype, DType::BF16, DType::F32, DType::U8]),
            };
            match s.below(5) {
                0 => MaskSpec::plane(dtype, keys),
                1 => MaskSpec::broadcast(dtype, [shape.batch, shape.heads, rows, keys]),
                2 => MaskSpec::broadcast(dtype, [1, shape.heads, rows, keys]),
                3 => MaskSpec {
                    dtype,
                    batch_stride: keys,
                    head_stride: 0,
                    row_stride: 0,
                },
                _ => MaskSpec {
                    dtype,
                    batch_stride: s.size(wild),
                    head_stride: s.size(wild),
                    row_stride: s.size(wild),
                },
            }
        });
        Self {
            dtype,
            kv_dtype: s.some(8, |s| match wild {
                true => s.pick(&ANY_DTYPE),
                false if dtype == DType::F32 => DType::F16,
                false => dtype,
            }),
            shape,
            packed,
            layout: s.pick(&[Layout::HeadMajor, Layout::SeqMajor]),
            capacity: s.some(5, |s| keys.saturating_add(s.size(wild)).saturating_sub(2)),
            strides: [0; 4].map(|_| if wild { s.some(8, stride) } else { None }),
            mask,
            causal: s.flag(),
            offset: match s.below(4) {
                0 => QueryOffset::At(i64::from(s.byte()) - 128),
                1 => QueryOffset::BottomRight,
                2 if wild => QueryOffset::At(s.word() as i64 >> s.below(64)),
                _ => QueryOffset::At(0),
            },
            window: s.some(4, |s| match wild && s.rarely(4) {
                true => s.word() as usize,
                false => 1 + usize::from(s.below(40)),
            }),
            window_right: s.some(6, |s| match wild && s.rarely(4) {
                true => s.word() as usize,
                false => usize::from(s.below(20)),
            }),
            gain: s.some(3, |s| s.float(wild)),
            softcap: s.some(4, |s| s.float(wild)),
            tile_classes: wild && s.rarely(8),
            sinks: s.flag(),
            alibi: s.rarely(4),
            lse: s.flag(),
            seed: s.word(),
        }
    }

    /// Builds the problem, or says why it is none.
    pub(crate) fn build(&self) -> Result<Problem> {
        let s = &self.shape;
        let mut b = match &self.packed {
            None => Problem::builder(self.dtype, *s),
            Some((q, k)) => Problem::varlen(self.dtype, s.heads, s.kv_heads, s.qk_dim, q, k),
        };
        b = b
            .layout(self.layout)
            .causal(self.causal)
            .query_offset(self.offset)
            .tile_classes(self.tile_classes)
            .sinks(self.sinks)
            .alibi(self.alibi)
            .lse(self.lse);
        if let Some(dtype) = self.kv_dtype {
            b = b.kv_dtype(dtype);
        }
        if let Some(rows) = self.capacity {
            b = b.key_capacity(rows);
        }
        for (role, strides) in ROLES.into_iter().zip(self.strides) {
            if let Some(strides) = strides {
                b = b.strides(role, strides);
            }
        }
        if let Some(mask) = self.mask {
            b = b.mask(mask);
        }
        if let Some(w) = self.window {
            b = b.window(w);
        }
        if let Some(w) = self.window_right {
            b = b.window_right(w);
        }
        if let Some(gain) = self.gain {
            b = b.scale(gain / (s.qk_dim as f32).sqrt());
        }
        if let Some(c) = self.softcap {
            b = b.softcap(c);
        }
        b.build()
    }
}

/// How far [`check`] got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reached {
    Refused,
    TooLarge,
    Ran,
    Compared,
}

/// Builds, plans and, where it is small, runs a problem and compares it with the oracle.
///
/// "Small" is at most `most` products of Q and K, and as many elements in all.
pub(crate) fn check(wild: &Wild, device: &MlxDevice, most: usize) -> Reached {
    let Ok(problem) = wild.build() else {
        return Reached::Refused;
    };
    let served = device.supports(&problem);
    let shape = problem.shape();
    let sizes = [
        shape.batch,
        shape.heads,
        shape.query_len,
        shape.key_len,
        shape.qk_dim.max(shape.v_dim),
    ];
    let work = sizes
        .iter()
        .try_fold(1usize, |n, size| n.checked_mul(*size));
    let elements = Role::ALL
        .into_iter()
        .filter_map(|role| problem.operand(role))
        .try_fold(0usize, |n, spec| n.checked_add(spec.elements));
    let too_large = |n: Option<usize>| n.is_none_or(|n| n > most);
    if served.is_err() || too_large(work) || too_large(elements) {
        return Reached::TooLarge;
    }
    let mut random = Random::new(wild.seed);
    let mut buffer = |role: Role| -> Option<(MlxBuffer, Vec<u64>)> {
        let spec = problem.operand(role)?;
        let values = (0..spec.elements).map(|_| {
            let x = random.normal() as f32;
            match (role, spec.dtype) {
                (Role::Output | Role::Lse, _) => f32::NAN,
                (Role::Mask, DType::U8) => f32::from(u8::from(x > -0.5)),
                (Role::Mask, _) if x < -0.7 => f32::NEG_INFINITY,
                (Role::TileClasses, _) => x.abs() * 2.0,
                _ => x,
            }
        });
        let bytes = crate::common::to_bytes(&values.collect::<Vec<f32>>(), spec.dtype);
        let shape = vec![spec.elements];
        // An operand without elements may be any buffer.
        let room = bytes.len().max(spec.dtype.size_of());
        let mut buffer = device.alloc_buffer(room, spec.dtype, shape).unwrap();
        buffer.as_mut_slice::<u8>().unwrap()[..bytes.len()].copy_from_slice(&bytes);
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        Some((buffer, words))
    };
    let made = Role::ALL.map(&mut buffer);
    let at = |role: Role| made[role as usize].as_ref();
    let device_side = |role| at(role).map(|(buffer, _)| buffer);
    let [Some(q), Some(k), Some(v), Some(out)] = ROLES.map(device_side) else {
        panic!("a problem without Q, K, V or out: {problem:?}");
    };
    let operands = Operands {
        mask: device_side(Role::Mask),
        tile_classes: device_side(Role::TileClasses),
        sinks: device_side(Role::Sinks),
        alibi_slopes: device_side(Role::AlibiSlopes),
        lse: device_side(Role::Lse),
        ..Operands::new(q, k, v, out)
    };
    let mut encoder = device.command_encoder().unwrap();
    ops::attention(&mut encoder, &problem, &operands).unwrap();
    encoder.commit_and_wait().unwrap();

    let plain = wild.gain.is_none_or(|g| g.abs() <= 4.0)
        && wild.softcap.is_none_or(|c| (0.05..100.0).contains(&c))
        && !problem.has_tile_classes();
    // A bias is slope times distance in f32: far from the keys it cannot tell them apart, while the
    // oracle can.
    let near = match problem.query_offset() {
        QueryOffset::At(offset) => offset.abs() <= 4_096,
        QueryOffset::BottomRight => true,
    };
    if !plain || (problem.has_alibi() && !near) {
        return Reached::Ran;
    }
    let host = |role: Role| -> Option<&[u8]> {
        let (_, words) = at(role)?;
        let spec = problem.operand(role)?;
        Some(&bytemuck::cast_slice(words)[..spec.elements * spec.dtype.size_of()])
    };
    let values = |role: Role| {
        let spec = problem.operand(role)?;
        Values::from_bytes(spec.dtype, host(role)?).ok()
    };
    let inputs = Inputs {
        mask: values(Role::Mask),
        sinks: host(Role::Sinks).map(bytemuck::cast_slice),
        alibi_slopes: host(Role::AlibiSlopes).map(bytemuck::cast_slice),
        ..Inputs::new(
            values(Role::Query).unwrap(),
            values(Role::Key).unwrap(),
            values(Role::Value).unwrap(),
        )
    };
    let exact = oracle::attention(&problem, &inputs, Precision::Exact).unwrap();
    let naive = oracle::attention(&problem, &inputs, Precision::Naive).unwrap();
    let bytes = crate::common::bytes(out);
    let stored = Values::from_bytes(problem.dtype(), &bytes).unwrap();
    let mut got = vec![f64::NAN; exact.o.len()];
    for b in 0..shape.batch {
        let s = problem.sequence(b);
        for (h, i) in (0..shape.heads).flat_map(|h| (0..s.query_len).map(move |i| (h, i))) {
            let (from, to) = (
                problem.o_at(&s, h, i),
                oracle::reference_row(&problem, &s, h, i),
            );
            for d in 0..shape.v_dim {
                got[to * shape.v_dim + d] = stored.get(from + d);
            }
        }
    }
    let c = compare(&problem, &got, &exact, &naive);
    // Small problems make the naive error, and so the tolerance, a matter of luck; `verify` holds
    // the exact rule. Where sinks leave next to nothing, relative errors say nothing. Large biases
    // round in f32, whatever one does.
    let slack = if problem.has_alibi() { 64.0 } else { 4.0 };
    let close = c.max_abs <= 4.0 * c.tolerance || c.rel_fro <= slack * c.rel_tolerance;
    assert!(c.max_abs.is_finite() && close, "{c:?}\n{wild:#?}");
    for (row, lse) in exact.lse.iter().enumerate() {
        if *lse == f64::NEG_INFINITY {
            let row = &got[row * shape.v_dim..(row + 1) * shape.v_dim];
            assert!(row.iter().all(|x| *x == 0.0), "a hidden row\n{wild:#?}");
        }
    }
    Reached::Compared
}
