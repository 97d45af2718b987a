//! Device memory that a command needs for itself, used again once the command has run.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::driver::{Context, Stream, failed};
use super::gpu::Gpu;
use crate::error::Result;

/// Most blocks and bytes that are kept for later.
const KEPT_BLOCKS: usize = 32;
const KEPT_BYTES: usize = 256 << 20;

#[derive(Debug)]
struct Block {
    at: sys::CUdeviceptr,
    len: usize,
    context: Arc<Context>,
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated once, freed once; the command that used it has run.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

/// Blocks that no command uses.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Block>>);

/// A block in use. It goes back to the pool when dropped, so it is kept until its command has run.
#[derive(Debug)]
pub(crate) struct Scratch {
    block: Option<Block>,
    gpu: Arc<Gpu>,
}

impl Scratch {
    /// At least `bytes` bytes, not initialised.
    pub(super) fn take(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let kept = {
            let mut blocks = gpu.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = blocks
                .iter()
                .enumerate()
                .filter(|(_, b)| b.len >= bytes)
                .min_by_key(|(_, b)| b.len)
                .map(|(i, _)| i);
            fits.map(|i| blocks.swap_remove(i))
        };
        let block = match kept {
            Some(block) => block,
            None => {
                let len = bytes.max(4096);
                Block {
                    at: gpu.context.allocate(len)?,
                    len,
                    context: Arc::clone(&gpu.context),
                }
            }
        };
        Ok(Self {
            block: Some(block),
            gpu: Arc::clone(gpu),
        })
    }

    /// A copy of `bytes`, made on `stream`.
    pub(super) fn copy_of(gpu: &Arc<Gpu>, bytes: &[u8], stream: &Stream) -> Result<Self> {
        let scratch = Self::take(gpu, bytes.len())?;
        // SAFETY: the block has as many bytes; the driver has copied pageable memory when it returns.
        unsafe { result::memcpy_htod_async(scratch.at(), bytes, stream.raw()) }
            .map_err(failed("copying to the GPU"))?;
        Ok(scratch)
    }

    /// Bytes that there are.
    pub(super) fn len(&self) -> usize {
        self.block.as_ref().map_or(0, |block| block.len)
    }

    pub(super) fn at(&self) -> sys::CUdeviceptr {
        self.block.as_ref().map_or(0, |block| block.at)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else {
            return;
        };
        let mut blocks = self
            .gpu
            .pool
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let kept: usize = blocks.iter().map(|b| b.len).sum();
        if blocks.len() < KEPT_BLOCKS && kept.saturating_add(block.len) <= KEPT_BYTES {
            blocks.push(block);
        }
    }
}
