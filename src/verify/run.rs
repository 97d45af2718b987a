//! Runs one case on a device and holds the result against the oracle.

use super::case::{Bounds, Case, Entry};
use super::data::{Data, Host};
use super::poison::{self, Poisoned};
use crate::attention::class_tile;
use crate::attention::oracle::{self, Precision, Values};
use crate::attention::tolerance::{self, Comparison};
use crate::attention::{Problem, QueryOffset, Role};
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::hash::fnv1a;
use crate::ops::flash_attn_prefill::FlashAttnPrefillParams;
use crate::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use crate::ops::flash_attn_prefill_d512::{
    dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk,
    dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk,
};
use crate::ops::flash_attn_prefill_mask::{SdpaMaskParams, build_sdpa_mask_bf16};
use crate::ops::flash_attn_vec::{FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use crate::ops::{self, Operands};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::CommandEncoder;
use crate::runtime::registry::KernelRegistry;

/// How a case went.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The output against the oracle.
    pub comparison: Comparison,
    /// A hash of the output's and the log-sum-exp's bits; all NaN count as one.
    pub digest: u64,
    /// What was wrong, a line each.
    pub failures: Vec<String>,
}

impl Outcome {
    /// Whether nothing was wrong.
    pub fn ok(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Runs a case.
///
/// # Errors
/// Where the device refuses or fails to run what it should serve.
pub fn run(case: &Case, device: &MlxDevice, registry: &mut KernelRegistry) -> Result<Outcome> {
    let data = Data::of(case)?;
    let result = Results::of(case, &data, device, registry)?;
    judge(&data, result)
}

/// Runs a case in both its forms: as [`run`] does, and once more with poison in cells of K and V that
/// rows do not see, or that only some rows see.
///
/// # Errors
/// Where the device refuses or fails to run what it should serve.
pub fn run_poisoned(
    case: &Case,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
) -> Result<(Outcome, Poisoned)> {
    let data = Data::of(case)?;
    let plain = Results::of(case, &data, device, registry)?;
    let (spoilt, plan) = poison::spoil(case, &data)?;
    let result = Results::of(case, &spoilt, device, registry)?;
    let poisoned = plan.compare(&data.problem, &plain, &result);
    Ok((judge(&data, plain)?, poisoned))
}

/// What a device made of a case.
pub(super) struct Results {
    /// O in the oracle's order.
    pub(super) o: Vec<f64>,
    pub(super) lse: Option<Vec<f32>>,
    /// What was wrong apart from the numbers, a line each.
    pub(super) failures: Vec<String>,
}

impl Results {
    fn of(
        case: &Case,
        data: &Data,
        device: &MlxDevice,
        registry: &mut KernelRegistry,
    ) -> Result<Self> {
        let buffers = Buffers::new(case, data, device)?;
        let mut encoder = device.command_encoder()?;
        let mask = encode(case, data, &buffers, &mut encoder, device, registry)?;
        encoder.commit_and_wait()?;

        let mut failures = Vec::new();
        if let (Some(mask), Some(host)) = (&mask, &data.mask)
            && case.built.is_some()
            && mask.as_slice::<u8>()? != host.bytes()
        {
            failures.push("mask: the device's fill is not what its parameters say".into());
        }
        let (o, lse) = read(&data.problem, &buffers, &mut failures)?;
        for (name, guarded) in &buffers.inputs {
            if !guarded.is_as_made()? {
                failures.push(format!("{name}: the kernel wrote an input"));
            }
        }
        Ok(Self { o, lse, failures })
    }
}

impl Results {
    /// FNV-1a over the bits of O and of the log-sum-exp; all NaN count as one.
    pub(super) fn digest(&self) -> u64 {
        let lse = self.lse.iter().flatten().map(|x| f64::from(*x));
        let bits = self.o.iter().copied().chain(lse).map(|x| match x.is_nan() {
            true => u64::MAX,
            false => x.to_bits(),
        });
        fnv1a(bits.flat_map(u64::to_le_bytes))
    }
}

/// Holds results against the oracle.
fn judge(data: &Data, results: Results) -> Result<Outcome> {
    let digest = results.digest();
    let Results {
        o,
        lse,
        mut failures,
    } = results;
    let problem = &data.problem;
    let inputs = data.inputs()?;
    let exact = oracle::attention(problem, &inputs, Precision::Exact)?;
    let naive = oracle::attention(problem, &inputs, Precision::Naive)?;
    let comparison = tolerance::compare(problem, &o, &exact, &naive);
    if !comparison.ok {
        failures.push(format!(
            "out: max error {:.3e} of {:.3e} allowed, relative {:.3e} of {:.3e} allowed, {} not finite",
            comparison.max_abs,
            comparison.tolerance,
            comparison.rel_fro,
            comparison.rel_tolerance,
            o.iter().filter(|x| !x.is_finite()).count(),
        ));
    }
    if let Some(lse) = lse {
        let (error, allowed) = tolerance::compare_lse(&lse, &exact);
        if error > allowed {
            failures.push(format!("lse: error {error:.3e} of {allowed:.3e} allowed"));
        }
    }
    Ok(Outcome {
        comparison,
        digest,
        failures,
    })
}

/// An operand between two guard zones, and the bytes that the whole was made with.
struct Guarded {
    whole: MlxBuffer,
    view: MlxBuffer,
    made: Vec<u8>,
    start: usize,
}

impl Guarded {
    fn new(device: &MlxDevice, contents: &Host, guard: usize) -> Result<Self> {
        let (dtype, size) = (contents.dtype(), contents.dtype().size_of());
        let zone = Host::poisoned(dtype, guard);
        let made = [zone.bytes(), contents.bytes(), zone.bytes()].concat();
        let elements = contents.bytes().len() / size;
        let shape = vec![elements + 2 * guard];
        let mut whole = device.alloc_buffer(made.len(), dtype, shape)?;
        whole.as_mut_slice::<u8>()?.copy_from_slice(&made);
        let start = guard * size;
        let view = whole.slice_view(start as u64, elements);
        Ok(Self {
            whole,
            view,
            made,
            start,
        })
    }

    fn is_as_made(&self) -> Result<bool> {
        Ok(self.whole.as_slice::<u8>()? == self.made)
    }

    /// Checks that only `rows` (first element, length) were written.
    fn check_written(
        &self,
        name: &str,
        rows: impl Iterator<Item = (usize, usize)>,
        failures: &mut Vec<String>,
    ) -> Result<()> {
        let size = self.view.dtype().size_of();
        let mut now = self.whole.as_slice::<u8>()?.to_vec();
        for (first, len) in rows {
            let range = self.start + first * size..self.start + (first + len) * size;
            now[range.clone()].copy_from_slice(&self.made[range]);
        }
        let strays = now.iter().zip(&self.made).filter(|(a, b)| a != b).count();
        if strays > 0 {
            failures.push(format!("{name}: {strays} bytes outside its rows changed"));
        }
        Ok(())
    }
}

struct Buffers {
    inputs: Vec<(&'static str, Guarded)>,
    out: Guarded,
    lse: Option<Guarded>,
}

impl Buffers {
    fn new(case: &Case, data: &Data, device: &MlxDevice) -> Result<Self> {
        // Now on a cache line, now on no vector's alignment at all.
        let guard = if case.seed() & 1 == 0 { 64 } else { 37 };
        let floats = |values: &Option<Vec<f32>>| {
            values.as_ref().map(|values| {
                let mut host = Host::poisoned(DType::F32, values.len());
                values.iter().enumerate().for_each(|(i, x)| host.set(i, *x));
                host
            })
        };
        let table = data.block_table.as_deref();
        let lengths = data.key_lengths.as_deref();
        let mask = data.mask.clone().filter(|_| case.built.is_none());
        let operands = [
            (Role::Query, Some(data.q.clone())),
            (Role::Key, Some(data.k.stored())),
            (Role::Value, Some(data.v.stored())),
            (Role::Mask, mask),
            (Role::Sinks, floats(&data.sinks)),
            (Role::AlibiSlopes, floats(&data.alibi_slopes)),
            (
                Role::BlockTable,
                table.map(|x| Host::of_integers(DType::I32, x)),
            ),
            (
                Role::KeyLengths,
                lengths.map(|x| Host::of_integers(DType::U32, x)),
            ),
        ];
        let mut inputs = Vec::new();
        for (role, host) in operands {
            if let Some(host) = host {
                inputs.push((role.name(), Guarded::new(device, &host, guard)?));
            }
        }
        let output = |role| -> Result<Option<Guarded>> {
            let Some(spec) = data.problem.operand(role) else {
                return Ok(None);
            };
            let host = Host::poisoned(spec.dtype, spec.elements);
            Guarded::new(device, &host, guard).map(Some)
        };
        Ok(Self {
            inputs,
            out: output(Role::Output)?
                .ok_or_else(|| MlxError::expected("out", "an operand", "none"))?,
            lse: output(Role::Lse)?,
        })
    }

    fn input(&self, role: Role) -> Option<&MlxBuffer> {
        let found = self.inputs.iter().find(|(name, _)| *name == role.name());
        found.map(|(_, guarded)| &guarded.view)
    }
}

/// Encodes the case; gives the mask, if it has one.
fn encode(
    case: &Case,
    data: &Data,
    buffers: &Buffers,
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
) -> Result<Option<MlxBuffer>> {
    let mut mask = match &case.built {
        Some(bounds) => Some(build_mask(case, bounds, encoder, device, registry)?),
        None => buffers.input(Role::Mask).cloned(),
    };
    if let (Some(host), Entry::D512 { .. }) = (&data.mask, case.entry) {
        // The seed's dispatchers tell masks apart by rank, which a view does not keep.
        let shape = vec![case.query_len, case.key_len];
        let mut plane = device.alloc_buffer(host.bytes().len(), host.dtype(), shape)?;
        plane.as_mut_slice::<u8>()?.copy_from_slice(host.bytes());
        mask = Some(plane);
    }
    let classes = match &mask {
        Some(mask) if case.tile_classes => Some(classify(case, mask, encoder, device, registry)?),
        _ => None,
    };
    let input = |role: Role| {
        buffers
            .input(role)
            .ok_or_else(|| MlxError::expected(role.name(), "an operand", "none"))
    };
    let (q, k, v) = (input(Role::Query)?, input(Role::Key)?, input(Role::Value)?);
    let out = &buffers.out.view;
    match case.entry {
        Entry::Attention => {
            let operands = Operands {
                mask: mask.as_ref(),
                tile_classes: classes.as_ref(),
                sinks: buffers.input(Role::Sinks),
                alibi_slopes: buffers.input(Role::AlibiSlopes),
                lse: buffers.lse.as_ref().map(|lse| &lse.view),
                block_table: buffers.input(Role::BlockTable),
                key_lengths: buffers.input(Role::KeyLengths),
                ..Operands::new(q, k, v, out)
            };
            ops::attention(encoder, &data.problem, &operands)?;
        }
        Entry::Decode => decode(case, data, [q, k, v, out], encoder, device, registry)?,
        Entry::D512 { nsg } => {
            let params = FlashAttnPrefillParams {
                n_heads: size(case.heads)?,
                n_kv_heads: size(case.kv_heads)?,
                head_dim: size(case.head_dim)?,
                seq_len_q: size(case.query_len)?,
                seq_len_k: size(case.key_len)?,
                batch: size(case.batch)?,
                scale: data.problem.scale(),
                do_causal: case.bounds.causal,
            };
            let dispatch = match case.dtype {
                DType::BF16 => dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk,
                _ => dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk,
            };
            let (mask, blk) = (mask.as_ref(), classes.as_ref());
            dispatch(
                encoder, device, registry, q, k, v, mask, blk, out, &params, nsg,
            )?;
        }
    }
    Ok(mask)
}

fn build_mask(
    case: &Case,
    bounds: &Bounds,
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
) -> Result<MlxBuffer> {
    let offset = match bounds.offset {
        QueryOffset::At(offset) => offset,
        QueryOffset::BottomRight => case.key_len as i64 - case.query_len as i64,
    };
    let params = SdpaMaskParams {
        seq_len_q: size(case.query_len)?,
        seq_len_k: size(case.key_len)?,
        window_size: bounds.window.map(size).transpose()?,
        causal: bounds.causal,
        q_abs_offset: u32::try_from(offset)
            .map_err(|_| MlxError::expected("q_abs_offset", "at least 0", offset))?,
    };
    build_sdpa_mask_bf16(device, registry, encoder, &params)
}

fn classify(
    case: &Case,
    mask: &MlxBuffer,
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
) -> Result<MlxBuffer> {
    let tile = class_tile(case.head_dim);
    let params = BlkParams {
        seq_len_q: size(case.query_len)?,
        seq_len_k: size(case.key_len)?,
        bq: size(tile.bq)?,
        bk: size(tile.bk)?,
    };
    let classes = alloc_blk_buffer(device, &params)?;
    dispatch_flash_attn_prefill_blk(encoder, device, registry, mask, &classes, &params)?;
    Ok(classes)
}

fn decode(
    case: &Case,
    data: &Data,
    [q, k, v, out]: [&MlxBuffer; 4],
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
) -> Result<()> {
    let params = FlashAttnVecParams {
        num_heads: size(case.heads)?,
        num_kv_heads: size(case.kv_heads)?,
        head_dim: size(case.head_dim)?,
        kv_seq_len: size(case.key_len)?,
        kv_capacity: size(case.key_len + 9)?,
        scale: data.problem.scale(),
        mask_type: if case.bounds.window.is_some() { 2 } else { 1 },
        sliding_window: size(case.bounds.window.unwrap_or(0))?,
        softcap: case.softcap.unwrap_or(0.0),
    };
    let bytes = tmp_buffer_bytes(params.num_heads, params.head_dim);
    let tmp = device.alloc_buffer(bytes, DType::F32, vec![bytes / 4])?;
    // The decode entry wants room for all of the capacity, which the last head's keys need not use.
    let elements = case.kv_heads * (case.key_len + 9) * case.head_dim;
    let (k, v) = (roomy(k, elements, device)?, roomy(v, elements, device)?);
    flash_attn_vec(encoder, registry, device, q, &k, &v, out, &tmp, &params)
}

/// A copy of a view with room for `elements`, the rest poisoned.
fn roomy(view: &MlxBuffer, elements: usize, device: &MlxDevice) -> Result<MlxBuffer> {
    let mut bytes = Host::poisoned(view.dtype(), elements).bytes().to_vec();
    let contents = view.as_slice::<u8>()?;
    bytes[..contents.len()].copy_from_slice(contents);
    let mut copy = device.alloc_buffer(bytes.len(), view.dtype(), vec![elements])?;
    copy.as_mut_slice::<u8>()?.copy_from_slice(&bytes);
    Ok(copy)
}

fn size(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| MlxError::expected("size", "a 32-bit number", n))
}

/// O in the oracle's order, and the log-sum-exp; notes what was written outside of them.
fn read(
    problem: &Problem,
    buffers: &Buffers,
    failures: &mut Vec<String>,
) -> Result<(Vec<f64>, Option<Vec<f32>>)> {
    let dim = problem.shape().v_dim;
    // First element in O, and the row in the oracle's order.
    let mut rows = Vec::new();
    for b in 0..problem.shape().batch {
        let s = problem.sequence(b);
        for h in 0..problem.shape().heads {
            rows.extend((0..s.query_len).map(|i| {
                (
                    problem.o_at(&s, h, i),
                    oracle::reference_row(problem, &s, h, i),
                )
            }));
        }
    }
    let written = rows.iter().map(|(first, _)| (*first, dim));
    buffers.out.check_written("out", written, failures)?;
    let out = buffers.out.view.read()?;
    let values = Values::from_bytes(problem.dtype(), &out)?;
    let mut o = vec![f64::NAN; rows.len() * dim];
    for (first, row) in &rows {
        for d in 0..dim {
            o[row * dim + d] = values.get(first + d);
        }
    }
    let lse = match &buffers.lse {
        None => None,
        Some(lse) => {
            let written = std::iter::once((0, rows.len()));
            lse.check_written("lse", written, failures)?;
            Some(lse.view.read::<f32>()?.to_vec())
        }
    };
    Ok((o, lse))
}
