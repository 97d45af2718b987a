//! Calls of the dispatchers, which have nine to twelve arguments each, written once for each signature.

use mlx_flash_attn as mlx_native;
use mlx_native::ops::flash_attn_prefill::{FlashAttnPrefillLayout, FlashAttnPrefillParams};
use mlx_native::{DType, KernelRegistry, MlxBuffer, MlxDevice, Result};

use crate::common::{self, Qkv};
use crate::registry;

pub(crate) type Encoder = mlx_native::CommandEncoder;

/// A dispatcher of Q, K, V and these other arguments, the last of them after the params.
macro_rules! dispatcher {
    ($($arg:ty),* $(; $last:ty)?) => {
        fn(
            &mut Encoder,
            &MlxDevice,
            &mut KernelRegistry,
            &MlxBuffer,
            &MlxBuffer,
            &MlxBuffer,
            $($arg,)*
            &MlxBuffer,
            &FlashAttnPrefillParams,
            $($last,)?
        ) -> Result<()>
    };
}

/// A prefill dispatcher, by what its signature has besides Q, K, V, output and params.
#[derive(Clone, Copy)]
pub(crate) enum Dispatcher {
    Mask(dispatcher!(Option<&MlxBuffer>)),
    MaskLayout(dispatcher!(Option<&MlxBuffer>; FlashAttnPrefillLayout)),
    MaskNsg(dispatcher!(Option<&MlxBuffer>; u32), u32),
    MaskBlk(dispatcher!(Option<&MlxBuffer>, Option<&MlxBuffer>)),
    MaskBlkNsg(
        dispatcher!(Option<&MlxBuffer>, Option<&MlxBuffer>; u32),
        u32,
    ),
    MaskSinks(dispatcher!(Option<&MlxBuffer>, &MlxBuffer)),
    MaskOfAllSinks(dispatcher!(&MlxBuffer, &MlxBuffer)),
    MaskBlkSinks(dispatcher!(&MlxBuffer, &MlxBuffer, &MlxBuffer)),
}

impl Dispatcher {
    pub(crate) fn takes_blk(&self) -> bool {
        matches!(
            self,
            Self::MaskBlk(_) | Self::MaskBlkNsg(..) | Self::MaskBlkSinks(_)
        )
    }
}

/// The other arguments. What a dispatcher has no argument for is left out of the call.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) q: &'a MlxBuffer,
    pub(crate) k: &'a MlxBuffer,
    pub(crate) v: &'a MlxBuffer,
    pub(crate) out: &'a MlxBuffer,
    pub(crate) mask: Option<&'a MlxBuffer>,
    pub(crate) blk: Option<&'a MlxBuffer>,
    pub(crate) sinks: Option<&'a MlxBuffer>,
    pub(crate) layout: FlashAttnPrefillLayout,
    pub(crate) params: &'a FlashAttnPrefillParams,
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        [q, k, v, out]: [&'a MlxBuffer; 4],
        params: &'a FlashAttnPrefillParams,
    ) -> Self {
        Self {
            q,
            k,
            v,
            out,
            mask: None,
            blk: None,
            sinks: None,
            layout: FlashAttnPrefillLayout::HeadMajor,
            params,
        }
    }
}

/// What a program holds to encode with.
pub(crate) struct Program<'a> {
    pub(crate) device: &'a MlxDevice,
    pub(crate) registry: KernelRegistry,
    pub(crate) encoder: Encoder,
}

impl<'a> Program<'a> {
    pub(crate) fn new(device: &'a MlxDevice) -> Self {
        Self {
            device,
            registry: registry(),
            encoder: device.command_encoder().unwrap(),
        }
    }

    /// Encodes one prefill.
    pub(crate) fn prefill(&mut self, dispatcher: Dispatcher, call: &Call<'_>) -> Result<()> {
        let (e, d, r) = (&mut self.encoder, self.device, &mut self.registry);
        let c = *call;
        let (q, k, v, out, params) = (c.q, c.k, c.v, c.out, c.params);
        let (mask, blk, sinks) = (c.mask, c.blk, c.sinks);
        match dispatcher {
            Dispatcher::Mask(f) => f(e, d, r, q, k, v, mask, out, params),
            Dispatcher::MaskLayout(f) => f(e, d, r, q, k, v, mask, out, params, c.layout),
            Dispatcher::MaskNsg(f, nsg) => f(e, d, r, q, k, v, mask, out, params, nsg),
            Dispatcher::MaskBlk(f) => f(e, d, r, q, k, v, mask, blk, out, params),
            Dispatcher::MaskBlkNsg(f, nsg) => f(e, d, r, q, k, v, mask, blk, out, params, nsg),
            Dispatcher::MaskSinks(f) => f(e, d, r, q, k, v, mask, sinks.unwrap(), out, params),
            Dispatcher::MaskOfAllSinks(f) => {
                f(e, d, r, q, k, v, mask.unwrap(), sinks.unwrap(), out, params)
            }
            Dispatcher::MaskBlkSinks(f) => {
                let (mask, blk, sinks) = (mask.unwrap(), blk.unwrap(), sinks.unwrap());
                f(e, d, r, q, k, v, mask, blk, sinks, out, params)
            }
        }
    }
}

/// The params of a call over these operands.
pub(crate) fn params(data: &Qkv, causal: bool) -> FlashAttnPrefillParams {
    let s = data.shape;
    FlashAttnPrefillParams {
        n_heads: s.heads as u32,
        n_kv_heads: s.kv_heads as u32,
        head_dim: s.qk_dim as u32,
        seq_len_q: s.query_len as u32,
        seq_len_k: s.key_len as u32,
        batch: s.batch as u32,
        scale: 1.0 / (s.qk_dim as f32).sqrt(),
        do_causal: causal,
    }
}

/// Where a mask has planes of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mask {
    None,
    /// `[qL, kL]`.
    Plane,
    /// `[B, qL, kL]`.
    PerBatch,
    /// `[B, H, qL, kL]`.
    PerHead,
}

impl Mask {
    /// Whether the mask of an operand shows a cell; heads are counted over all batches.
    pub(crate) fn shows(self, heads: usize, head: usize, i: usize, j: usize) -> bool {
        let plane = match self {
            Self::None => return true,
            Self::Plane => 0,
            Self::PerBatch => head / heads,
            Self::PerHead => head,
        };
        (plane + 2 * i + 3 * j) % 5 < 3
    }

    /// The mask in `dtype`, or of booleans for `U8`.
    pub(crate) fn upload(self, device: &MlxDevice, data: &Qkv, dtype: DType) -> Option<MlxBuffer> {
        let s = data.shape;
        let (planes, rank) = match self {
            Self::None => return None,
            Self::Plane => (1, vec![s.query_len, s.key_len]),
            Self::PerBatch => (s.batch, vec![s.batch, s.query_len, s.key_len]),
            Self::PerHead => (
                s.batch * s.heads,
                vec![s.batch, s.heads, s.query_len, s.key_len],
            ),
        };
        let (ql, kl) = (s.query_len, s.key_len);
        let heads_a_plane = s.batch * s.heads / planes;
        let cell = |c: usize| {
            let head = c / (ql * kl) * heads_a_plane;
            match (dtype, self.shows(s.heads, head, c / kl % ql, c % kl)) {
                (DType::U8, shown) => f32::from(u8::from(shown)),
                (_, true) => 0.0,
                (_, false) => f32::NEG_INFINITY,
            }
        };
        let cells: Vec<f32> = (0..planes * ql * kl).map(cell).collect();
        Some(common::upload(device, &cells, dtype, &rank))
    }
}

/// `[B, H, L, D]` as `[B, L, H, D]`, or as it is.
pub(crate) fn swapped(swap: bool, x: &[f32], [heads, len, dim]: [usize; 3]) -> Vec<f32> {
    if !swap {
        return x.to_vec();
    }
    x.chunks(heads * len * dim)
        .flat_map(|batch| {
            (0..len * heads)
                .flat_map(move |n| batch[(n % heads * len + n / heads) * dim..][..dim].to_vec())
        })
        .collect()
}
