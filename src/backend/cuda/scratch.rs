//! Device memory that a command needs for itself, used again once the command has run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};

use super::driver::{Context, Stream, failed};
use super::gpu::Gpu;
use crate::error::Result;

/// Most blocks and bytes that are kept for later.
const KEPT_BLOCKS: usize = 32;
const KEPT_BYTES: usize = 256 << 20;

/// Fewest bytes of a new block of zeros.
const FEWEST_ZEROS: usize = 64 << 10;

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
pub(super) struct Pool {
    /// Of any content.
    blocks: Mutex<Vec<Block>>,
    /// All zeros, and left so by whoever uses them.
    zeros: Mutex<Vec<Block>>,
}

impl Pool {
    fn of(&self, zeros: bool) -> MutexGuard<'_, Vec<Block>> {
        let blocks = if zeros { &self.zeros } else { &self.blocks };
        blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A block in use. It goes back to the pool when dropped, so it is kept until its command has run.
#[derive(Debug)]
pub(crate) struct Scratch {
    block: Option<Block>,
    zeros: bool,
    gpu: Arc<Gpu>,
}

impl Scratch {
    /// At least `bytes` bytes, not initialised.
    pub(super) fn take(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        Self::kept(gpu, bytes, false).map_or_else(|| Self::new(gpu, bytes.max(4096), false), Ok)
    }

    /// At least `bytes` bytes, all zeros, which the command that uses them leaves all zeros.
    pub(super) fn zeros(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        if let Some(kept) = Self::kept(gpu, bytes, true) {
            return Ok(kept);
        }
        let new = Self::new(gpu, bytes.max(FEWEST_ZEROS), true)?;
        // SAFETY: the block has as many bytes, and the stream is done with them before anything else has them.
        unsafe { result::memset_d8_async(new.at(), 0, new.len(), gpu.stream.raw()) }
            .map_err(failed("zeroing memory"))?;
        gpu.stream.synchronize()?;
        Ok(new)
    }

    fn kept(gpu: &Arc<Gpu>, bytes: usize, zeros: bool) -> Option<Self> {
        let mut blocks = gpu.pool.of(zeros);
        let fits = blocks
            .iter()
            .enumerate()
            .filter(|(_, b)| b.len >= bytes)
            .min_by_key(|(_, b)| b.len)
            .map(|(i, _)| i)?;
        let block = Some(blocks.swap_remove(fits));
        let gpu = Arc::clone(gpu);
        Some(Self { block, zeros, gpu })
    }

    fn new(gpu: &Arc<Gpu>, len: usize, zeros: bool) -> Result<Self> {
        let block = Some(Block {
            at: gpu.context.allocate(len)?,
            len,
            context: Arc::clone(&gpu.context),
        });
        let gpu = Arc::clone(gpu);
        Ok(Self { block, zeros, gpu })
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

    /// Whether it is all zeros before and after each use.
    pub(super) fn is_zeros(&self) -> bool {
        self.zeros
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
        let mut blocks = self.gpu.pool.of(self.zeros);
        let kept: usize = blocks.iter().map(|b| b.len).sum();
        if blocks.len() < KEPT_BLOCKS && kept.saturating_add(block.len) <= KEPT_BYTES {
            blocks.push(block);
        }
    }
}
