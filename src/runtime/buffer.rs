//! Typed views of a device's memory.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

pub use super::guards::{ReadGuard, WriteGuard};
use super::snapshot::Snapshots;
use super::uses::{Storage, overlap};
use crate::backend::access::Access;
use crate::backend::{DeviceKind, Memory};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// A typed view of a device's memory, in whole or in part. Clones and views share the memory.
///
/// Host access is exact to the view: offset and length are its own.
///
/// | method | gives | while it lives |
/// |---|---|---|
/// | [`read`](Self::read) | the memory itself | a commit that writes the bytes is an error |
/// | [`write`](Self::write) | the memory itself, for writing | a commit that touches the bytes is an error |
/// | [`as_slice`](Self::as_slice) | a copy that this handle keeps | nothing is refused |
/// | [`as_mut_slice`](Self::as_mut_slice) | the memory itself, for writing | no other handle exists |
/// | [`upload`](Self::upload), [`download`](Self::download), [`copy_from`](Self::copy_from) | a copy of some elements | the call alone |
///
/// Each of them is refused, with an error that says what to do, from the moment that a dispatch which
/// writes the bytes is encoded until its command has been waited for. A refused commit runs nothing.
///
/// A slice cannot outlive its guard, and a slice of [`as_slice`](Self::as_slice) ends where its handle
/// is borrowed mutably:
/// ```compile_fail,E0597
/// # fn f(buffer: &mlx_flash_attn::MlxBuffer) -> mlx_flash_attn::Result<f32> {
/// let slice: &[f32];
/// {
///     let guard = buffer.read::<f32>()?;
///     slice = &guard;
/// }
/// # Ok(slice[0])
/// # }
/// ```
/// ```compile_fail,E0502
/// # fn f(buffer: &mut mlx_flash_attn::MlxBuffer) -> mlx_flash_attn::Result<f32> {
/// let slice: &[f32] = buffer.as_slice()?;
/// buffer.as_mut_slice::<f32>()?[0] = 1.0;
/// # Ok(slice[0])
/// # }
/// ```
#[derive(Debug)]
pub struct MlxBuffer {
    storage: Arc<Storage>,
    offset: usize,
    len: usize,
    dtype: DType,
    shape: Arc<[usize]>,
    /// Why the view cannot be used: it was made past the end of its parent.
    fault: Option<Arc<str>>,
    snapshots: Snapshots,
}

impl Clone for MlxBuffer {
    /// Another handle on the same memory. Slices of [`MlxBuffer::as_slice`] stay with their own handle.
    fn clone(&self) -> Self {
        Self {
            storage: Arc::clone(&self.storage),
            offset: self.offset,
            len: self.len,
            dtype: self.dtype,
            shape: Arc::clone(&self.shape),
            fault: self.fault.clone(),
            snapshots: Snapshots::default(),
        }
    }
}

impl MlxBuffer {
    pub(crate) fn new(
        memory: Arc<dyn Memory>,
        device: DeviceKind,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Self {
        let len = memory.len();
        Self {
            storage: Arc::new(Storage::new(memory, device)),
            offset: 0,
            len,
            dtype,
            shape: shape.into(),
            fault: None,
            snapshots: Snapshots::default(),
        }
    }

    /// As [`Self::new`], over memory of the caller's, which may change unseen.
    pub(crate) fn of_caller(
        memory: Arc<dyn Memory>,
        device: DeviceKind,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Self {
        let buffer = Self::new(memory, device, dtype, shape);
        buffer.storage.untrack();
        buffer
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, as given when the buffer was made.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of this view.
    pub fn byte_len(&self) -> usize {
        self.len
    }

    /// Elements of this view: the product of its shape.
    pub fn element_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Where this view starts in its memory, in bytes.
    pub fn byte_offset(&self) -> u64 {
        self.offset as u64
    }

    /// Address of the allocation's first byte on the host, or null where the host cannot see it. Reading
    /// and writing through it is up to the caller, who keeps clear of running commands, of guards and
    /// of calls that copy.
    ///
    /// Null, too, for a view that does not start where its allocation starts: programs for `mlx-native`
    /// add [`Self::byte_offset`] to this address, others take it for the view's own, and both would reach
    /// other bytes without notice. [`Self::read`] and [`Self::write`] lend the view's own bytes.
    pub fn contents_ptr(&self) -> *mut c_void {
        let base = self.check().and_then(|()| self.storage.raw());
        base.ok()
            .filter(|_| self.offset == 0)
            .map_or(std::ptr::null_mut(), <*mut u8>::cast)
    }

    /// The view's elements as `T`, without a copy where the host shares the device's memory. A commit
    /// that writes them is refused while the guard lives.
    ///
    /// # Errors
    /// `InvalidArgument` where the view is out of bounds, misaligned for `T` or not a whole number of
    /// `T`s, where a dispatch that writes it is encoded and has not finished, and while a write guard
    /// lends it. What copying from a GPU reports.
    ///
    /// ```
    /// # use mlx_flash_attn::{DType, MlxDevice};
    /// # fn main() -> mlx_flash_attn::Result<()> {
    /// let device = MlxDevice::new()?;
    /// let cache = device.alloc_buffer(16, DType::F32, vec![4])?;
    /// let other = cache.clone();
    /// cache.write()?.copy_from_slice(&[1.0_f32, 2.0, 3.0, 4.0]);
    /// assert_eq!(other.read::<f32>()?[2], 3.0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn read<T: Pod>(&self) -> Result<ReadGuard<T>> {
        let count = self.elements::<T>()?;
        let (hold, base) = self.storage.lend(self.range(), Access::Read)?;
        let ptr = self.aligned::<T>(base)?;
        // SAFETY: `elements` and `aligned` checked length and alignment; the view lies inside its
        // memory, which the hold keeps; what writes it is refused while the hold lives.
        Ok(unsafe { ReadGuard::new(ptr, count, hold) })
    }

    /// The view's elements as `T`, for writing, whatever other handles there are. A commit that touches
    /// them is refused while the guard lives. Operands of a captured command are refilled with it
    /// between two replays.
    ///
    /// # Errors
    /// As for [`Self::read`], and `InvalidArgument` while a committed command that reads the view has
    /// not finished or any guard lends it.
    pub fn write<T: Pod>(&self) -> Result<WriteGuard<T>> {
        let count = self.elements::<T>()?;
        let (hold, base) = self.storage.lend(self.range(), Access::ReadWrite)?;
        let ptr = self.aligned::<T>(base)?;
        // SAFETY: as for `read`; whatever touches the elements is refused while the hold lives.
        Ok(unsafe { WriteGuard::new(ptr, count, hold) })
    }

    /// The view's elements as `T`, in a copy of now that this handle keeps until it is borrowed mutably
    /// or dropped: a slice never changes, and a call after the next write gives another one. A copy is
    /// used again while the bytes are the same. A loop that reads what each command wrote takes
    /// [`Self::read`] instead, so that copies do not pile up.
    ///
    /// # Errors
    /// As for [`Self::read`], and `BufferAllocationError` where there is no room for the copy.
    pub fn as_slice<T: Pod>(&self) -> Result<&[T]> {
        let count = self.elements::<T>()?;
        if !self.offset.is_multiple_of(align_of::<T>()) {
            return Err(self.misaligned::<T>());
        }
        let ptr = self.snapshots.of(&self.storage, self.range())?;
        if !ptr.addr().is_multiple_of(align_of::<T>()) {
            return Err(self.misaligned::<T>());
        }
        // SAFETY: the copy has the view's length, is aligned, is never written, and stays until this
        // handle is borrowed mutably or dropped.
        Ok(unsafe { std::slice::from_raw_parts(ptr.cast(), count) })
    }

    /// The view's elements as `T`, for writing. The memory may have no other handle: no clone, no view,
    /// no guard, no capture and no command that has not run; [`Self::write`] asks for less.
    ///
    /// # Errors
    /// `InvalidArgument` where there is another handle, and as for [`Self::read`].
    pub fn as_mut_slice<T: Pod>(&mut self) -> Result<&mut [T]> {
        self.snapshots.clear();
        let count = self.elements::<T>()?;
        let handles = Arc::strong_count(&self.storage);
        let Some(base) = Arc::get_mut(&mut self.storage).and_then(Storage::exclusive) else {
            return Err(MlxError::InvalidArgument(format!(
                "buffer: as_mut_slice needs the only handle on the memory, got one of {} \
                 (clones, views, captures and unfinished commands count; `write` takes any handle)",
                handles.max(2)
            )));
        };
        let ptr = self.aligned::<T>(base?)?;
        // SAFETY: length and alignment were checked; the view lies inside its memory, which lives as
        // long as `self`; this handle, borrowed mutably, is the only one.
        Ok(unsafe { std::slice::from_raw_parts_mut(ptr, count) })
    }

    /// A view of `n_elements` elements from `byte_offset` bytes into a buffer that starts where its
    /// allocation starts. A view that leaves the buffer's bounds is empty, and every use of it is refused
    /// with the reason.
    ///
    /// So is a view of a view that starts further on: programs for `mlx-native` count `byte_offset` from
    /// the allocation there, others from the view, and one of them would get other bytes without notice.
    /// Take it of the whole buffer, or with [`Self::subview`], which counts from the view.
    pub fn slice_view(&self, byte_offset: u64, n_elements: usize) -> Self {
        if self.offset == 0 {
            return self.subview(byte_offset, n_elements);
        }
        let mut view = Self {
            len: 0,
            shape: [0].into(),
            ..self.clone()
        };
        view.fault.get_or_insert_with(|| {
            format!(
                "slice_view: expected a buffer that starts at byte 0 of its allocation, got a view that \
                 starts at byte {}: whether byte {byte_offset} counts from the allocation or from the view \
                 is ambiguous; `subview` counts from the view",
                self.offset
            )
            .into()
        });
        view
    }

    /// A view of `n_elements` elements from `byte_offset` bytes into this view, wherever that starts. A
    /// view that leaves its parent's bounds is empty, and every use of it is refused with the reason.
    pub fn subview(&self, byte_offset: u64, n_elements: usize) -> Self {
        let mut view = Self {
            shape: [n_elements].into(),
            ..self.clone()
        };
        let range = (|| {
            let start = usize::try_from(byte_offset).ok()?;
            let len = n_elements.checked_mul(self.dtype.size_of())?;
            (start.checked_add(len)? <= self.len).then_some((start, len))
        })();
        match range {
            Some((start, len)) => {
                view.offset += start;
                view.len = len;
            }
            None => {
                view.len = 0;
                view.shape = [0].into();
                view.fault.get_or_insert_with(|| {
                    let size = self.dtype.size_of();
                    format!(
                        "slice_view: expected a view inside {} bytes, got {n_elements} elements of \
                         {size} bytes at byte {byte_offset}",
                        self.len
                    )
                    .into()
                });
            }
        }
        view
    }

    /// A view of no bytes, with the shape as it is.
    pub(crate) fn emptied(mut self) -> Self {
        self.len = 0;
        self
    }

    /// Refuses a view that was made out of bounds.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.fault {
            None => Ok(()),
            Some(fault) => Err(MlxError::InvalidArgument(fault.to_string())),
        }
    }

    pub(crate) fn storage(&self) -> &Arc<Storage> {
        &self.storage
    }

    /// The bytes of this view within its memory.
    pub(crate) fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }

    /// Whether two views share a byte.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage) && overlap(&self.range(), &other.range())
    }

    /// How many copies this handle keeps.
    #[cfg(test)]
    pub(crate) fn copies(&self) -> usize {
        self.snapshots.len()
    }

    /// How many `T`s the view holds.
    fn elements<T: Pod>(&self) -> Result<usize> {
        self.check()?;
        let size = size_of::<T>();
        if size == 0 || !self.len.is_multiple_of(size) {
            return Err(MlxError::expected(
                "buffer",
                format!("a whole number of {size}-byte elements"),
                format!("a view of {} bytes", self.len),
            ));
        }
        Ok(self.len / size)
    }

    /// The view's first element within memory at `base`.
    fn aligned<T: Pod>(&self, base: *mut u8) -> Result<*mut T> {
        // Every view lies inside its memory.
        let ptr = base.wrapping_add(self.offset);
        if ptr.addr().is_multiple_of(align_of::<T>()) {
            Ok(ptr.cast())
        } else {
            Err(self.misaligned::<T>())
        }
    }

    fn misaligned<T>(&self) -> MlxError {
        MlxError::expected(
            "buffer",
            format!("a view aligned to {} bytes", align_of::<T>()),
            format!("a view at byte {}", self.offset),
        )
    }
}
