//! Typed access to what a dispatch binds, with every bound checked: a dispatch may come from any
//! caller of the encoder.

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::{AnyBitPattern, Pod};

use crate::attention::bindings::Access;
use crate::backend::{Arg, Dispatch};
use crate::error::{MlxError, Result};

/// Elements that a dispatch binds, checked for size and alignment, at the address where the device's
/// kernels see them.
#[derive(Debug)]
pub(crate) struct Span<'a, T> {
    ptr: *mut T,
    len: usize,
    dispatch: PhantomData<&'a Dispatch>,
}

impl<'a, T: Pod> Span<'a, T> {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn ptr(&self) -> *mut T {
        self.ptr
    }

    /// The elements, to read in place.
    ///
    /// # Safety
    /// The device's memory is this process's own, and nothing writes it while the slice lives.
    pub(crate) unsafe fn slice(self) -> &'a [T] {
        // SAFETY: length and alignment were checked, the dispatch keeps the memory, and the caller
        // promises the rest.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// The elements, to write in place.
    ///
    /// # Safety
    /// The device's memory is this process's own, and nothing else uses it while the slice lives.
    pub(crate) unsafe fn slice_mut(self) -> &'a mut [T] {
        // SAFETY: as for `slice`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// The bound arguments of one dispatch.
pub(crate) struct Args<'a>(&'a Dispatch);

/// A copy, whose size may be what a caller asked for.
fn copied(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    let room = copy.try_reserve_exact(bytes.len());
    room.map_err(|_| MlxError::BufferAllocationError { bytes: bytes.len() })?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

impl<'a> Args<'a> {
    pub(crate) fn new(dispatch: &'a Dispatch) -> Self {
        Self(dispatch)
    }

    fn fail(
        &self,
        index: usize,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> MlxError {
        let name = &self.0.kernel.name;
        MlxError::CommandBufferError(format!(
            "{name}: buffer {index}: expected {expected}, got {got}"
        ))
    }

    fn get(&self, index: usize) -> Option<&'a Arg> {
        self.0
            .args
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, arg)| arg)
    }

    /// Address, as the device's kernels see it, of `elements` elements of `size` bytes at an index,
    /// aligned to them.
    pub(crate) fn pointer(
        &self,
        index: usize,
        elements: usize,
        size: usize,
        access: Access,
    ) -> Result<*mut u8> {
        let (base, len) = match self.get(index) {
            None => return Err(self.fail(index, "a binding", "none")),
            Some(Arg::Memory {
                memory,
                offset,
                len,
            }) => (memory.address(access)?.wrapping_add(*offset), *len),
            Some(Arg::Bytes(_)) if access.writes() => {
                return Err(self.fail(index, "a buffer to write", "bytes"));
            }
            Some(Arg::Bytes(bytes)) => (bytes.as_ptr().cast_mut(), bytes.len()),
        };
        if elements.checked_mul(size).is_none_or(|bytes| bytes > len) {
            return Err(self.fail(
                index,
                format!("{elements} elements of {size} bytes"),
                format!("{len} bytes"),
            ));
        }
        if !(base as usize).is_multiple_of(size) {
            return Err(self.fail(
                index,
                format!("an address on {size} bytes"),
                format!("{base:?}"),
            ));
        }
        Ok(base)
    }

    /// Refuses a buffer that does not start on `size` bytes; bytes in the command are aligned.
    pub(crate) fn aligned(&self, index: usize, size: usize) -> Result<()> {
        match self.get(index) {
            Some(Arg::Memory { .. }) => self.pointer(index, 1, size, Access::Read).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// A struct of params, read by value.
    pub(crate) fn params<T: AnyBitPattern>(&self, index: usize) -> Result<T> {
        let bytes = self.bytes(index, size_of::<T>())?;
        Ok(bytemuck::pod_read_unaligned(&bytes))
    }

    /// Elements read by value.
    pub(crate) fn elements<T: Pod>(&self, index: usize, count: usize) -> Result<Vec<T>> {
        let len = count
            .checked_mul(size_of::<T>())
            .ok_or_else(|| self.fail(index, "a count that fits", count))?;
        let bytes = self.bytes(index, len)?;
        let mut elements = Vec::new();
        let room = elements.try_reserve_exact(count);
        room.map_err(|_| MlxError::BufferAllocationError { bytes: len })?;
        let chunks = bytes.chunks_exact(size_of::<T>());
        elements.extend(chunks.map(bytemuck::pod_read_unaligned::<T>));
        Ok(elements)
    }

    fn bytes(&self, index: usize, len: usize) -> Result<Vec<u8>> {
        match self.get(index) {
            Some(Arg::Bytes(bytes)) if bytes.len() >= len => copied(&bytes[..len]),
            Some(Arg::Bytes(bytes)) => Err(self.fail(index, format!("{len} bytes"), bytes.len())),
            Some(Arg::Memory {
                memory,
                offset,
                len: there,
            }) if *there >= len => {
                let host = memory.host(Access::Read)?;
                // SAFETY: the encoder keeps `offset + there` inside the memory; nobody writes while
                // commands run.
                copied(unsafe { std::slice::from_raw_parts(host.add(*offset), len) })
            }
            Some(Arg::Memory { len: there, .. }) => {
                Err(self.fail(index, format!("{len} bytes"), there))
            }
            None => Err(self.fail(index, "a binding", "none")),
        }
    }

    /// `count` elements to read or to write.
    pub(crate) fn span<T: Pod>(
        &self,
        index: usize,
        count: usize,
        access: Access,
    ) -> Result<Span<'a, T>> {
        Ok(Span {
            ptr: self.pointer(index, count, size_of::<T>(), access)?.cast(),
            len: count,
            dispatch: PhantomData,
        })
    }

    /// Refuses a dispatch in which a written binding overlaps another.
    pub(crate) fn check_aliasing(&self) -> Result<()> {
        let accesses = self.0.kernel.accesses;
        let buffers = self.0.args.iter().filter_map(|(index, arg)| match arg {
            Arg::Memory {
                memory,
                offset,
                len,
            } => {
                let at = Arc::as_ptr(memory).cast();
                Some((*index, at, *offset..*offset + *len, accesses.of(*index)))
            }
            Arg::Bytes(_) => None,
        });
        crate::backend::overlap(buffers).map_or(Ok(()), |(a, b)| {
            Err(self.fail(
                a,
                "an output that overlaps nothing",
                format!("the memory of buffer {b}"),
            ))
        })
    }
}
