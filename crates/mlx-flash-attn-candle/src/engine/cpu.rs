//! candle's CPU device: its vectors are read and written in place.

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Result, Storage};
use half::{bf16, f16};
use mlx_flash_attn::{CommandEncoder, DeviceKind, MlxDevice};

use super::{Engine, Wrapped};
use crate::request::{dtype_of, failed, refused};

/// This machine's processors.
#[derive(Debug)]
pub(crate) struct Cpu(MlxDevice);

impl Cpu {
    /// The one CPU device of the process, as `MLX_FLASH_CPU_ISA` and `MLX_FLASH_THREADS` say.
    pub(crate) fn get() -> Result<&'static Self> {
        static CPU: OnceLock<mlx_flash_attn::Result<Cpu>> = OnceLock::new();
        CPU.get_or_init(|| MlxDevice::open(DeviceKind::Cpu).map(Self))
            .as_ref()
            .map_err(|error| failed(error.clone()))
    }

    /// # Safety
    /// As for `wrap_mut`; where nothing writes the result, as for `wrap`.
    unsafe fn take(&self, base: *mut u8, len: usize, dtype: DType) -> Result<Wrapped<()>> {
        let dtype = dtype_of("an operand", dtype)?;
        let bytes = len * dtype.size_of();
        // SAFETY: promised by the caller; `len` elements of this type are at `base`.
        let buffer = unsafe { self.0.host_wrap(base, bytes, dtype, vec![len]) };
        Ok((buffer.map_err(failed)?, ()))
    }
}

/// Address of element `start`, and how many follow.
fn from<T>(data: &[T], start: usize) -> Option<(*const u8, usize)> {
    data.get(start..)
        .map(|rest| (rest.as_ptr().cast(), rest.len()))
}

impl Engine for Cpu {
    type Storage = CpuStorage;
    type Held<'a> = ();

    fn device(&self) -> &MlxDevice {
        &self.0
    }

    fn of(storage: &Storage) -> Option<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }

    fn output(&self, dtype: DType, len: usize) -> Result<CpuStorage> {
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(vec![0.0; len]),
            DType::F16 => CpuStorage::F16(vec![f16::ZERO; len]),
            DType::BF16 => CpuStorage::BF16(vec![bf16::ZERO; len]),
            other => return Err(refused("out", "dtype bf16, f16 or f32", other)),
        })
    }

    unsafe fn wrap<'a>(&'a self, storage: &'a CpuStorage, start: usize) -> Result<Wrapped<()>> {
        let (part, dtype) = match storage {
            CpuStorage::F32(data) => (from(data, start), DType::F32),
            CpuStorage::F16(data) => (from(data, start), DType::F16),
            CpuStorage::BF16(data) => (from(data, start), DType::BF16),
            CpuStorage::U8(data) => (from(data, start), DType::U8),
            _ => (None, DType::F64),
        };
        let (base, len) =
            part.ok_or_else(|| refused("an operand", "bf16, f16, f32 or u8", "another dtype"))?;
        // SAFETY: promised by the caller; inputs are only read.
        unsafe { self.take(base.cast_mut(), len, dtype) }
    }

    unsafe fn wrap_mut<'a>(&'a self, storage: &'a mut CpuStorage) -> Result<Wrapped<()>> {
        let (base, len, dtype) = match storage {
            CpuStorage::F32(data) => (data.as_mut_ptr().cast(), data.len(), DType::F32),
            CpuStorage::F16(data) => (data.as_mut_ptr().cast(), data.len(), DType::F16),
            CpuStorage::BF16(data) => (data.as_mut_ptr().cast(), data.len(), DType::BF16),
            _ => return Err(refused("out", "bf16, f16 or f32", "another dtype")),
        };
        // SAFETY: promised by the caller.
        unsafe { self.take(base, len, dtype) }
    }

    unsafe fn run(&self, mut encoder: CommandEncoder) -> Result<()> {
        encoder.commit_and_wait().map_err(failed)
    }
}
