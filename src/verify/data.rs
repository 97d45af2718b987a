//! Seeded operands: unit normal where a kernel may read, poison everywhere else.

use half::{bf16, f16};

use super::blocks::{self, BLOCK};
use super::case::{Bounds, Case, MaskKind};
use super::random::Random;
use super::sequences::operand_sequence;
use crate::attention::oracle::{Inputs, Values};
use crate::attention::{Format, Problem, QueryOffset, Role, Sequence};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// An operand on the host, on 8 bytes.
#[derive(Debug, Clone)]
pub(super) struct Host {
    words: Vec<u64>,
    dtype: DType,
    elements: usize,
    /// What its elements, here in f32, are stored in for the device.
    blocks: Option<Format>,
}

impl Host {
    /// `elements` elements of poison.
    pub(super) fn poisoned(dtype: DType, elements: usize) -> Self {
        let bytes = elements * dtype.size_of();
        let mut host = Self {
            words: vec![0; bytes.div_ceil(8)],
            dtype,
            elements,
            blocks: None,
        };
        (0..elements).for_each(|i| host.poison(i));
        host
    }

    /// The same for as many elements of K or V as are stored in an operand of so many.
    fn poisoned_as(format: Format, stored: usize) -> Self {
        if let Format::Plain(dtype) = format {
            return Self::poisoned(dtype, stored);
        }
        Self {
            blocks: Some(format),
            ..Self::poisoned(DType::F32, format.elements(stored))
        }
    }

    /// Rounds blocks to what they stand for.
    fn settle(&mut self) {
        let Some(format) = self.blocks else {
            return;
        };
        let x: &mut [f32] = bytemuck::cast_slice_mut(&mut self.words);
        for block in x[..self.elements].chunks_exact_mut(BLOCK) {
            if block.iter().all(|x| x.is_finite()) {
                let stands_for = blocks::decode(format, &blocks::encode(format, block));
                block.copy_from_slice(&stands_for);
            }
        }
    }

    /// As the device gets it.
    pub(super) fn stored(&self) -> Self {
        let Some(format) = self.blocks else {
            return self.clone();
        };
        let x: &[f32] = bytemuck::cast_slice(&self.words);
        let of_each = x[..self.elements].chunks_exact(BLOCK);
        let bytes: Vec<u8> = of_each
            .flat_map(|block| blocks::encode(format, block))
            .collect();
        Self::of_integers(DType::U8, &bytes)
    }

    /// The integers of an index operand.
    pub(super) fn of_integers<T: bytemuck::Pod>(dtype: DType, values: &[T]) -> Self {
        let mut host = Self::poisoned(dtype, values.len());
        let bytes: &[u8] = bytemuck::cast_slice(values);
        bytemuck::cast_slice_mut(&mut host.words)[..bytes.len()].copy_from_slice(bytes);
        host
    }

    /// Bits that spoil whatever they get into: NaNs of either kind and infinities; for booleans,
    /// classes and integers, all ones.
    fn poison(&mut self, i: usize) {
        let value = [f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY][i % 4];
        match self.dtype {
            DType::F32 | DType::F16 | DType::BF16 => self.set(i, value),
            _ => self.set(i, 255.0),
        }
    }

    pub(super) fn set(&mut self, i: usize, value: f32) {
        let size = self.dtype.size_of();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words);
        let at = &mut bytes[i * size..(i + 1) * size];
        match self.dtype {
            DType::F32 => at.copy_from_slice(&value.to_ne_bytes()),
            DType::F16 => at.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
            DType::BF16 => at.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
            _ => at.fill(value as u8),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.elements * self.dtype.size_of()]
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    fn values(&self) -> Result<Values<'_>> {
        Values::from_bytes(self.dtype, self.bytes())
    }
}

/// A case's problem with its operands on the host.
#[derive(Debug, Clone)]
pub struct Data {
    /// The problem.
    pub problem: Problem,
    pub(super) q: Host,
    pub(super) k: Host,
    pub(super) v: Host,
    pub(super) mask: Option<Host>,
    pub(super) sinks: Option<Vec<f32>>,
    pub(super) alibi_slopes: Option<Vec<f32>>,
    pub(super) block_table: Option<Vec<i32>>,
    pub(super) key_lengths: Option<Vec<u32>>,
}

impl Data {
    /// Draws a case's operands; the same every time.
    ///
    /// # Errors
    /// Where the case states no problem.
    pub fn of(case: &Case) -> Result<Self> {
        let problem = case.problem()?;
        let mut random = Random::new(case.seed());
        let shape = problem.shape();
        let block_table = case.sequences.block_table(&problem, case.seed());
        let key_lengths = case.sequences.operand(case.key_len);
        let sequence = |b| operand_sequence(&problem, key_lengths.as_deref(), b);
        let mut operand = |role| {
            let spec = problem
                .operand(role)
                .ok_or_else(|| MlxError::expected(role.name(), "an operand", "none"))?;
            let mut host = match role {
                Role::Key => Host::poisoned_as(problem.key_format(), spec.elements),
                Role::Value => Host::poisoned_as(problem.value_format(), spec.elements),
                _ => Host::poisoned(spec.dtype, spec.elements),
            };
            for b in 0..shape.batch {
                let s = sequence(b);
                let (heads, rows, width) = match role {
                    Role::Query => (shape.heads, s.query_len, shape.qk_dim),
                    Role::Key => (shape.kv_heads, s.key_len, shape.qk_dim),
                    _ => (shape.kv_heads, s.key_len, shape.v_dim),
                };
                for (h, i) in (0..heads).flat_map(|h| (0..rows).map(move |i| (h, i))) {
                    let key_row = || {
                        let row = problem.key_row(&s, i, block_table.as_deref());
                        row.ok_or_else(|| MlxError::expected("block_table", "a page", "none"))
                    };
                    let at = match role {
                        Role::Query => problem.q_at(&s, h, i),
                        Role::Key => problem.k_of(key_row()?, h),
                        _ => problem.v_of(key_row()?, h),
                    };
                    for d in 0..width {
                        host.set(at + d, random.normal() as f32);
                    }
                }
            }
            host.settle();
            Ok::<_, MlxError>(host)
        };
        let (q, k, v) = (
            operand(Role::Query)?,
            operand(Role::Key)?,
            operand(Role::Value)?,
        );
        let mask = match (problem.operand(Role::Mask), case.built) {
            (None, _) => None,
            (Some(spec), built) => {
                let mut host = Host::poisoned(spec.dtype, spec.elements);
                match built {
                    Some(bounds) => fill_built(&mut host, &problem, &bounds),
                    None => {
                        let all = (0..shape.batch).map(sequence);
                        fill_mask(&mut host, case, &problem, all, &mut random);
                    }
                }
                Some(host)
            }
        };
        let heads = shape.heads as i32;
        // Unlike magnitudes, one of them well above the scores.
        let sinks = (0..shape.heads).map(|h| random.normal() as f32 + [0.0, 3.0, -2.0][h % 3]);
        let slopes = (0..heads).map(|h| 2.0f32.powi(-(h + 1) * 8 / heads.max(4)));
        let (sinks, slopes) = (sinks.collect(), slopes.collect());
        Ok(Self {
            sinks: problem.has_sinks().then_some(sinks),
            alibi_slopes: problem.has_alibi().then_some(slopes),
            block_table,
            key_lengths,
            problem,
            q,
            k,
            v,
            mask,
        })
    }

    /// Sequence `b` of the problem with the keys that it has, which the operand of key lengths says if there is
    /// one.
    pub fn sequence(&self, b: usize) -> Sequence {
        operand_sequence(&self.problem, self.key_lengths.as_deref(), b)
    }

    /// The operands as the oracle takes them.
    ///
    /// # Errors
    /// Where an operand has a dtype that the oracle does not take.
    pub fn inputs(&self) -> Result<Inputs<'_>> {
        Ok(Inputs {
            mask: self.mask.as_ref().map(Host::values).transpose()?,
            sinks: self.sinks.as_deref(),
            alibi_slopes: self.alibi_slopes.as_deref(),
            block_table: self.block_table.as_deref(),
            key_lengths: self.key_lengths.as_deref(),
            ..Inputs::new(self.q.values()?, self.k.values()?, self.v.values()?)
        })
    }
}

/// What the device's mask fill must give, written out cell by cell.
fn fill_built(host: &mut Host, problem: &Problem, bounds: &Bounds) {
    let shape = problem.shape();
    let offset = match bounds.offset {
        QueryOffset::At(offset) => offset,
        QueryOffset::BottomRight => shape.key_len as i64 - shape.query_len as i64,
    };
    for i in 0..shape.query_len {
        for j in 0..shape.key_len {
            let (p, k) = (i as i64 + offset, j as i64);
            let hidden = (bounds.causal && k > p)
                || bounds.window.is_some_and(|w| p - k >= w as i64)
                || bounds.window_right.is_some_and(|w| k - p > w as i64);
            let value = if hidden { f32::NEG_INFINITY } else { 0.0 };
            host.set(i * shape.key_len + j, value);
        }
    }
}

/// A mask of biases and holes. Booleans: about two thirds attend, as any nonzero byte. With tile
/// classes in play, whole blocks are masked or free. Now and then a row hides every key.
fn fill_mask(
    host: &mut Host,
    case: &Case,
    problem: &Problem,
    all: impl Iterator<Item = Sequence>,
    random: &mut Random,
) {
    // Sequences of unlike lengths that share a plane would each keep a part of such a row.
    let low = case.bounds.label == "full" && !case.sequences.differ();
    for s in all {
        for (h, i) in (0..problem.shape().heads).flat_map(|h| (0..s.query_len).map(move |i| (h, i)))
        {
            let row = match random.below(16) {
                0 if case.mask != MaskKind::Padding => Row::Hidden,
                1..=4 if low => Row::Low,
                _ => Row::Plain,
            };
            let start = problem.mask_at(&s, h, i);
            for j in 0..s.key_len {
                let value = cell(case, row, (i, j), s.key_len, random);
                let is_bool = host.dtype() == DType::U8;
                host.set(
                    start + j,
                    match value {
                        None if is_bool => 0.0,
                        None => f32::NEG_INFINITY,
                        Some(_) if is_bool => [1.0, 255.0, 2.0][j % 3],
                        Some(bias) => bias,
                    },
                );
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Row {
    Plain,
    /// Hides every key.
    Hidden,
    /// Has biases so low that they are as good as hidden beside its other keys.
    Low,
}

/// A cell's bias; `None` where it hides its key.
fn cell(
    case: &Case,
    row: Row,
    (i, j): (usize, usize),
    key_len: usize,
    random: &mut Random,
) -> Option<f32> {
    let block = (i / 40 + j / 24) % 3;
    let hidden = match case.mask {
        // Hides a tail, and so leaves each row some keys.
        MaskKind::Padding => j >= key_len - key_len / 3,
        _ if case.tile_classes => block == 0,
        _ => random.below(3) == 0,
    };
    let bias = match random.below(8) {
        _ if case.tile_classes && block == 1 => 0.0,
        0 | 1 => [0.0, -0.0][j % 2],
        2 | 3 if row == Row::Low && j >= 2 && !case.tile_classes => -9.0e4,
        _ => random.normal() as f32,
    };
    match row {
        Row::Hidden => None,
        // Two keys of the usual size, so that nothing hangs on the sums' last bits.
        Row::Low if j < 2 && !case.tile_classes => Some(bias),
        _ => (!hidden).then_some(bias),
    }
}
