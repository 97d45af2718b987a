//! What a device is asked to do: the work as it was asked for, where its operands lie, and what the device
//! prepared for it. Kernel names, tiles, bindings and grids are the device's own.

use std::any::Any;
use std::sync::Arc;

use bytemuck::Pod;
use half::{bf16, f16};

use super::memory::Memory;
use crate::attention::Tile;
use crate::attention::Visibility;
use crate::attention::{Problem, Role};
use crate::backend::access::Access;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// An operand of some work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Operand(Role),
    /// Partial results of decode: for each head and split D values, a maximum and a sum, in f32.
    Partials,
    /// The sequence of each token, in u32.
    SequenceIds,
    /// The position of each token in its sequence, in u32.
    Positions,
}

impl Slot {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Operand(role) => role.name(),
            Self::Partials => "tmp",
            Self::SequenceIds => "seq_id",
            Self::Positions => "local_pos",
        }
    }
}

/// Fills a mask: 0 where a key is visible, -inf where it is hidden. Writes [`Role::Mask`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct FillMask {
    pub(crate) query_len: u32,
    pub(crate) key_len: u32,
    /// Of the mask: bf16 or f16.
    pub(crate) dtype: DType,
    /// With an offset of 0 to 2^32 - 1 and no right window.
    pub(crate) visibility: Visibility,
}

/// Fills a bf16 mask of `len` tokens of several sequences: 0 where the key is of the query's sequence and its
/// position is visible, else -inf. Reads [`Slot::SequenceIds`] and [`Slot::Positions`], writes [`Role::Mask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FillBlocks {
    pub(crate) len: u32,
    /// Hides keys at later positions than the query's.
    pub(crate) causal: bool,
    /// How many positions up to and including its own a query sees.
    pub(crate) window: Option<u32>,
}

/// Bits of -inf in a mask of this dtype, bf16 or f16.
pub(crate) const fn hidden_bits(dtype: DType) -> u16 {
    match dtype {
        DType::F16 => f16::NEG_INFINITY.to_bits(),
        _ => bf16::NEG_INFINITY.to_bits(),
    }
}

/// Classifies the tiles of a mask. Reads [`Role::Mask`], writes [`Role::TileClasses`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClassifyTiles {
    pub(crate) query_len: u32,
    pub(crate) key_len: u32,
    /// Elements from one row of the mask to the next.
    pub(crate) row_stride: usize,
    /// Of the mask: bf16 or f16.
    pub(crate) dtype: DType,
    pub(crate) tile: Tile,
}

/// The first pass of decode: partial results of one f32 query a head, for each of `splits` ranges of keys.
/// Reads Q, K and V, writes [`Slot::Partials`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecodePartials {
    /// One query at the last of the keys, over a head-major cache; its log-sum-exp is asked for.
    pub(crate) problem: Arc<Problem>,
    pub(crate) splits: u32,
}

/// The second pass of decode. Reads [`Slot::Partials`], writes [`Role::Output`], `[H, D]` in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JoinPartials {
    pub(crate) heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) splits: u32,
}

/// The kernel that a caller named for an attention. Only a device that has kernels of these names heeds it;
/// the result is the problem's on every device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Hint {
    /// The kernel's name; the device chooses one where there is none.
    pub(crate) kernel: Option<&'static str>,
    /// Simdgroups of a threadgroup, where the kernel leaves a choice.
    pub(crate) simdgroups: Option<u32>,
}

/// One piece of work.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Work {
    Attention(Arc<Problem>, Hint),
    FillMask(FillMask),
    FillBlocks(FillBlocks),
    ClassifyTiles(ClassifyTiles),
    DecodePartials(DecodePartials),
    JoinPartials(JoinPartials),
}

impl Work {
    /// The work's name, as messages and captures give it.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Attention(..) => "attention",
            Self::FillMask(_) => "mask fill",
            Self::FillBlocks(_) => "block-diagonal mask fill",
            Self::ClassifyTiles(_) => "tile classes",
            Self::DecodePartials(_) => "decode",
            Self::JoinPartials(_) => "decode's join",
        }
    }

    /// How it uses an operand.
    pub(crate) fn access(&self, slot: Slot) -> Access {
        let written = match self {
            Self::Attention(..) => match slot {
                Slot::Operand(role) => role.is_output(),
                Slot::Partials | Slot::SequenceIds | Slot::Positions => false,
            },
            Self::FillMask(_) | Self::FillBlocks(_) => slot == Slot::Operand(Role::Mask),
            Self::ClassifyTiles(_) => slot == Slot::Operand(Role::TileClasses),
            Self::DecodePartials(_) => slot == Slot::Partials,
            Self::JoinPartials(_) => slot == Slot::Operand(Role::Output),
        };
        if written { Access::Write } else { Access::Read }
    }
}

/// Work with what a device prepared for it: its kernel, its params, whatever does not depend on where the
/// operands lie.
pub(crate) struct Planned {
    /// The device that prepared it.
    pub(crate) device: u64,
    pub(crate) work: Work,
    /// The backend's own; the CPU's holds nothing.
    #[cfg_attr(
        not(any(
            feature = "cuda",
            feature = "emulator",
            all(feature = "metal", target_vendor = "apple")
        )),
        allow(dead_code)
    )]
    pub(crate) state: Box<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Planned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Planned")
            .field("device", &self.device)
            .field("work", &self.work)
            .finish_non_exhaustive()
    }
}

/// Planned work over operands: the runtime's buffers, or the [`Span`]s that a backend gets.
#[derive(Debug, Clone)]
pub(crate) struct Task<B> {
    pub(crate) planned: Arc<Planned>,
    /// Shared, so that a command that is replayed copies no handle.
    pub(crate) operands: Arc<[(Slot, B)]>,
}

impl<B> Task<B> {
    pub(crate) fn work(&self) -> &Work {
        &self.planned.work
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&B> {
        let found = self.operands.iter().find(|(s, _)| *s == slot);
        found.map(|(_, operand)| operand)
    }

    pub(crate) fn map<C>(&self, map: impl Fn(&B) -> C) -> Task<C> {
        let operands = self.operands.iter();
        Task {
            planned: Arc::clone(&self.planned),
            operands: operands.map(|(slot, b)| (*slot, map(b))).collect(),
        }
    }
}

/// Part of a device's memory, inside its bounds.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl Task<Span> {
    /// Where the device's kernels see an operand, which must be there.
    pub(crate) fn address(&self, slot: Slot) -> Result<*mut u8> {
        match self.get(slot) {
            Some(span) => self.address_of(slot, span),
            None => Err(MlxError::expected(slot.name(), "an operand", "none")),
        }
    }

    /// `len` elements of an operand, to read in place; an error where it holds fewer.
    ///
    /// # Safety
    /// The device's memory is this process's own, the operand is aligned for `T`, and nothing writes it
    /// while the slice lives.
    pub(crate) unsafe fn slice<T: Pod>(&self, slot: Slot, len: usize) -> Result<&[T]> {
        let at = self.elements(slot, len)?;
        // SAFETY: the span holds as many elements; the caller promises the rest.
        Ok(unsafe { std::slice::from_raw_parts(at, len) })
    }

    /// As [`Self::slice`], to write in place.
    ///
    /// # Safety
    /// As for [`Self::slice`], and nothing else uses the operand while the slice lives.
    #[allow(clippy::mut_from_ref)] // The caller promises that nobody else has it.
    pub(crate) unsafe fn slice_mut<T: Pod>(&self, slot: Slot, len: usize) -> Result<&mut [T]> {
        let at = self.elements(slot, len)?;
        // SAFETY: as for `slice`.
        Ok(unsafe { std::slice::from_raw_parts_mut(at, len) })
    }

    /// Where an operand lies, which must hold `len` elements.
    fn elements<T>(&self, slot: Slot, len: usize) -> Result<*mut T> {
        let at = self.address(slot)?.cast();
        let held = self.get(slot).map_or(0, |span| span.len / size_of::<T>());
        if len > held {
            return Err(MlxError::expected(
                slot.name(),
                format!("{len} elements"),
                held,
            ));
        }
        Ok(at)
    }

    fn address_of(&self, slot: Slot, span: &Span) -> Result<*mut u8> {
        let base = span.memory.address(self.work().access(slot))?;
        Ok(base.wrapping_add(span.offset))
    }

    /// Where the operands of an attention lie; null for those that it has not.
    pub(crate) fn pointers(&self) -> Result<Pointers> {
        let at = |role| {
            let slot = Slot::Operand(role);
            let span = self.get(slot);
            span.map_or(Ok(std::ptr::null_mut()), |span| self.address_of(slot, span))
        };
        Ok(Pointers {
            q: at(Role::Query)?,
            k: at(Role::Key)?,
            v: at(Role::Value)?,
            o: at(Role::Output)?,
            mask: at(Role::Mask)?,
            tile_classes: at(Role::TileClasses)?,
            sinks: at(Role::Sinks)?.cast(),
            alibi_slopes: at(Role::AlibiSlopes)?.cast(),
            lse: at(Role::Lse)?.cast(),
            block_table: at(Role::BlockTable)?.cast(),
            key_lengths: at(Role::KeyLengths)?.cast(),
        })
    }
}

/// Addresses of a problem's operands. Whoever makes one promises that each pointer is valid for the
/// elements that [`Problem::operand`] asks for, aligned for its dtype, that outputs overlap nothing
/// else, and that nobody else writes any of it while the job runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pointers {
    pub(crate) q: *const u8,
    pub(crate) k: *const u8,
    pub(crate) v: *const u8,
    pub(crate) o: *mut u8,
    /// Null without a mask.
    pub(crate) mask: *const u8,
    /// Null without tile classes.
    pub(crate) tile_classes: *const u8,
    /// Null without sinks.
    pub(crate) sinks: *const f32,
    /// Null without ALiBi.
    pub(crate) alibi_slopes: *const f32,
    /// Null without a log-sum-exp output.
    pub(crate) lse: *mut f32,
    /// Null without pages.
    pub(crate) block_table: *const i32,
    /// Null where the host knows them.
    pub(crate) key_lengths: *const u32,
}

// SAFETY: the pointers are only addresses; the promise above makes their use from several threads
// sound, since kernels write disjoint rows.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}
