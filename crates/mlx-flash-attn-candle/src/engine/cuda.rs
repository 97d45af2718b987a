//! candle's CUDA device: its memory, and its stream.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::{CudaStorage, DType, Result, Storage};
use half::{bf16, f16};
use mlx_flash_attn::cuda::InFlight;
use mlx_flash_attn::{CommandEncoder, MlxDevice};

use super::{Engine, Wrapped};
use crate::request::{dtype_of, failed, refused};

/// A GPU, with the stream that candle puts its work on.
#[derive(Debug)]
pub(crate) struct Cuda {
    ours: MlxDevice,
    candle: CudaDevice,
    stream: Arc<CudaStream>,
}

impl Cuda {
    pub(crate) fn of_storage(storage: &CudaStorage) -> Result<Self> {
        static DEVICES: Mutex<BTreeMap<usize, MlxDevice>> = Mutex::new(BTreeMap::new());
        let candle = storage.device().clone();
        let stream = candle.cuda_stream();
        let ordinal = stream.context().ordinal();
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = match devices.get(&ordinal) {
            Some(device) => device.clone(),
            None => {
                let device = MlxDevice::cuda(ordinal).map_err(failed)?;
                devices.insert(ordinal, device.clone());
                device
            }
        };
        Ok(Self {
            ours,
            candle,
            stream,
        })
    }

    fn read<'a, T: CudaDType + 'a>(
        &'a self,
        storage: &'a CudaStorage,
        start: usize,
    ) -> Result<(u64, usize, SyncOnDrop<'a>)> {
        let slice = storage.as_cuda_slice::<T>()?;
        let (base, held) = slice.device_ptr(&self.stream);
        let len = slice.len().saturating_sub(start);
        Ok((base + (start * size_of::<T>()) as u64, len, held))
    }

    fn write<'a, T: CudaDType + 'a>(
        &'a self,
        storage: &'a mut CudaStorage,
    ) -> Result<(u64, usize, SyncOnDrop<'a>)> {
        let slice = storage.as_cuda_slice_mut::<T>()?;
        let len = slice.len();
        let (base, held) = slice.device_ptr_mut(&self.stream);
        Ok((base, len, held))
    }

    fn allocate<T: CudaDType + DeviceRepr>(&self, len: usize) -> Result<CudaStorage> {
        // SAFETY: the kernel writes every element before anything reads one.
        let slice = unsafe { self.candle.alloc::<T>(len)? };
        Ok(CudaStorage::wrap_cuda_slice(slice, self.candle.clone()))
    }

    /// # Safety
    /// As for `wrap_mut`; where nothing writes the result, as for `wrap`.
    unsafe fn take<'a>(
        &self,
        (base, len, held): (u64, usize, SyncOnDrop<'a>),
        dtype: DType,
    ) -> Result<Wrapped<SyncOnDrop<'a>>> {
        let dtype = dtype_of("an operand", dtype)?;
        let bytes = len * dtype.size_of();
        // SAFETY: promised by the caller; `len` elements of this type are at `base`, and candle's
        // context is the GPU's primary one.
        let buffer = unsafe { self.ours.cuda_wrap(base, bytes, dtype, vec![len]) };
        Ok((buffer.map_err(failed)?, held))
    }
}

impl Engine for Cuda {
    type Storage = CudaStorage;
    type Held<'a> = SyncOnDrop<'a>;

    fn device(&self) -> &MlxDevice {
        &self.ours
    }

    fn of(storage: &Storage) -> Option<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }

    fn output(&self, dtype: DType, len: usize) -> Result<CudaStorage> {
        match dtype {
            DType::F32 => self.allocate::<f32>(len),
            DType::F16 => self.allocate::<f16>(len),
            DType::BF16 => self.allocate::<bf16>(len),
            other => Err(refused("out", "dtype bf16, f16 or f32", other)),
        }
    }

    unsafe fn wrap<'a>(
        &'a self,
        storage: &'a CudaStorage,
        start: usize,
    ) -> Result<Wrapped<SyncOnDrop<'a>>> {
        let dtype = storage.dtype();
        let part = match dtype {
            DType::F32 => self.read::<f32>(storage, start)?,
            DType::F16 => self.read::<f16>(storage, start)?,
            DType::BF16 => self.read::<bf16>(storage, start)?,
            DType::U8 => self.read::<u8>(storage, start)?,
            other => return Err(refused("an operand", "bf16, f16, f32 or u8", other)),
        };
        // SAFETY: promised by the caller; inputs are only read.
        unsafe { self.take(part, dtype) }
    }

    unsafe fn wrap_mut<'a>(
        &'a self,
        storage: &'a mut CudaStorage,
    ) -> Result<Wrapped<SyncOnDrop<'a>>> {
        let dtype = storage.dtype();
        let part = match dtype {
            DType::F32 => self.write::<f32>(storage)?,
            DType::F16 => self.write::<f16>(storage)?,
            DType::BF16 => self.write::<bf16>(storage)?,
            other => return Err(refused("out", "bf16, f16 or f32", other)),
        };
        // SAFETY: promised by the caller.
        unsafe { self.take(part, dtype) }
    }

    unsafe fn run(&self, mut encoder: CommandEncoder) -> Result<()> {
        let stream = self.stream.cu_stream().cast();
        // SAFETY: candle's stream is one of this GPU's primary context; `retire` holds it until the
        // command has run.
        let command = unsafe { encoder.encode_into_stream(stream) }.map_err(failed)?;
        retire((command, Arc::clone(&self.stream)));
        Ok(())
    }
}

/// A command with the stream it is on, dropped in this order.
type Kept = (InFlight, Arc<CudaStream>);

/// Waits for commands, one after another, and then lets go of what they used for themselves: dropping a
/// command waits, and the caller has more to launch. Tensors are not among it. candle frees memory in
/// the order of the stream of the thread that drops it, so it must be the caller's.
fn retire(command: Kept) {
    static SENDER: LazyLock<Sender<Kept>> = LazyLock::new(|| {
        let (sender, commands) = channel::<Kept>();
        // Without a thread the channel is closed, and `send` gives back what then waits here.
        let _ = std::thread::Builder::new()
            .name("mlx-flash-attn".into())
            .spawn(move || commands.into_iter().for_each(drop));
        sender
    });
    drop(SENDER.send(command));
}
