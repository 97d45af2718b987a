//! Copies of some of a buffer's elements: from the host, to the host, from another buffer.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

use super::buffer::MlxBuffer;
use super::uses::overlap;
use crate::error::{MlxError, Result};

impl MlxBuffer {
    /// Copies `data` over the elements from `start` on, counted from the start of this view: one token's
    /// row of a key cache, say. Only these bytes travel, also to a GPU with memory of its own. A view may
    /// start at any byte.
    ///
    /// When this returns, `data` has been read, and what is committed later sees the new elements. On CUDA
    /// the copy itself runs in the order of the device's stream, so a call does not wait for commands that
    /// use other bytes; for memory of the caller's (`cuda_wrap`) it has run.
    ///
    /// # Errors
    /// `InvalidArgument` where `T` has not the size of this buffer's dtype, where elements are out of bounds,
    /// and as for [`Self::write`]: while a guard lends one of the bytes, a dispatch that writes one is
    /// encoded, or a committed command that touches one has not been waited for. Nothing is written then.
    /// What copying to a GPU reports.
    ///
    /// ```
    /// # use mlx_flash_attn::{DType, MlxDevice};
    /// # fn main() -> mlx_flash_attn::Result<()> {
    /// let device = MlxDevice::new()?;
    /// // Keys `[8, 2, 4]`: room for 8 tokens of 2 heads.
    /// let cache = device.alloc_buffer(8 * 2 * 4 * 4, DType::F32, vec![8, 2, 4])?;
    /// cache.upload(3 * 8, &[1.0_f32; 8])?;
    /// let mut rows = [0.0_f32; 16];
    /// cache.download(2 * 8, &mut rows)?;
    /// assert_eq!((rows[7], rows[8]), (0.0, 1.0));
    /// # Ok(())
    /// # }
    /// ```
    pub fn upload<T: Pod>(&self, start: usize, data: &[T]) -> Result<()> {
        let bytes = self.part::<T>("upload", start, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let at = bytes.start;
        self.storage().upload(at, bytemuck::cast_slice(data))
    }

    /// Copies the elements from `start` on, counted from the start of this view, into `into`, and waits for
    /// that. Only these bytes travel, also from a GPU with memory of its own.
    ///
    /// # Errors
    /// As for [`Self::upload`], but as for [`Self::read`] of guards and commands: only what writes one of
    /// the bytes is in the way. `into` is as it was then, unless copying from a GPU failed.
    pub fn download<T: Pod>(&self, start: usize, into: &mut [T]) -> Result<()> {
        let bytes = self.part::<T>("download", start, into.len())?;
        if into.is_empty() {
            return Ok(());
        }
        let at = bytes.start;
        self.storage().download(at, bytemuck::cast_slice_mut(into))
    }

    /// Copies `elements` of `source` over this view's elements from `start` on; both are counted from the
    /// start of their view. On a GPU with memory of its own the bytes stay there, unless the host has
    /// written one of the two buffers through a guard since a command last used it. What is committed later
    /// sees the new elements; on CUDA the host does not wait for the copy, as for [`Self::upload`].
    ///
    /// # Errors
    /// `InvalidArgument` where the dtypes differ, the source is another device's, elements are out of bounds,
    /// the two ranges share a byte, or a guard or command is in the way: as for [`Self::read`] of the
    /// source's bytes, and for [`Self::write`] of this view's. Nothing is written then. What copying on
    /// a GPU reports.
    pub fn copy_from(&self, start: usize, source: &Self, elements: Range<usize>) -> Result<()> {
        let (dtype, given) = (self.dtype(), source.dtype());
        if dtype != given {
            return Err(MlxError::expected("copy_from", dtype, given));
        }
        let (ours, theirs) = (self.storage().device, source.storage().device);
        if ours != theirs {
            return Err(MlxError::expected(
                "copy_from",
                format!(
                    "memory of the {ours} device (copies between devices go through `download`)"
                ),
                format!("memory of the {theirs} device"),
            ));
        }
        let Some(count) = elements.end.checked_sub(elements.start) else {
            let expected = "a range whose end is not before its start";
            return Err(MlxError::expected(
                "copy_from",
                expected,
                format!("{elements:?}"),
            ));
        };
        let from = source.elements_at("copy_from: the source", elements.start, count)?;
        let to = self.elements_at("copy_from", start, count)?;
        if Arc::ptr_eq(self.storage(), source.storage()) && overlap(&to, &from) {
            return Err(MlxError::expected(
                "copy_from",
                "ranges that share no byte",
                format!("bytes {from:?} and {to:?} of one allocation"),
            ));
        }
        if count == 0 {
            return Ok(());
        }
        self.storage().copy_from(to.start, source.storage(), from)
    }

    /// The bytes, within the allocation, of `count` elements that the host has as `T`s.
    fn part<T>(&self, what: &str, start: usize, count: usize) -> Result<Range<usize>> {
        let size = self.dtype().size_of();
        if size_of::<T>() != size {
            return Err(MlxError::expected(
                what,
                format!("{size}-byte elements of {}", self.dtype()),
                format!("{}-byte elements", size_of::<T>()),
            ));
        }
        self.elements_at(what, start, count)
    }

    /// The bytes, within the allocation, of `count` elements from `start` on.
    fn elements_at(&self, what: &str, start: usize, count: usize) -> Result<Range<usize>> {
        self.check()?;
        let size = self.dtype().size_of();
        let held = self.byte_len() / size;
        if start.checked_add(count).is_none_or(|end| end > held) {
            return Err(MlxError::expected(
                what,
                format!("elements inside 0..{held}"),
                format!("{count} from {start} on"),
            ));
        }
        // Inside the view, so no product overflows.
        let first = self.range().start + start * size;
        Ok(first..first + count * size)
    }
}
