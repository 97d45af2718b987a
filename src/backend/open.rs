//! The table of devices: how each kind is opened.

use std::sync::Arc;

use super::{Backend, DeviceKind};
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::error::{MlxError, Result};

/// Opens a device by kind; the CPU as `MLX_FLASH_CPU_ISA` and `MLX_FLASH_THREADS` say.
pub(crate) fn open(kind: DeviceKind) -> Result<Arc<dyn Backend>> {
    match kind {
        DeviceKind::Cpu => Ok(Arc::new(Cpu::open(CpuOptions::from_env()?)?)),
        #[cfg(all(feature = "metal", target_vendor = "apple"))]
        DeviceKind::Metal => Ok(Arc::new(super::metal::Metal::open()?)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Arc::new(super::cuda::Cuda::open()?)),
        #[cfg(feature = "emulator")]
        DeviceKind::Emulator => {
            let options = super::emulator::EmulatorOptions::default();
            Ok(Arc::new(super::emulator::Emulator::open(options)?))
        }
        // On Apple systems a build with all features has every device.
        #[allow(unreachable_patterns)]
        other => Err(MlxError::DeviceUnavailable {
            device: other.name().into(),
            reason: absent(other).into(),
        }),
    }
}

/// Why a build has no backend of this kind, and what to build instead.
fn absent(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Metal if cfg!(target_vendor = "apple") => {
            "this build has no Metal: build it with `--features metal`"
        }
        DeviceKind::Metal => "Metal is on Apple systems alone; use `cpu`",
        DeviceKind::Cuda => "this build has no CUDA: build it with `--features cuda`",
        DeviceKind::Emulator => "this build has no emulator: build it with `--features emulator`",
        DeviceKind::Cpu => "this build has no such backend",
    }
}
