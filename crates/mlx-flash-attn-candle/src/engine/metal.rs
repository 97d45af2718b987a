//! candle's Metal device: its buffers, and its encoder with the hazards that it keeps count of.
//!
//! candle's buffers are not hazard-tracked by Metal: it finds what depends on what from
//! `set_input_buffer` and `set_output_buffer`, so everything goes through these.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{DType, MetalDevice, MetalStorage, Result, Storage};
use candle_metal_kernels::metal::{Buffer, ComputeCommandEncoder, ComputePipeline};
use mlx_flash_attn::metal::objc2::Message;
use mlx_flash_attn::metal::objc2::runtime::ProtocolObject;
use mlx_flash_attn::metal::objc2_metal::{MTLBuffer, MTLComputePipelineState, MTLSize};
use mlx_flash_attn::metal::{Access, ComputeTarget};
use mlx_flash_attn::{CommandEncoder, MlxBuffer, MlxDevice};

use super::{Engine, Wrapped};
use crate::request::{dtype_of, failed};

/// An Apple GPU as candle has opened it.
#[derive(Debug)]
pub(crate) struct Metal {
    ours: MlxDevice,
    candle: MetalDevice,
}

impl Metal {
    pub(crate) fn of_storage(storage: &MetalStorage) -> Result<Self> {
        static DEVICES: Mutex<BTreeMap<u64, MlxDevice>> = Mutex::new(BTreeMap::new());
        let candle = storage.device().clone();
        let raw = candle.metal_device();
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = match devices.get(&raw.registry_id()) {
            Some(device) => device.clone(),
            None => {
                let device = MlxDevice::from_metal_device(raw.as_ref().retain()).map_err(failed)?;
                devices.insert(raw.registry_id(), device.clone());
                device
            }
        };
        Ok(Self { ours, candle })
    }

    /// # Safety
    /// As for `wrap_mut`; where nothing writes the result, as for `wrap`.
    unsafe fn take(&self, storage: &MetalStorage) -> Result<MlxBuffer> {
        let dtype = dtype_of("an operand", storage.dtype())?;
        let buffer = storage.buffer();
        let len = buffer.length() / dtype.size_of();
        // SAFETY: promised by the caller; candle finds hazards from the bindings itself.
        unsafe {
            self.ours
                .metal_wrap_buffer(buffer.as_ref(), dtype, vec![len])
        }
        .map_err(failed)
    }
}

impl Engine for Metal {
    type Storage = MetalStorage;
    type Held<'a> = ();

    fn device(&self) -> &MlxDevice {
        &self.ours
    }

    fn of(storage: &Storage) -> Option<&MetalStorage> {
        match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(storage: MetalStorage) -> Storage {
        Storage::Metal(storage)
    }

    fn output(&self, dtype: DType, len: usize) -> Result<MetalStorage> {
        // Not zeroed: the kernel writes every element before anything reads one.
        let buffer = self
            .candle
            .new_buffer_builder()
            .with_size_for(len, dtype)
            .with_label("mlx-flash-attn")
            .build()?;
        Ok(MetalStorage::new(buffer, self.candle.clone(), len, dtype))
    }

    unsafe fn wrap<'a>(&'a self, storage: &'a MetalStorage, start: usize) -> Result<Wrapped<()>> {
        // SAFETY: promised by the caller; inputs are only read.
        let whole = unsafe { self.take(storage)? };
        let size = whole.dtype().size_of();
        let rest = (whole.byte_len() / size).saturating_sub(start);
        Ok((whole.slice_view((start * size) as u64, rest), ()))
    }

    unsafe fn wrap_mut<'a>(&'a self, storage: &'a mut MetalStorage) -> Result<Wrapped<()>> {
        // SAFETY: promised by the caller.
        Ok((unsafe { self.take(storage)? }, ()))
    }

    unsafe fn run(&self, mut encoder: CommandEncoder) -> Result<()> {
        let commands = self.candle.command_encoder()?;
        let mut target = Target(commands.as_ref());
        // SAFETY: every call goes to the one encoder that candle has open, under its lock. candle's
        // command buffers retain what they use, and nothing here touches the buffers from the host.
        let in_flight = unsafe { encoder.encode_into(&mut target) }.map_err(failed)?;
        drop(in_flight);
        Ok(())
    }
}

/// candle's encoder.
struct Target<'a>(&'a ComputeCommandEncoder);

impl ComputeTarget for Target<'_> {
    fn set_pipeline(&mut self, pipeline: &ProtocolObject<dyn MTLComputePipelineState>) {
        self.0
            .set_compute_pipeline_state(&ComputePipeline::new(pipeline.retain()));
    }

    fn set_buffer(
        &mut self,
        index: usize,
        buffer: &ProtocolObject<dyn MTLBuffer>,
        offset: usize,
        access: Access,
    ) {
        let buffer = Buffer::new(buffer.retain());
        if access.writes() {
            self.0.set_output_buffer(index, Some(&buffer), offset);
        } else {
            self.0.set_input_buffer(index, Some(&buffer), offset);
        }
    }

    fn set_bytes(&mut self, index: usize, bytes: &[u8]) {
        self.0
            .set_bytes_directly(index, bytes.len(), bytes.as_ptr().cast());
    }

    /// candle puts its own, from the bindings.
    fn barrier(&mut self) {}

    fn dispatch(&mut self, _kernel: &str, grid: MTLSize, threadgroup: MTLSize) {
        self.0.dispatch_thread_groups(grid, threadgroup);
    }
}
