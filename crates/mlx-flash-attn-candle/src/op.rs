//! The operation that candle runs: one request on whatever device its tensors are.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Layout, MetalStorage, Result, Shape, StorageRef,
    Tensor,
};
use mlx_flash_attn::ops::{self, Operands};

use crate::engine::{Cpu, Engine, Wrapped};
use crate::request::{Request, failed, refused};

/// A request as an operation of candle's.
#[derive(Debug)]
struct Attention {
    request: Arc<Request>,
    /// The log-sum-exp that a run leaves besides the output.
    lse: Arc<Mutex<Option<Tensor>>>,
}

/// Runs a request; gives the output, and the log-sum-exp if it was asked for.
pub(crate) fn run(request: Request) -> Result<(Tensor, Option<Tensor>)> {
    let padding = request.padding;
    let (mut out, mut lse) = match request.is_empty() {
        true => unseen(&request)?,
        false => computed(request)?,
    };
    if padding > 0 {
        out = out.pad_with_zeros(0, 0, padding)?;
        if let Some(rows) = &mut lse {
            let hidden = (rows.dim(0)?, padding);
            let hidden = Tensor::full(f32::NEG_INFINITY, hidden, rows.device())?;
            *rows = Tensor::cat(&[&*rows, &hidden], 1)?;
        }
    }
    Ok((out, lse))
}

/// The result of a request of which no query sees a key.
fn unseen(request: &Request) -> Result<(Tensor, Option<Tensor>)> {
    let (device, dtype) = (request.q.device(), request.q.dtype());
    let out = Tensor::zeros(&request.shape, dtype, device)?;
    let lse = match request.problem.has_lse() {
        true => Some(Tensor::full(f32::NEG_INFINITY, &request.lse_shape, device)?),
        false => None,
    };
    Ok((out, lse))
}

fn computed(request: Request) -> Result<(Tensor, Option<Tensor>)> {
    let request = Arc::new(request);
    let lse = Arc::new(Mutex::new(None));
    let op = Attention {
        request: Arc::clone(&request),
        lse: Arc::clone(&lse),
    };
    // Not `apply_op3_no_bwd`: a backward pass then says that there is none, instead of losing
    // gradients.
    let out = request.q.apply_op3(&request.k, &request.v, op)?;
    let lse = lse.lock().unwrap_or_else(PoisonError::into_inner).take();
    Ok((out, lse))
}

/// One operand in candle's hands.
type Part<'a, S> = (&'a S, &'a Layout);

/// An operand besides Q, K and V, locked for reading.
type Locked<'a> = Option<(StorageRef<'a>, &'a Layout)>;

/// # Safety
/// As for `Engine::wrap`.
unsafe fn beside<'a, E: Engine>(
    engine: &'a E,
    operand: &'a Locked<'a>,
) -> Result<Option<Wrapped<E::Held<'a>>>> {
    let Some((storage, layout)) = operand else {
        return Ok(None);
    };
    let storage = E::of(storage).ok_or_else(|| refused("mask", "the device of q", "another"))?;
    // SAFETY: promised by the caller.
    unsafe { engine.wrap(storage, layout.start_offset()).map(Some) }
}

impl Attention {
    fn run_on<E: Engine>(
        &self,
        engine: &E,
        [q, k, v]: [Part<'_, E::Storage>; 3],
    ) -> Result<(E::Storage, Shape)> {
        let r = &*self.request;
        let problem = &r.problem;
        let mut out = engine.output(r.q.dtype(), r.shape.elem_count())?;
        let mut lse = match problem.has_lse() {
            true => Some(engine.output(DType::F32, r.lse_shape.elem_count())?),
            false => None,
        };
        let guards = [&r.mask, &r.sinks, &r.alibi_slopes]
            .map(|x| x.as_ref().map(Tensor::storage_and_layout));
        {
            // SAFETY: the storages are borrowed or locked until the command has been waited for or is
            // among candle's own; candle then writes and frees them in the order of its commands. The
            // two outputs are new and nobody else's.
            let inputs = unsafe {
                let [mask, sinks, slopes] = &guards;
                (
                    engine.wrap(q.0, q.1.start_offset())?,
                    engine.wrap(k.0, k.1.start_offset())?,
                    engine.wrap(v.0, v.1.start_offset())?,
                    [
                        beside(engine, mask)?,
                        beside(engine, sinks)?,
                        beside(engine, slopes)?,
                    ],
                )
            };
            // SAFETY: as above.
            let o = unsafe { engine.wrap_mut(&mut out)? };
            let l = match &mut lse {
                // SAFETY: as above.
                Some(lse) => Some(unsafe { engine.wrap_mut(lse)? }),
                None => None,
            };
            let (q, k, v, [mask, sinks, slopes]) = &inputs;
            let operands = Operands {
                mask: mask.as_ref().map(|(b, _)| b),
                sinks: sinks.as_ref().map(|(b, _)| b),
                alibi_slopes: slopes.as_ref().map(|(b, _)| b),
                lse: l.as_ref().map(|(b, _)| b),
                ..Operands::new(&q.0, &k.0, &v.0, &o.0)
            };
            let device = engine.device();
            let mut encoder = device.command_encoder().map_err(failed)?;
            ops::attention(&mut encoder, problem, &operands).map_err(failed)?;
            // SAFETY: as above.
            unsafe { engine.run(encoder)? };
        }
        let lse = lse.map(|lse| {
            let (storage, shape) = (E::into_storage(lse), r.lse_shape.clone());
            Tensor::from_storage(storage, shape, BackpropOp::none(), false)
        });
        *self.lse.lock().unwrap_or_else(PoisonError::into_inner) = lse;
        Ok((out, r.shape.clone()))
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "mlx-flash-attn"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run_on(Cpu::get()?, [(q, lq), (k, lk), (v, lv)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        lq: &Layout,
        k: &CudaStorage,
        lk: &Layout,
        v: &CudaStorage,
        lv: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let engine = crate::engine::Cuda::of_storage(q)?;
        self.run_on(&engine, [(q, lq), (k, lk), (v, lv)])
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(refused(
            "q",
            "a tensor on the CPU",
            "one on CUDA: enable the feature `cuda`",
        ))
    }

    #[cfg(all(feature = "metal", target_vendor = "apple"))]
    fn metal_fwd(
        &self,
        q: &MetalStorage,
        lq: &Layout,
        k: &MetalStorage,
        lk: &Layout,
        v: &MetalStorage,
        lv: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let engine = crate::engine::Metal::of_storage(q)?;
        self.run_on(&engine, [(q, lq), (k, lk), (v, lv)])
    }

    #[cfg(not(all(feature = "metal", target_vendor = "apple")))]
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Err(refused(
            "q",
            "a tensor on the CPU",
            "one on Metal: enable the feature `metal`",
        ))
    }
}
