//! The CUDA device of `mlx-flash-attn` behind a C interface: `scripts/gpu-bench` loads it beside torch, so
//! that the library that ships and its peers run in turns on the same tensors.
//!
//! A function that fails gives null or -1, and [`mfa_error`] the reason on the same thread.

mod request;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};

use mlx_flash_attn::attention::{HEAD_DIMS, Problem, Role, class_tile};
use mlx_flash_attn::cuda::InFlight;
use mlx_flash_attn::ops::flash_attn_prefill_blk::{BlkParams, dispatch_flash_attn_prefill_blk};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{CudaOptions, KernelRegistry, MlxBuffer, MlxDevice, MlxError};
use request::Request;

thread_local! {
    static ERROR: RefCell<CString> = RefCell::default();
}

fn keep<T>(result: Result<T, MlxError>) -> Option<T> {
    result
        .map_err(|error| {
            let text = error.to_string().replace('\0', " ");
            ERROR.with_borrow_mut(|kept| *kept = CString::new(text).unwrap_or_default());
        })
        .ok()
}

/// One attention over the caller's memory, launched any number of times.
pub struct Call {
    device: MlxDevice,
    registry: KernelRegistry,
    problem: Problem,
    buffers: Vec<(Role, MlxBuffer)>,
    classify: bool,
    /// Launches that nobody has waited for.
    under_way: Vec<InFlight>,
}

impl Call {
    fn buffer(&self, role: Role) -> Option<&MlxBuffer> {
        let found = self.buffers.iter().find(|(of, _)| *of == role);
        found.map(|(_, buffer)| buffer)
    }

    /// # Safety
    /// The request's addresses are of memory that holds its operands while the call lives.
    unsafe fn new(device: &MlxDevice, request: &Request) -> Result<Self, MlxError> {
        let problem = request.problem()?;
        let mut buffers = Vec::new();
        for role in Role::ALL {
            let Some(spec) = problem.operand(role) else {
                continue;
            };
            let bytes = spec.elements * spec.dtype.size_of();
            let (address, shape) = (request.address(role), vec![spec.elements]);
            // SAFETY: promised by the caller.
            let buffer = unsafe { device.cuda_wrap(address, bytes, spec.dtype, shape)? };
            buffers.push((role, buffer));
        }
        Ok(Self {
            device: device.clone(),
            registry: KernelRegistry::new(),
            problem,
            buffers,
            classify: request.classify != 0,
            under_way: Vec::new(),
        })
    }

    /// # Safety
    /// `stream` is one of the GPU's primary context and lives until the launch has been waited for.
    unsafe fn launch(&mut self, stream: *mut c_void) -> Result<(), MlxError> {
        let missing = || MlxError::InvalidArgument("an operand has no memory".into());
        let mut encoder = self.device.command_encoder()?;
        if self.classify {
            let shape = self.problem.shape();
            let tile = class_tile(shape.qk_dim);
            let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let params = BlkParams {
                seq_len_q: narrow(shape.query_len),
                seq_len_k: narrow(shape.key_len),
                bq: narrow(tile.bq),
                bk: narrow(tile.bk),
            };
            let mask = self.buffer(Role::Mask).ok_or_else(missing)?.clone();
            let classes = self.buffer(Role::TileClasses).ok_or_else(missing)?.clone();
            dispatch_flash_attn_prefill_blk(
                &mut encoder,
                &self.device,
                &mut self.registry,
                &mask,
                &classes,
                &params,
            )?;
        }
        let given = |role| self.buffer(role).ok_or_else(missing);
        let operands = Operands {
            mask: self.buffer(Role::Mask),
            tile_classes: self.buffer(Role::TileClasses),
            sinks: self.buffer(Role::Sinks),
            alibi_slopes: self.buffer(Role::AlibiSlopes),
            lse: self.buffer(Role::Lse),
            ..Operands::new(
                given(Role::Query)?,
                given(Role::Key)?,
                given(Role::Value)?,
                given(Role::Output)?,
            )
        };
        ops::attention(&mut encoder, &self.problem, &operands)?;
        // SAFETY: promised by the caller.
        let launched = unsafe { encoder.encode_into_stream(stream)? };
        self.under_way.push(launched);
        Ok(())
    }
}

/// Why the last function on this thread failed; valid until the next one fails.
#[unsafe(no_mangle)]
pub extern "C" fn mfa_error() -> *const c_char {
    ERROR.with_borrow(|kept| kept.as_ptr())
}

/// The fields of a request, a line each: name and Rust type, in the order and with the layout of C.
#[unsafe(no_mangle)]
pub extern "C" fn mfa_request_fields() -> *const c_char {
    request::FIELDS.as_ptr().cast()
}

/// Writes the head dims that are served to `dims`, at most `room`; gives how many there are.
///
/// # Safety
/// `dims` has room for as many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_head_dims(dims: *mut i64, room: usize) -> usize {
    for (i, dim) in HEAD_DIMS.into_iter().take(room).enumerate() {
        // SAFETY: `i` is below `room`, for which the caller promises memory.
        unsafe { dims.add(i).write(dim as i64) };
    }
    HEAD_DIMS.len()
}

/// Query rows and keys of a class tile at a head dim.
///
/// # Safety
/// `rows` and `keys` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_class_tile(head_dim: usize, rows: *mut i64, keys: *mut i64) {
    let tile = class_tile(head_dim);
    // SAFETY: promised by the caller.
    unsafe {
        rows.write(tile.bq as i64);
        keys.write(tile.bk as i64);
    }
}

/// Opens the GPU of this number with the kernels that a C string names, as `CudaKernels` parses it.
///
/// # Safety
/// `kernels` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_device_open(ordinal: usize, kernels: *const c_char) -> *mut MlxDevice {
    // SAFETY: promised by the caller.
    let kernels = unsafe { CStr::from_ptr(kernels) }.to_string_lossy().parse();
    let device = kernels.and_then(|kernels| MlxDevice::cuda_with(CudaOptions { ordinal, kernels }));
    keep(device).map_or(std::ptr::null_mut(), |device| {
        Box::into_raw(Box::new(device))
    })
}

/// Prepares a call over the caller's memory; its kernel is compiled by the first launch.
///
/// # Safety
/// `device` is from [`mfa_device_open`]. Each operand of the request has memory of that GPU at its address
/// until the call is freed, and nothing but the streams of launches orders other uses of it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_call_new(
    device: *const MlxDevice,
    request: *const Request,
) -> *mut Call {
    // SAFETY: promised by the caller.
    let call = unsafe { Call::new(&*device, &*request) };
    keep(call).map_or(std::ptr::null_mut(), |call| Box::into_raw(Box::new(call)))
}

/// Puts a call on `stream`; 0 where that was done. It does not wait.
///
/// # Safety
/// `call` is from [`mfa_call_new`], and no other thread uses it. `stream` is one of the GPU's primary
/// context, and lives until [`mfa_call_wait`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_call_launch(call: *mut Call, stream: *mut c_void) -> i32 {
    // SAFETY: promised by the caller.
    let launched = unsafe { (*call).launch(stream) };
    keep(launched).map_or(-1, |()| 0)
}

/// Waits for all launches of a call; 0 where they succeeded.
///
/// # Safety
/// As for [`mfa_call_launch`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_call_wait(call: *mut Call) -> i32 {
    // SAFETY: promised by the caller.
    let under_way = unsafe { std::mem::take(&mut (*call).under_way) };
    let waited = under_way.iter().try_for_each(InFlight::wait);
    keep(waited).map_or(-1, |()| 0)
}

/// Waits for a call's launches and frees it.
///
/// # Safety
/// `call` is from [`mfa_call_new`] and is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_call_free(call: *mut Call) {
    // SAFETY: promised by the caller.
    drop(unsafe { Box::from_raw(call) });
}

/// Frees a device, which no call uses any more.
///
/// # Safety
/// `device` is from [`mfa_device_open`] and is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mfa_device_close(device: *mut MlxDevice) {
    // SAFETY: promised by the caller.
    drop(unsafe { Box::from_raw(device) });
}
