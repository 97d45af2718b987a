//! Metal objects in and out: an engine's own device, buffers and encoder.
//!
//! An engine that already drives the GPU keeps its device, its buffers and its command encoder:
//! [`MlxDevice::from_metal_device`] takes the first, [`MlxDevice::metal_wrap_buffer`] the second
//! without a copy, and [`CommandEncoder::encode_into`] encodes what was recorded into the third,
//! through a [`ComputeTarget`].
//!
//! This code is type-checked and linted for Apple systems; it has not run on Apple hardware.
//! [`objc2`] and [`objc2_metal`] are passed on in the versions that these signatures use.
//!
//! ```no_run
//! # use mlx_flash_attn::metal::{ComputeTarget, DirectTarget, objc2_metal::*};
//! # use mlx_flash_attn::{CommandEncoder, Result};
//! # use mlx_flash_attn::metal::objc2::runtime::ProtocolObject;
//! # fn run(encoder: &mut CommandEncoder, compute: &ProtocolObject<dyn MTLComputeCommandEncoder>) -> Result<()> {
//! // `ops::attention(&mut encoder, ..)` has recorded its dispatches.
//! // SAFETY: the compute encoder is open, on the same device, and used by this thread alone.
//! let mut target = unsafe { DirectTarget::new(compute) };
//! // SAFETY: `in_flight` is dropped once the command buffer has completed.
//! let in_flight = unsafe { encoder.encode_into(&mut target)? };
//! # drop(in_flight);
//! # Ok(())
//! # }
//! ```

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use objc2::rc::Retained;
use objc2::runtime::ProtocolObject;
use objc2_metal::{MTLBuffer, MTLDevice, MTLResource};

pub use {objc2, objc2_metal};

use super::buffer::MlxBuffer;
use super::device::{DeviceHandle, MlxDevice, check_fits};
use super::encoder::CommandEncoder;
use super::submit::params_are_written;
use super::uses::Hold;
pub use crate::backend::access::Access;
use crate::backend::metal::launch::dispatches;
pub use crate::backend::metal::{ComputeTarget, DirectTarget};
use crate::backend::metal::{Metal, MetalMemory, Temporary, encode_into};
use crate::backend::{DeviceKind, Step};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// What an encoded command uses. While it lives, host access to what the command writes, and
/// exclusive access to what it reads, is refused.
#[must_use = "see the safety of `encode_into` for how long to keep it"]
pub struct InFlight {
    steps: Vec<Step>,
    _temporaries: Vec<Temporary>,
    _holds: Vec<Hold>,
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight")
            .field("steps", &self.steps.len())
            .finish_non_exhaustive()
    }
}

fn backend(handle: &DeviceHandle) -> Result<&Metal> {
    (&*handle.backend as &dyn Any)
        .downcast_ref()
        .ok_or_else(|| {
            let kind = handle.backend.kind();
            MlxError::expected("device", DeviceKind::Metal, kind)
        })
}

impl MlxDevice {
    /// Uses a GPU that the caller has opened. Commands of ours go through a queue of our own.
    ///
    /// # Errors
    /// `DeviceUnavailable` with the reason where the GPU or the system is too old for the kernels.
    pub fn from_metal_device(device: Retained<ProtocolObject<dyn MTLDevice>>) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(Metal::new(device)?)))
    }

    /// The caller's buffer as an operand, without a copy; [`MlxBuffer::slice_view`] gives its parts.
    /// The host sees it only where its storage mode is shared.
    ///
    /// # Errors
    /// `InvalidArgument` where this is no Metal device, the buffer is another device's, or `shape`
    /// does not fit it.
    ///
    /// # Safety
    /// While any handle on the result lives:
    /// - commands and host code outside this crate do not write it while this crate's commands or
    ///   slices use it, nor use it while this crate's commands write it;
    /// - if it is not hazard-tracked, a command of ours that touches it is waited for before the
    ///   next is committed ([`CommandEncoder::encode_into`] leaves this to the target);
    /// - what is written through one wrapping is not used through another: they count as different
    ///   memory, and only a target that finds hazards from the bindings itself would order the two.
    pub unsafe fn metal_wrap_buffer(
        &self,
        buffer: &ProtocolObject<dyn MTLBuffer>,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Result<MlxBuffer> {
        let metal = backend(self.metal_device())?;
        if *buffer.device() != *metal.device() {
            return Err(MlxError::expected(
                "buffer",
                format!("memory of {}", self.name()),
                format!("memory of {}", buffer.device().name()),
            ));
        }
        check_fits("buffer", buffer.length(), dtype, &shape)?;
        let memory = MetalMemory::wrap(objc2::Message::retain(buffer));
        Ok(MlxBuffer::of_caller(
            Arc::new(memory),
            DeviceKind::Metal,
            dtype,
            shape,
        ))
    }
}

impl CommandEncoder {
    /// Encodes what was recorded into the caller's encoder instead of committing it; afterwards
    /// nothing is recorded. Barriers stand between our own dispatches only: what was encoded before
    /// and what comes after is for the caller to order. Each dispatch is encoded whole: a problem that
    /// takes the GPU seconds may outlast what the system lets one command take, where a commit would
    /// spread it over several.
    ///
    /// # Errors
    /// What a commit would report, and `InvalidArgument` where this is no Metal device. Nothing is
    /// encoded then.
    ///
    /// # Safety
    /// `target` encodes every call, in order, into one encoder of this device. Until that encoder's
    /// command has completed or can no longer be committed, the result is kept; it may go at once
    /// where the command buffer retains what it uses, as they do unless made not to, and nothing
    /// here touches the buffers from the host before then.
    pub unsafe fn encode_into(&mut self, target: &mut dyn ComputeTarget) -> Result<InFlight> {
        let handle = self.device().clone();
        let metal = backend(&handle)?;
        let (encoded, holds) = self.submit_with(
            |_| Err(params_are_written("encode_into")),
            |steps| {
                let temporaries = encode_into(metal.device(), &dispatches(&steps)?, target)?;
                Ok((steps, temporaries))
            },
        );
        let (steps, temporaries) = encoded?;
        Ok(InFlight {
            steps,
            _temporaries: temporaries,
            _holds: holds,
        })
    }
}
