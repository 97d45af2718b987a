//! How a CUDA device is opened: which GPU, and whose kernels it takes.

use std::str::FromStr;

use super::driver::unavailable;
use super::table::Capability;
use crate::error::{MlxError, Result};

/// The kernels and tiles that a GPU takes. Whichever they are, they are compiled for the GPU that runs them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum CudaKernels {
    /// The best for it.
    #[default]
    Own,
    /// Those that run on every GPU, with the tiles for its shared memory: on Hopper, not Hopper's own.
    Portable,
    /// Those of GPUs of this compute capability, major and minor: to see on one GPU what another does. The GPU must
    /// have as much shared memory, and Hopper's kernels run on Hopper alone.
    Of(u32, u32),
}

impl CudaKernels {
    /// The capability whose rows of the table a GPU of `own` takes.
    pub(super) fn rows(self, own: Capability) -> Result<Capability> {
        let of = match self {
            Self::Own => own,
            // Blackwell has as much shared memory and no kernels of its own.
            Self::Portable if own.0 == Capability::HOPPER.0 => Capability(10, 0),
            Self::Portable => own,
            Self::Of(major, minor) => Capability(major, minor),
        };
        let hopper = of.0 == Capability::HOPPER.0 && own.0 != Capability::HOPPER.0;
        if of < Capability::OLDEST || of.shared_bytes() > own.shared_bytes() || hopper {
            return Err(unavailable(format!(
                "a GPU of compute capability {}.{} cannot run the kernels for {}.{}",
                own.0, own.1, of.0, of.1
            )));
        }
        Ok(of)
    }
}

impl FromStr for CudaKernels {
    type Err = MlxError;

    /// `own`, `portable`, `hopper`, or an architecture such as `sm_86`.
    fn from_str(name: &str) -> Result<Self> {
        match (name, Capability::of_arch(name)) {
            ("own", _) => Ok(Self::Own),
            ("portable", _) => Ok(Self::Portable),
            ("hopper", _) => Ok(Self::Of(9, 0)),
            (_, Some(Capability(major, minor))) => Ok(Self::Of(major, minor)),
            _ => Err(MlxError::expected(
                "kernels",
                "own, portable, hopper or an architecture such as sm_86",
                name,
            )),
        }
    }
}

/// How to open a CUDA device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// The GPU's number.
    pub ordinal: usize,
    /// The kernels that it takes.
    pub kernels: CudaKernels,
}

impl CudaOptions {
    /// Options from `MLX_FLASH_CUDA_DEVICE`, a number, and `MLX_FLASH_CUDA_KERNELS`, as [`CudaKernels`] parses it.
    ///
    /// # Errors
    /// `InvalidArgument` where a variable is neither.
    pub fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let ordinal = var("MLX_FLASH_CUDA_DEVICE").map(|n| {
            n.parse()
                .map_err(|_| MlxError::expected("MLX_FLASH_CUDA_DEVICE", "the number of a GPU", n))
        });
        let kernels = var("MLX_FLASH_CUDA_KERNELS").map(|name| name.parse());
        Ok(Self {
            ordinal: ordinal.transpose()?.unwrap_or_default(),
            kernels: kernels.transpose()?.unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_names() {
        for (name, kernels) in [
            ("own", CudaKernels::Own),
            ("portable", CudaKernels::Portable),
            ("hopper", CudaKernels::Of(9, 0)),
            ("sm_120", CudaKernels::Of(12, 0)),
        ] {
            assert_eq!(name.parse::<CudaKernels>().unwrap(), kernels);
        }
        for none in ["", "sm_", "ampere", "8.0"] {
            let error = none.parse::<CudaKernels>().unwrap_err();
            assert_eq!(error.argument(), Some("kernels"), "{none}");
        }
    }

    #[test]
    fn a_gpu_takes_kernels_that_fit_it() {
        let hopper = Capability(9, 0);
        let rows = |kernels: CudaKernels, own| kernels.rows(own).ok();
        assert_eq!(rows(CudaKernels::Own, hopper), Some(hopper));
        assert_eq!(rows(CudaKernels::Portable, hopper), Some(Capability(10, 0)));
        let ada = Capability(8, 9);
        assert_eq!(rows(CudaKernels::Portable, ada), Some(ada));
        for of in [(8, 0), (8, 6), (12, 0), (9, 0)] {
            let kernels = CudaKernels::Of(of.0, of.1);
            assert_eq!(rows(kernels, hopper), Some(Capability(of.0, of.1)));
        }
        // Too much shared memory; Hopper's own; too old.
        for (of, own) in [((8, 0), ada), ((9, 0), Capability(10, 0)), ((7, 0), hopper)] {
            assert_eq!(rows(CudaKernels::Of(of.0, of.1), own), None, "{of:?}");
        }
    }
}
