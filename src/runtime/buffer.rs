//! Typed views of a device's memory.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::Pod;

use crate::attention::bindings::Access;
use crate::backend::{DeviceKind, Memory};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// One allocation, shared by every handle on it.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) device: DeviceKind,
    /// Encoded writes that have not run yet.
    pending_writes: AtomicUsize,
}

/// Counts as one pending write while it lives.
#[derive(Debug)]
pub(crate) struct PendingWrite(Arc<Storage>);

impl PendingWrite {
    pub(crate) fn new(storage: &Arc<Storage>) -> Self {
        storage.pending_writes.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(storage))
    }
}

impl Drop for PendingWrite {
    fn drop(&mut self) {
        self.0.pending_writes.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A typed view of a device's memory, in whole or in part. Clones and views share the memory.
///
/// Host access is exact to the view: offset and length are its own. [`MlxBuffer::as_mut_slice`]
/// takes the only handle on the memory, so two `&mut` to it cannot exist; while an encoded write has
/// not run yet, host access is refused instead of racing it. A slice from [`MlxBuffer::as_slice`]
/// shows the buffer as the last finished command left it: take it again after the next command that
/// writes the buffer.
#[derive(Debug, Clone)]
pub struct MlxBuffer {
    storage: Arc<Storage>,
    offset: usize,
    len: usize,
    dtype: DType,
    shape: Arc<[usize]>,
    /// Why the view cannot be used: it was made past the end of its parent.
    fault: Option<Arc<str>>,
}

impl MlxBuffer {
    pub(crate) fn new(
        memory: Arc<dyn Memory>,
        device: DeviceKind,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Self {
        let len = memory.len();
        let storage = Arc::new(Storage {
            memory,
            device,
            pending_writes: AtomicUsize::new(0),
        });
        Self {
            storage,
            offset: 0,
            len,
            dtype,
            shape: shape.into(),
            fault: None,
        }
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

    /// Address of this view's first byte on the host, or null where the host cannot see it. Reading
    /// and writing through it is up to the caller, who keeps clear of running commands.
    pub fn contents_ptr(&self) -> *mut c_void {
        match self.host(Access::ReadWrite) {
            Ok(ptr) => ptr.cast(),
            Err(_) => std::ptr::null_mut(),
        }
    }

    /// The view's elements as `T`. Refuses a view that is out of bounds, misaligned for `T` or not a
    /// whole number of `T`s, and a buffer with encoded writes that have not run.
    pub fn as_slice<T: Pod>(&self) -> Result<&[T]> {
        let (ptr, count) = self.typed::<T>(Access::Read)?;
        // SAFETY: `typed` checked bounds, alignment and that no write is pending; the memory lives
        // as long as `self`; exclusive access needs the only handle.
        Ok(unsafe { std::slice::from_raw_parts(ptr, count) })
    }

    /// The view's elements as `T`, for writing. Besides what [`MlxBuffer::as_slice`] refuses, the
    /// memory may have no other handle: no clone, no view, no command that has not run.
    pub fn as_mut_slice<T: Pod>(&mut self) -> Result<&mut [T]> {
        let handles = Arc::strong_count(&self.storage);
        let unique = Arc::get_mut(&mut self.storage)
            .is_some_and(|storage| Arc::get_mut(&mut storage.memory).is_some());
        if !unique {
            return Err(MlxError::InvalidArgument(format!(
                "buffer: as_mut_slice needs the only handle on the memory, got one of {} \
                 (clones, views and unfinished commands count)",
                handles.max(2)
            )));
        }
        let (ptr, count) = self.typed::<T>(Access::ReadWrite)?;
        // SAFETY: as for `as_slice`, and this handle, borrowed mutably, is the only one.
        Ok(unsafe { std::slice::from_raw_parts_mut(ptr, count) })
    }

    /// A view of `n_elements` elements from `byte_offset` bytes into this view. A view that leaves
    /// its parent's bounds is empty, and every use of it is refused with the reason.
    pub fn slice_view(&self, byte_offset: u64, n_elements: usize) -> Self {
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
        let (a, b) = (self.range(), other.range());
        Arc::ptr_eq(&self.storage, &other.storage) && a.start < b.end && b.start < a.end
    }

    fn host(&self, access: Access) -> Result<*mut u8> {
        self.check()?;
        let base = self.storage.memory.host(access)?;
        // SAFETY: every view lies inside its memory.
        Ok(unsafe { base.add(self.offset) })
    }

    fn typed<T: Pod>(&self, access: Access) -> Result<(*mut T, usize)> {
        let size = size_of::<T>();
        if size == 0 || !self.len.is_multiple_of(size) {
            return Err(MlxError::expected(
                "buffer",
                format!("a whole number of {size}-byte elements"),
                format!("a view of {} bytes", self.len),
            ));
        }
        if self.storage.pending_writes.load(Ordering::Acquire) > 0 {
            return Err(MlxError::InvalidArgument(
                "buffer: a command that writes it is encoded but has not finished; \
                 commit it and wait first"
                    .into(),
            ));
        }
        let ptr = self.host(access)?;
        if !(ptr as usize).is_multiple_of(align_of::<T>()) {
            return Err(MlxError::expected(
                "buffer",
                format!("a view aligned to {} bytes", align_of::<T>()),
                format!("a view at byte {}", self.offset),
            ));
        }
        Ok((ptr.cast(), self.len / size))
    }
}
