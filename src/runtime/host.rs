//! The caller's own memory in, for the devices that run on this machine's processors.

use std::ptr::NonNull;
use std::sync::Arc;

use super::buffer::MlxBuffer;
use super::device::{MlxDevice, check_fits};
use crate::backend::DeviceKind;
use crate::backend::host_memory::CallersMemory;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

impl MlxDevice {
    /// The caller's memory as an operand, without a copy; [`MlxBuffer::slice_view`] gives its parts.
    ///
    /// # Errors
    /// `InvalidArgument` where this is neither the CPU nor the emulator, `base` is null or off its
    /// elements' alignment, or `shape` does not fit `byte_len`.
    ///
    /// # Safety
    /// While any handle on the result lives (an encoder holds one until its command has been waited
    /// for):
    /// - `byte_len` bytes at `base` can be read, and written if a command writes the result;
    /// - nothing else writes them while a command or a slice of ours uses them, nor uses them while
    ///   a command or a slice of ours writes them;
    /// - what is written through one wrapping is not used through another in one command: they count
    ///   as different memory.
    ///
    /// ```
    /// use mlx_flash_attn::{CpuOptions, DType, MlxDevice};
    ///
    /// # fn main() -> mlx_flash_attn::Result<()> {
    /// let device = MlxDevice::cpu(CpuOptions::default())?;
    /// let mut cache = vec![0.5_f32; 2 * 64];
    /// // SAFETY: `cache` outlives the buffer, and nothing else uses it until then.
    /// let k = unsafe { device.host_wrap(cache.as_mut_ptr().cast(), 512, DType::F32, vec![2, 64])? };
    /// assert_eq!(k.as_slice::<f32>()?[127], 0.5);
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn host_wrap(
        &self,
        base: *mut u8,
        byte_len: usize,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Result<MlxBuffer> {
        let kind = self.kind();
        if !matches!(kind, DeviceKind::Cpu | DeviceKind::Emulator) {
            return Err(MlxError::expected(
                "device",
                "one whose memory is the host's (cpu, emulator)",
                kind,
            ));
        }
        check_fits("byte_len", byte_len, dtype, &shape)?;
        let aligned = base.addr().is_multiple_of(dtype.size_of());
        let Some(base) = NonNull::new(base).filter(|_| aligned) else {
            return Err(MlxError::expected(
                "base",
                format!("an address on {} bytes", dtype.size_of()),
                format!("{base:?}"),
            ));
        };
        // SAFETY: promised by the caller.
        let memory = unsafe { CallersMemory::wrap(base, byte_len) };
        Ok(MlxBuffer::of_caller(Arc::new(memory), kind, dtype, shape))
    }
}
