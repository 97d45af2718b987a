//! The library as a contestant, through its public interface.

use std::time::Instant;

use anyhow::Result;
use half::{bf16, f16};
use mlx_flash_attn::attention::{Problem, Role};
use mlx_flash_attn::ops;
use mlx_flash_attn::{CommandEncoder, DType, MlxBuffer, MlxDevice};

use crate::inputs::Operands;

/// One problem with its buffers.
#[derive(Debug)]
pub(crate) struct Ours {
    problem: Problem,
    encoder: CommandEncoder,
    q: MlxBuffer,
    k: MlxBuffer,
    v: MlxBuffer,
    out: MlxBuffer,
    pub(crate) mask: Option<MlxBuffer>,
    pub(crate) tile_classes: Option<MlxBuffer>,
}

impl Ours {
    pub(crate) fn new(device: &MlxDevice, problem: Problem, operands: &Operands) -> Result<Self> {
        let n = problem.operand(Role::Output).map_or(0, |o| o.elements);
        let bytes = n * problem.dtype().size_of();
        Ok(Self {
            encoder: device.command_encoder()?,
            q: operands.q.buffer(device)?,
            k: operands.k.buffer(device)?,
            v: operands.v.buffer(device)?,
            out: device.alloc_buffer(bytes, problem.dtype(), vec![n])?,
            mask: None,
            tile_classes: None,
            problem,
        })
    }

    pub(crate) fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Nanoseconds of each of `iters` calls, each from the checks to the last thread's end, after
    /// `warm` calls that do not count.
    pub(crate) fn time(&mut self, warm: usize, iters: usize) -> Result<Vec<u64>> {
        let mut once = || -> Result<u64> {
            let start = Instant::now();
            let operands = ops::Operands {
                mask: self.mask.as_ref(),
                tile_classes: self.tile_classes.as_ref(),
                ..ops::Operands::new(&self.q, &self.k, &self.v, &self.out)
            };
            let encoder = &mut self.encoder;
            ops::attention(encoder, &self.problem, &operands)?;
            encoder.commit_and_wait()?;
            Ok(start.elapsed().as_nanos() as u64)
        };
        for _ in 0..warm {
            once()?;
        }
        (0..iters).map(|_| once()).collect()
    }

    /// The last output as f32.
    pub(crate) fn output(&self) -> Result<Vec<f32>> {
        Ok(match self.problem.dtype() {
            DType::BF16 => self
                .out
                .as_slice::<bf16>()?
                .iter()
                .map(|x| x.to_f32())
                .collect(),
            DType::F16 => self
                .out
                .as_slice::<f16>()?
                .iter()
                .map(|x| x.to_f32())
                .collect(),
            _ => self.out.as_slice::<f32>()?.to_vec(),
        })
    }
}
