//! The shipped kernels in the emulator: their texts pass the type check, they run clean under every
//! check and in any order, and without any one of their barriers they do not.
#![allow(clippy::print_stderr)]

mod barriers;

use std::borrow::Cow;

use half::{bf16, f16};
use msl_emulator::{CompileOptions, Library};

use super::EmulatorOptions;
use crate::attention::Tile;
use crate::attention::{MaskSpec, Problem, QueryOffset, Role, Shape};
use crate::backend::command::Hint;
use crate::backend::metal::bindings::names;
use crate::backend::metal::plan::{Plan, PlanArg};
use crate::backend::metal::sources;
use crate::backend::metal::table::{self, MaskKind, Variant};
use crate::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
    dispatch_flash_attn_prefill_blk_f16,
};
use crate::ops::flash_attn_prefill_mask::{
    SdpaMaskParams, build_block_diagonal_sdpa_mask_bf16, build_sdpa_mask_bf16, build_sdpa_mask_f16,
};
use crate::ops::flash_attn_vec::{FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use crate::ops::{self, Operands};
use crate::{DType, KernelArg, KernelRegistry, MTLSize, MlxBuffer, MlxDevice, Result};

const SEEDS: [u64; 3] = [1, 20, 333];

fn device(check: bool, shuffle_seed: Option<u64>) -> Option<MlxDevice> {
    let options = EmulatorOptions {
        check,
        shuffle_seed,
        threads: 0,
    };
    MlxDevice::emulator(options)
        .inspect_err(|error| eprintln!("SKIPPED: {error}"))
        .ok()
}

/// The texts with their file names in this repository.
fn texts() -> [(&'static str, &'static str); 3] {
    [
        ("prefill.metal", sources::PREFILL_TEXT),
        ("masks.metal", sources::MASK_TEXT),
        ("decode.metal", sources::VEC_TEXT),
    ]
}

fn upload(device: &MlxDevice, values: &[f32], dtype: DType) -> MlxBuffer {
    let shape = vec![values.len()];
    let buffer = match dtype {
        DType::F32 => device.buffer_from_slice(values, dtype, shape),
        DType::F16 => {
            let values: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
            device.buffer_from_slice(&values, dtype, shape)
        }
        DType::BF16 => {
            let values: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            device.buffer_from_slice(&values, dtype, shape)
        }
        _ => {
            // As bools: visible where the additive mask has 0.
            let values: Vec<u8> = values.iter().map(|x| u8::from(*x == 0.0)).collect();
            device.buffer_from_slice(&values, dtype, shape)
        }
    };
    buffer.unwrap()
}

fn values(n: usize, step: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * step + i / 7) % 41) as f32 / 16.0 - 1.25)
        .collect()
}

/// One prefill: a ragged second query tile, more than three chunks of keys with a ragged end.
#[derive(Clone, Copy)]
struct Prefill {
    variant: &'static Variant,
    nsg: Option<u32>,
    /// Whether every option is on: mask, classes, causal, window, sinks, softcap, ALiBi, LSE.
    full: bool,
    /// Whether the last value row is NaN, so that each query tile is worked on again.
    poison: bool,
    /// Whether the registry's text runs, which need not be the crate's.
    foreign: bool,
}

impl Prefill {
    fn name(&self) -> Cow<'static, str> {
        match self.nsg {
            None => self.variant.kernel.into(),
            Some(n) => format!("{}, {n} simdgroups", self.variant.kernel).into(),
        }
    }

    /// The bits of the output, and of the log-sum-exp with all options.
    fn run(&self, device: &MlxDevice, registry: &mut KernelRegistry) -> Result<Vec<u8>> {
        let Self { variant, full, .. } = *self;
        let (dtype, dim) = (variant.dtype, variant.head_dim);
        let chunk = if dim * dtype.size_of() >= 1024 {
            64
        } else {
            32
        };
        let (ql, kl) = (variant.tile.bq + 3, 3 * chunk + 21);
        let shape = Shape {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            query_len: ql,
            key_len: kl,
            qk_dim: dim,
            v_dim: dim,
        };
        let q = upload(device, &values(ql * dim, 3), dtype);
        let k = upload(device, &values(kl * dim, 5), dtype);
        let mut v = values(kl * dim, 11);
        if self.poison {
            v[(kl - 1) * dim..].fill(f32::NAN);
        }
        let v = upload(device, &v, dtype);
        let out = upload(device, &vec![f32::NAN; ql * dim], dtype);
        let lse = upload(device, &vec![f32::NAN; ql], DType::F32);
        let one = upload(device, &[0.5], DType::F32);

        // Hidden: a whole class tile, and cells of others.
        let tile = crate::attention::class_tile(dim);
        let hidden = |i: usize, j: usize| {
            (i < tile.bq && (tile.bk..2 * tile.bk).contains(&j))
                || (j >= 2 * tile.bk && (i + j).is_multiple_of(5))
        };
        let cell = |c| {
            if hidden(c / kl, c % kl) {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        };
        let cells: Vec<f32> = (0..ql * kl).map(cell).collect();
        let mask_dtype = match variant.mask {
            MaskKind::Bool => DType::U8,
            MaskKind::Additive => dtype,
        };
        let mask = upload(device, &cells, mask_dtype);

        let mut encoder = device.command_encoder()?;
        let mut operands = Operands::new(&q, &k, &v, &out);
        let mut builder = Problem::builder(dtype, shape);
        let classes;
        if full || variant.mask == MaskKind::Bool {
            builder = builder.mask(MaskSpec {
                dtype: mask_dtype,
                batch_stride: 0,
                head_stride: 0,
                row_stride: kl,
            });
            operands.mask = Some(&mask);
        }
        if full && variant.mask == MaskKind::Additive {
            let twin = upload(device, &cells, DType::BF16);
            classes = classify(&mut encoder, device, registry, &twin, (ql, kl), tile)?;
            builder = builder.tile_classes(true);
            operands.tile_classes = Some(&classes);
        }
        if full {
            builder = builder
                .causal(true)
                .query_offset(QueryOffset::BottomRight)
                .window(kl - 20)
                .softcap(20.0)
                .sinks(true)
                .alibi(true)
                .lse(true);
            operands.sinks = Some(&one);
            operands.alibi_slopes = Some(&one);
            operands.lse = Some(&lse);
        }
        let hint = Hint {
            kernel: Some(variant.kernel),
            simdgroups: self.nsg,
        };
        let problem = builder.build()?;
        if self.foreign {
            dispatch(&mut encoder, device, registry, &problem, &operands, hint)?;
        } else {
            ops::encode(&mut encoder, &problem, &operands, hint)?;
        }
        encoder.commit_and_wait()?;
        let mut bits = out.as_slice::<u8>()?.to_vec();
        if full {
            bits.extend_from_slice(lse.as_slice()?);
        }
        Ok(bits)
    }
}

/// Dispatches the kernel of the registry's text as the plan of a problem without options has it.
fn dispatch(
    encoder: &mut crate::CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    problem: &Problem,
    operands: &Operands<'_>,
    hint: Hint,
) -> Result<()> {
    let plan = Plan::new(problem, hint)?;
    let args: Vec<_> = plan
        .args
        .iter()
        .map(|(index, arg)| {
            let arg = match arg {
                PlanArg::Operand(Role::Query) => KernelArg::Buffer(operands.q),
                PlanArg::Operand(Role::Key) => KernelArg::Buffer(operands.k),
                PlanArg::Operand(Role::Value) => KernelArg::Buffer(operands.v),
                PlanArg::Operand(Role::Output) => KernelArg::Buffer(operands.out),
                PlanArg::Operand(role) => unreachable!("{}", role.name()),
                PlanArg::Bytes(bytes) => KernelArg::Bytes(bytes),
            };
            (*index as u64, arg)
        })
        .collect();
    let [grid, threadgroup] = [plan.grid, plan.threadgroup].map(|[x, y, z]| MTLSize::new(x, y, z));
    let pipeline = registry.get(plan.variant.kernel, device.metal_device(), plan.constants)?;
    encoder.encode_threadgroups_with_args(pipeline, &args, grid, threadgroup);
    Ok(())
}

fn classify(
    encoder: &mut crate::CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    mask: &MlxBuffer,
    (ql, kl): (usize, usize),
    tile: Tile,
) -> Result<MlxBuffer> {
    let params = BlkParams {
        seq_len_q: ql as u32,
        seq_len_k: kl as u32,
        bq: tile.bq as u32,
        bk: tile.bk as u32,
    };
    let classes = alloc_blk_buffer(device, &params)?;
    let dispatch = match mask.dtype() {
        DType::F16 => dispatch_flash_attn_prefill_blk_f16,
        _ => dispatch_flash_attn_prefill_blk,
    };
    dispatch(encoder, device, registry, mask, &classes, &params)?;
    Ok(classes)
}

/// The bits of masks in bf16 and f16, of their tile classes, and of a mask of several sequences.
fn masks(device: &MlxDevice, registry: &mut KernelRegistry) -> Result<Vec<u8>> {
    let mut encoder = device.command_encoder()?;
    let params = SdpaMaskParams {
        seq_len_q: 70,
        seq_len_k: 75,
        window_size: Some(20),
        causal: true,
        q_abs_offset: 3,
    };
    let mask = build_sdpa_mask_bf16(device, registry, &mut encoder, &params)?;
    let tile = Tile { bq: 32, bk: 16 };
    let classes = classify(&mut encoder, device, registry, &mask, (70, 75), tile)?;
    let half = build_sdpa_mask_f16(device, registry, &mut encoder, &params)?;
    let of_half = classify(&mut encoder, device, registry, &half, (70, 75), tile)?;
    let [ids, positions] = [|t| t % 3, |t| t / 3].map(|of: fn(u32) -> u32| {
        let tokens: Vec<u32> = (0..40).map(of).collect();
        device.buffer_from_slice(&tokens, DType::U32, vec![40])
    });
    let (ids, positions) = (ids?, positions?);
    let blocks = build_block_diagonal_sdpa_mask_bf16(
        device,
        registry,
        &mut encoder,
        &ids,
        &positions,
        40,
        Some(5),
        true,
    )?;
    encoder.commit_and_wait()?;
    let written = [&mask, &classes, &half, &of_half, &blocks];
    let bits: Result<Vec<&[u8]>> = written.into_iter().map(MlxBuffer::as_slice).collect();
    Ok(bits?.concat())
}

/// The bits of a decode step over keys of `dtype`.
fn decode(device: &MlxDevice, registry: &mut KernelRegistry, dtype: DType) -> Result<Vec<u8>> {
    let mut encoder = device.command_encoder()?;
    let params = FlashAttnVecParams {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 80,
        kv_seq_len: 300,
        kv_capacity: 310,
        scale: 0.1,
        mask_type: 2,
        sliding_window: 290,
        softcap: 15.0,
    };
    let cache = 2 * 310 * 80;
    let q = upload(device, &values(4 * 80, 3), DType::F32);
    let k = upload(device, &values(cache, 5), dtype);
    let v = upload(device, &values(cache, 11), dtype);
    let out = upload(device, &values(4 * 80, 1), DType::F32);
    let tmp = tmp_buffer_bytes(4, 80);
    let tmp = device.alloc_buffer(tmp, DType::F32, vec![tmp / 4])?;
    flash_attn_vec(
        &mut encoder,
        registry,
        device,
        &q,
        &k,
        &v,
        &out,
        &tmp,
        &params,
    )?;
    encoder.commit_and_wait()?;
    Ok(out.as_slice::<u8>()?.to_vec())
}

#[test]
fn every_text_passes_the_type_check() {
    if let Err(error) = msl_emulator::find_compiler() {
        eprintln!("SKIPPED: {error}");
        return;
    }
    for (file, text) in texts() {
        let mut options = CompileOptions::named(file);
        if text == sources::PREFILL_TEXT {
            // One of each scheme; every kernel that the other tests run is checked alike.
            options = ["bf16_d80_boolmask", "f32_d64", "f16_d512"]
                .into_iter()
                .fold(options, |o, k| o.kernel(format!("flash_attn_prefill_{k}")));
        }
        assert!(options.check_types);
        if let Err(error) = Library::compile(text, &options) {
            panic!("{file}: {error}");
        }
    }
}

type Run = Box<dyn Fn(&MlxDevice, &mut KernelRegistry) -> Result<Vec<u8>>>;

#[test]
fn every_kernel_is_clean_and_gives_the_same_bits_in_any_order() {
    orders(&SEEDS[..1]);
}

#[test]
#[ignore = "takes minutes: scripts/test --all"]
fn barriers_order_every_kernel_in_more_orders() {
    orders(&SEEDS[1..]);
}

/// Runs every kernel in the order of the emulator's, and in random ones, checked and not.
fn orders(seeds: &[u64]) {
    let mut runs: Vec<(String, Run)> = Vec::new();
    for variant in table::PREFILL {
        for (nsg, full) in [(None, false), (None, true), (Some(4), true)] {
            if nsg.is_some() && variant.head_dim != 512 {
                continue;
            }
            let case = Prefill {
                variant,
                nsg,
                full,
                poison: false,
                foreign: false,
            };
            let run: Run = Box::new(move |d, r| case.run(d, r));
            runs.push((format!("{} full {full}", case.name()), run));
        }
    }
    runs.push((names::MASK_FILL.into(), Box::new(masks)));
    for dtype in [DType::F32, DType::F16] {
        let run: Run = Box::new(move |d, r| decode(d, r, dtype));
        runs.push((format!("decode {dtype}"), run));
    }
    let Some(plain) = device(false, None) else {
        return;
    };
    let mut others: Vec<_> = seeds
        .iter()
        .filter_map(|s| device(true, Some(*s)))
        .collect();
    others.extend(device(false, Some(seeds[0])));
    let mut registry = KernelRegistry::new();
    let mut wrong = Vec::new();
    for (name, run) in &runs {
        let want = run(&plain, &mut registry).unwrap();
        for other in &others {
            match run(other, &mut registry) {
                Ok(bits) if bits == want => {}
                Ok(_) => wrong.push(format!("{name}: other bits")),
                Err(error) => wrong.push(format!("{name}: {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    eprintln!("{} calls, each in {} ways", runs.len(), others.len() + 1);
}
