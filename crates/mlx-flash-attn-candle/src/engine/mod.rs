//! candle's devices as this library sees them: memory taken as it is, commands put where candle puts
//! its own.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod metal;

use candle_core::{DType, Result, Storage};
use mlx_flash_attn::{CommandEncoder, MlxBuffer, MlxDevice};

pub(crate) use cpu::Cpu;
#[cfg(feature = "cuda")]
pub(crate) use cuda::Cuda;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub(crate) use metal::Metal;

/// A buffer, with what candle wants held until the command has been issued.
pub(crate) type Wrapped<H> = (MlxBuffer, H);

/// A device of candle's.
pub(crate) trait Engine {
    /// candle's memory on it.
    type Storage;
    /// What candle wants held until the command has been issued.
    type Held<'a>
    where
        Self: 'a;

    /// The same device for this library.
    fn device(&self) -> &MlxDevice;

    /// The storage as one of this device's.
    fn of(storage: &Storage) -> Option<&Self::Storage>;

    fn into_storage(storage: Self::Storage) -> Storage;

    /// Memory for an output, of bf16, f16 or f32.
    fn output(&self, dtype: DType, len: usize) -> Result<Self::Storage>;

    /// The storage from element `start` on.
    ///
    /// # Safety
    /// Until the command that reads the result has run, the storage lives and nobody writes it,
    /// unless candle orders it after the command.
    unsafe fn wrap<'a>(
        &'a self,
        storage: &'a Self::Storage,
        start: usize,
    ) -> Result<Wrapped<Self::Held<'a>>>;

    /// The whole storage, to be written.
    ///
    /// # Safety
    /// Until the command that writes the result has run, the storage lives and nobody else uses it,
    /// unless candle orders it after the command.
    unsafe fn wrap_mut<'a>(
        &'a self,
        storage: &'a mut Self::Storage,
    ) -> Result<Wrapped<Self::Held<'a>>>;

    /// Runs what was recorded, or puts it among candle's own commands without waiting for it.
    ///
    /// # Safety
    /// What `wrap` and `wrap_mut` ask for holds for every recorded buffer.
    unsafe fn run(&self, encoder: CommandEncoder) -> Result<()>;
}
