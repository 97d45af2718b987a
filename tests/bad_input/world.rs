//! What a wrong call starts from: right operands, watched for any change.

use std::panic::{AssertUnwindSafe, catch_unwind};

use mlx_flash_attn::attention::{Problem, ProblemBuilder};
use mlx_flash_attn::ops::flash_attn_prefill::{
    FlashAttnPrefillLayout, FlashAttnPrefillParams, dispatch_flash_attn_prefill_bf16_d64,
    dispatch_flash_attn_prefill_bf16_d64_boolmask, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_d512::dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk;
use mlx_flash_attn::ops::flash_attn_vec::{FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{
    CommandEncoder, DType, KernelRegistry, MlxBuffer, MlxDevice, MlxError, Result,
};

use crate::common::{self, shape};

type WrongCall = Box<dyn Fn(&mut World) -> Result<()>>;

/// One wrong call.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) call: WrongCall,
    /// The error's variant.
    pub(crate) variant: &'static str,
    /// What its message must say.
    pub(crate) words: &'static [&'static str],
}

/// A row whose error is `InvalidArgument`.
pub(crate) fn row(
    name: &'static str,
    words: &'static [&'static str],
    call: impl Fn(&mut World) -> Result<()> + 'static,
) -> Row {
    Row {
        name,
        call: Box::new(call),
        variant: "InvalidArgument",
        words,
    }
}

impl Row {
    pub(crate) fn gives(self, variant: &'static str) -> Self {
        Self { variant, ..self }
    }
}

fn variant(error: &MlxError) -> &'static str {
    match error {
        MlxError::DeviceNotFound => "DeviceNotFound",
        MlxError::DeviceUnavailable { .. } => "DeviceUnavailable",
        MlxError::CommandBufferError(_) => "CommandBufferError",
        MlxError::ShaderCompilationError { .. } => "ShaderCompilationError",
        MlxError::BufferAllocationError { .. } => "BufferAllocationError",
        MlxError::InvalidArgument(_) => "InvalidArgument",
        MlxError::KernelNotFound(_) => "KernelNotFound",
        MlxError::UnsupportedDtype(_) => "UnsupportedDtype",
        _ => "another",
    }
}

pub(crate) struct World {
    pub(crate) device: MlxDevice,
    pub(crate) registry: KernelRegistry,
    pub(crate) encoder: CommandEncoder,
    watched: Vec<(MlxBuffer, Vec<u8>)>,
}

impl World {
    pub(crate) fn new(device: &MlxDevice) -> Self {
        let mut encoder = device.command_encoder().unwrap();
        encoder.start_capture();
        Self {
            device: device.clone(),
            registry: KernelRegistry::new(),
            encoder,
            watched: Vec::new(),
        }
    }

    /// A buffer of `n` numbers that must still be there after the call.
    pub(crate) fn buffer(&mut self, dtype: DType, shape: &[usize]) -> MlxBuffer {
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| (i % 7) as f32 - 3.0).collect();
        let buffer = common::upload(&self.device, &values, dtype, shape);
        self.watched.push((buffer.clone(), common::bytes(&buffer)));
        buffer
    }

    /// Runs a wrong call; says what was not as it should be.
    pub(crate) fn check(&mut self, row: &Row) -> std::result::Result<(), String> {
        self.expect_error(row)?;
        match self.encoder.take_capture() {
            Some(nodes) if nodes.is_empty() => {}
            nodes => return Err(format!("something was encoded: {nodes:?}")),
        }
        self.unchanged()
    }

    /// As [`World::check`], for a call that encodes and commits by itself.
    pub(crate) fn check_committed(&mut self, row: &Row) -> std::result::Result<(), String> {
        self.encoder.take_capture();
        self.expect_error(row)?;
        self.unchanged()
    }

    fn expect_error(&mut self, row: &Row) -> std::result::Result<(), String> {
        let result = catch_unwind(AssertUnwindSafe(|| (row.call)(self)));
        let error = match result {
            Err(_) => return Err("it panicked".into()),
            Ok(Ok(())) => return Err("it was accepted".into()),
            Ok(Err(error)) => error,
        };
        let message = error.to_string();
        if variant(&error) != row.variant {
            return Err(format!(
                "{} instead of {}: {message}",
                variant(&error),
                row.variant
            ));
        }
        match row.words.iter().find(|word| !message.contains(**word)) {
            Some(word) => Err(format!("`{word}` is not in: {message}")),
            None => Ok(()),
        }
    }

    fn unchanged(&self) -> std::result::Result<(), String> {
        for (n, (buffer, before)) in self.watched.iter().enumerate() {
            match buffer.as_slice::<u8>() {
                Ok(now) if now == before => {}
                Ok(_) => return Err(format!("buffer {n} was written")),
                Err(error) => return Err(format!("buffer {n}: {error}")),
            }
        }
        Ok(())
    }

    /// A right prefill at `head_dim`: two heads over one, 9 queries, 11 keys, bf16, no mask.
    pub(crate) fn prefill(&mut self, head_dim: usize) -> Prefill {
        let bf16 = DType::BF16;
        Prefill {
            q: self.buffer(bf16, &[1, 2, 9, head_dim]),
            k: self.buffer(bf16, &[1, 1, 11, head_dim]),
            v: self.buffer(bf16, &[1, 1, 11, head_dim]),
            out: self.buffer(bf16, &[1, 2, 9, head_dim]),
            mask: None,
            blk: None,
            params: FlashAttnPrefillParams {
                n_heads: 2,
                n_kv_heads: 1,
                head_dim: head_dim as u32,
                seq_len_q: 9,
                seq_len_k: 11,
                batch: 1,
                scale: 0.125,
                do_causal: true,
            },
            nsg: 8,
        }
    }

    /// As [`World::prefill`], with a mask and its classes.
    pub(crate) fn classed(&mut self, head_dim: usize) -> Prefill {
        let tiles = if head_dim == 512 { [2, 1] } else { [1, 1] };
        Prefill {
            mask: Some(self.buffer(DType::BF16, &[9, 11])),
            blk: Some(self.buffer(DType::U8, &tiles)),
            ..self.prefill(head_dim)
        }
    }

    /// A right decode step: two heads over one, 5 of 6 keys, head dim 64, f32.
    pub(crate) fn decode(&mut self) -> Decode {
        let f32 = DType::F32;
        Decode {
            q: self.buffer(f32, &[2, 64]),
            k: self.buffer(f32, &[1, 6, 64]),
            v: self.buffer(f32, &[1, 6, 64]),
            out: self.buffer(f32, &[2, 64]),
            tmp: self.buffer(f32, &[tmp_buffer_bytes(2, 64) / 4]),
            params: FlashAttnVecParams {
                num_heads: 2,
                num_kv_heads: 1,
                head_dim: 64,
                kv_seq_len: 5,
                kv_capacity: 6,
                scale: 0.125,
                mask_type: 1,
                sliding_window: 0,
                softcap: 0.0,
            },
        }
    }

    /// A right problem with every operand: f32, two heads over one, 9 queries, 11 keys, head dim 64.
    pub(crate) fn attention(&mut self) -> Attention {
        let f32 = DType::F32;
        Attention {
            q: self.buffer(f32, &[2, 9, 64]),
            k: self.buffer(f32, &[11, 64]),
            v: self.buffer(f32, &[11, 64]),
            out: self.buffer(f32, &[2, 9, 64]),
            mask: Some(self.buffer(f32, &[9, 11])),
            blk: Some(self.buffer(DType::U8, &[1, 1])),
            sinks: Some(self.buffer(f32, &[2])),
            slopes: Some(self.buffer(f32, &[2])),
            lse: Some(self.buffer(f32, &[2, 9])),
        }
    }
}

pub(crate) fn builder() -> ProblemBuilder {
    Problem::builder(DType::F32, shape([1, 2, 1], (9, 11), 64))
}

#[derive(Clone)]
pub(crate) struct Prefill {
    pub(crate) q: MlxBuffer,
    pub(crate) k: MlxBuffer,
    pub(crate) v: MlxBuffer,
    pub(crate) out: MlxBuffer,
    pub(crate) mask: Option<MlxBuffer>,
    pub(crate) blk: Option<MlxBuffer>,
    pub(crate) params: FlashAttnPrefillParams,
    pub(crate) nsg: u32,
}

impl Prefill {
    pub(crate) fn d64(&self, w: &mut World) -> Result<()> {
        let Self {
            q,
            k,
            v,
            out,
            params,
            ..
        } = self;
        let layout = FlashAttnPrefillLayout::HeadMajor;
        let (e, d, r, mask) = (
            &mut w.encoder,
            &w.device,
            &mut w.registry,
            self.mask.as_ref(),
        );
        dispatch_flash_attn_prefill_bf16_d64(e, d, r, q, k, v, mask, out, params, layout)
    }

    pub(crate) fn d64_bool(&self, w: &mut World) -> Result<()> {
        let Self {
            q,
            k,
            v,
            out,
            params,
            ..
        } = self;
        let layout = FlashAttnPrefillLayout::SeqMajor;
        let (e, d, r, mask) = (
            &mut w.encoder,
            &w.device,
            &mut w.registry,
            self.mask.as_ref(),
        );
        dispatch_flash_attn_prefill_bf16_d64_boolmask(e, d, r, q, k, v, mask, out, params, layout)
    }

    pub(crate) fn d256(&self, w: &mut World) -> Result<()> {
        let Self {
            q,
            k,
            v,
            out,
            params,
            ..
        } = self;
        let (e, d, r) = (&mut w.encoder, &w.device, &mut w.registry);
        let (mask, blk) = (self.mask.as_ref(), self.blk.as_ref());
        dispatch_flash_attn_prefill_bf16_d256_with_blk(e, d, r, q, k, v, mask, blk, out, params)
    }

    pub(crate) fn d512(&self, w: &mut World) -> Result<()> {
        let Self {
            q,
            k,
            v,
            out,
            params,
            nsg,
            ..
        } = self;
        let (e, d, r) = (&mut w.encoder, &w.device, &mut w.registry);
        let (mask, blk) = (self.mask.as_ref(), self.blk.as_ref());
        dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk(
            e, d, r, q, k, v, mask, blk, out, params, *nsg,
        )
    }
}

pub(crate) struct Decode {
    pub(crate) q: MlxBuffer,
    pub(crate) k: MlxBuffer,
    pub(crate) v: MlxBuffer,
    pub(crate) out: MlxBuffer,
    pub(crate) tmp: MlxBuffer,
    pub(crate) params: FlashAttnVecParams,
}

impl Decode {
    pub(crate) fn run(&self, w: &mut World) -> Result<()> {
        let Self {
            q,
            k,
            v,
            out,
            tmp,
            params,
        } = self;
        flash_attn_vec(
            &mut w.encoder,
            &mut w.registry,
            &w.device,
            q,
            k,
            v,
            out,
            tmp,
            params,
        )
    }
}

pub(crate) struct Attention {
    pub(crate) q: MlxBuffer,
    pub(crate) k: MlxBuffer,
    pub(crate) v: MlxBuffer,
    pub(crate) out: MlxBuffer,
    pub(crate) mask: Option<MlxBuffer>,
    pub(crate) blk: Option<MlxBuffer>,
    pub(crate) sinks: Option<MlxBuffer>,
    pub(crate) slopes: Option<MlxBuffer>,
    pub(crate) lse: Option<MlxBuffer>,
}

impl Attention {
    /// The problem that takes every operand.
    pub(crate) fn problem() -> ProblemBuilder {
        use mlx_flash_attn::attention::{MaskSpec, QueryOffset};
        builder()
            .query_offset(QueryOffset::At(0))
            .mask(MaskSpec::plane(DType::F32, 11))
            .tile_classes(true)
            .sinks(true)
            .alibi(true)
            .lse(true)
    }

    pub(crate) fn run(&self, w: &mut World, problem: ProblemBuilder) -> Result<()> {
        let operands = Operands {
            mask: self.mask.as_ref(),
            tile_classes: self.blk.as_ref(),
            sinks: self.sinks.as_ref(),
            alibi_slopes: self.slopes.as_ref(),
            lse: self.lse.as_ref(),
            ..Operands::new(&self.q, &self.k, &self.v, &self.out)
        };
        let problem = problem.build()?;
        ops::attention(&mut w.encoder, &problem, &operands)
    }
}

/// The right calls, so that a row fails for what it spoils alone.
pub(crate) const GOOD: [fn(&mut World) -> Result<()>; 8] = [
    |w| w.prefill(64).d64(w),
    |w| w.prefill(64).d64_bool(w),
    |w| w.prefill(256).d256(w),
    |w| w.classed(256).d256(w),
    |w| w.prefill(512).d512(w),
    |w| w.classed(512).d512(w),
    |w| w.decode().run(w),
    |w| w.attention().run(w, Attention::problem()),
];
