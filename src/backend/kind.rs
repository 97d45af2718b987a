//! Kinds of device.

use std::fmt;

/// Kinds of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DeviceKind {
    /// This machine's processors.
    Cpu,
    /// An Apple GPU.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
    /// The Metal kernels, run on this machine's processors.
    Emulator,
}

impl DeviceKind {
    /// Every kind.
    pub const ALL: [DeviceKind; 4] = [Self::Cpu, Self::Metal, Self::Cuda, Self::Emulator];

    /// Name as `MLX_FLASH_DEVICE` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Emulator => "emulator",
        }
    }

    /// Finds a kind by name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
