//! Typed access to what a raw dispatch binds, with every bound checked.

use bytemuck::{AnyBitPattern, Pod};

use crate::backend::access::Access;
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::capture::{CapturedBinding, RawDispatch};
use crate::runtime::device::{DeviceHandle, MlxDevice};

/// What one dispatch binds, for a device.
pub(super) struct Args<'a> {
    device: &'a DeviceHandle,
    raw: &'a RawDispatch,
}

impl<'a> Args<'a> {
    pub(super) fn new(device: &'a DeviceHandle, raw: &'a RawDispatch) -> Self {
        Self { device, raw }
    }

    pub(super) fn fail(&self, what: impl std::fmt::Display) -> MlxError {
        MlxError::CommandBufferError(format!("{}: {what}", self.raw.kernel()))
    }

    fn fail_at(
        &self,
        index: usize,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> MlxError {
        self.fail(format!("buffer {index}: expected {expected}, got {got}"))
    }

    fn get(&self, index: usize) -> Option<&'a CapturedBinding> {
        let mut bindings = self.raw.bindings.iter();
        bindings.find(|(i, _)| *i == index).map(|(_, bound)| bound)
    }

    /// The operand at an index: `elements` elements of `dtype`, aligned for them. Bytes in the command
    /// become a buffer of their own.
    pub(super) fn operand(
        &self,
        index: usize,
        elements: usize,
        dtype: DType,
        access: Access,
    ) -> Result<MlxBuffer> {
        let size = dtype.size_of();
        let len = match self.get(index) {
            None => return Err(self.fail_at(index, "a binding", "none")),
            Some(CapturedBinding::Buffer(buffer, _)) => buffer.range().len(),
            Some(CapturedBinding::Bytes(_)) if access.writes() => {
                return Err(self.fail_at(index, "a buffer to write", "bytes"));
            }
            Some(CapturedBinding::Bytes(bytes)) => bytes.len(),
        };
        if elements.checked_mul(size).is_none_or(|bytes| bytes > len) {
            return Err(self.fail_at(
                index,
                format!("{elements} elements of {size} bytes"),
                format!("{len} bytes"),
            ));
        }
        match self.get(index) {
            Some(CapturedBinding::Buffer(buffer, _)) => {
                let base = buffer.storage().memory.address(access)?;
                let at = base.wrapping_add(buffer.range().start);
                if !at.addr().is_multiple_of(size) {
                    return Err(self.fail_at(
                        index,
                        format!("an address on {size} bytes"),
                        format!("{at:?}"),
                    ));
                }
                Ok(buffer.clone())
            }
            Some(CapturedBinding::Bytes(bytes)) => {
                let device = MlxDevice::from_handle(self.device.clone());
                device.buffer_from_slice::<u8>(bytes, DType::U8, vec![bytes.len()])
            }
            None => Err(self.fail_at(index, "a binding", "none")),
        }
    }

    /// A struct of params, read by value.
    pub(super) fn params<T: AnyBitPattern>(&self, index: usize) -> Result<T> {
        let bytes = self.bytes(index, size_of::<T>())?;
        Ok(bytemuck::pod_read_unaligned(bytes))
    }

    /// Elements read by value.
    pub(super) fn elements<T: Pod>(&self, index: usize, count: usize) -> Result<Vec<T>> {
        let len = count
            .checked_mul(size_of::<T>())
            .ok_or_else(|| self.fail_at(index, "a count that fits", count))?;
        let bytes = self.bytes(index, len)?;
        let mut elements = Vec::new();
        let room = elements.try_reserve_exact(count);
        room.map_err(|_| MlxError::BufferAllocationError { bytes: len })?;
        let chunks = bytes.chunks_exact(size_of::<T>());
        elements.extend(chunks.map(bytemuck::pod_read_unaligned::<T>));
        Ok(elements)
    }

    /// Params as bytes. Those that lay in a buffer have been copied into the command by now.
    fn bytes(&self, index: usize, len: usize) -> Result<&'a [u8]> {
        match self.get(index) {
            Some(CapturedBinding::Bytes(bytes)) => match bytes.get(..len) {
                Some(bytes) => Ok(bytes),
                None => Err(self.fail_at(index, format!("{len} bytes"), bytes.len())),
            },
            Some(CapturedBinding::Buffer(buffer, _)) => {
                Err(self.fail_at(index, format!("{len} bytes"), buffer.range().len()))
            }
            None => Err(self.fail_at(index, "a binding", "none")),
        }
    }

    pub(super) fn same<T: PartialEq + std::fmt::Debug>(
        &self,
        what: &str,
        expected: T,
        got: T,
    ) -> Result<()> {
        if expected == got {
            return Ok(());
        }
        Err(self.fail(format!("{what}: expected {expected:?}, got {got:?}")))
    }

    pub(super) fn grid(&self, expected: [u64; 3]) -> Result<()> {
        self.same("the grid", expected, self.raw.grid.to_array())
    }

    /// Refuses a threadgroup that is not 32 threads by one of `simdgroups`.
    pub(super) fn threadgroup(&self, simdgroups: &[u64]) -> Result<()> {
        let given = self.raw.threadgroup.to_array();
        let taken = || simdgroups.iter().map(|n| [32, *n, 1]);
        if taken().any(|threads| threads == given) {
            return Ok(());
        }
        let taken: Vec<String> = taken().map(|threads| format!("{threads:?}")).collect();
        let taken = taken.join(" or ");
        Err(self.fail(format!("the threadgroup: expected {taken}, got {given:?}")))
    }
}
