//! The table of devices: how each kind is opened, and what to do where a build or a machine has none.

use std::sync::Arc;

use super::Backend;
use super::cpu::{Cpu, CpuOptions};
#[cfg(feature = "cuda")]
use super::cuda::{Cuda, CudaOptions};
#[cfg(feature = "emulator")]
use super::emulator::{Emulator, EmulatorOptions};
use super::kind::DeviceKind;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
use super::metal::Metal;
use crate::error::{MlxError, Result};

/// Those that are taken where nobody names one, the best first.
pub(crate) const BY_DEFAULT: [DeviceKind; 3] =
    [DeviceKind::Metal, DeviceKind::Cuda, DeviceKind::Cpu];

/// Opens a device of a kind.
pub(crate) fn open(kind: DeviceKind) -> Result<Arc<dyn Backend>> {
    match kind {
        DeviceKind::Cpu => Ok(Arc::new(Cpu::open(CpuOptions::from_env()?)?)),
        #[cfg(all(feature = "metal", target_vendor = "apple"))]
        DeviceKind::Metal => Ok(Arc::new(Metal::open()?)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Arc::new(Cuda::open(CudaOptions::from_env()?)?)),
        #[cfg(feature = "emulator")]
        DeviceKind::Emulator => Ok(Arc::new(Emulator::open(EmulatorOptions::default())?)),
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
        _ => "this build has no such backend",
    }
}
