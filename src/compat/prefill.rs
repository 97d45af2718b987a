//! What the named prefill dispatchers have in common: a call is checked, stated as a problem and encoded.

use super::flash_attn_prefill::{FlashAttnPrefillParams, FlashAttnPrefillResumeParams};
use super::registry::KernelRegistry;
use crate::attention::{Layout, MaskSpec, Problem, QueryOffset, Role, Shape, Strides};
use crate::backend::command::Hint;
use crate::backend::metal::plan;
use crate::backend::metal::table::{self, MaskKind, Variant};
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::ops::{self, Operands, check_buffer};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::CommandEncoder;

/// Q, K, V and the output.
pub(super) type Tensors<'a> = [&'a MlxBuffer; 4];

/// Orders of the axes of Q and O, and of K and V.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layouts {
    pub(super) queries: Layout,
    pub(super) keys: Layout,
}

/// What a dispatcher takes besides encoder, device and registry.
pub(super) struct PrefillCall<'a> {
    /// The dispatcher's kernel.
    kernel: &'static str,
    tensors: Tensors<'a>,
    params: FlashAttnPrefillParams,
    pub(super) mask: Option<&'a MlxBuffer>,
    pub(super) blk: Option<&'a MlxBuffer>,
    pub(super) sinks: Option<&'a MlxBuffer>,
    pub(super) layouts: Layouts,
    /// Simdgroups of a threadgroup.
    pub(super) nsg: Option<u32>,
    /// Position of query 0 among the keys.
    q_offset: u32,
    /// Rows that K and V have room for.
    kv_capacity: u32,
}

impl<'a> PrefillCall<'a> {
    /// A call over dense head-major tensors; optional operands start out absent.
    pub(super) fn new(
        kernel: &'static str,
        tensors: Tensors<'a>,
        params: &FlashAttnPrefillParams,
    ) -> Self {
        Self {
            kernel,
            tensors,
            params: *params,
            mask: None,
            blk: None,
            sinks: None,
            layouts: Layouts {
                queries: Layout::HeadMajor,
                keys: Layout::HeadMajor,
            },
            nsg: None,
            q_offset: 0,
            kv_capacity: params.seq_len_k,
        }
    }

    /// A call whose queries follow the keys of earlier ones.
    pub(super) fn resumed(
        kernel: &'static str,
        tensors: Tensors<'a>,
        params: &FlashAttnPrefillResumeParams,
    ) -> Result<Self> {
        let end = u64::from(params.q_offset_in_k) + u64::from(params.seq_len_q);
        if end > params.seq_len_k.into() {
            return Err(MlxError::expected(
                "q_offset_in_k",
                format!("queries that end by seq_len_k = {}", params.seq_len_k),
                format!("an end at {end}"),
            ));
        }
        if params.seq_len_k > params.kv_capacity {
            return Err(MlxError::expected(
                "kv_capacity",
                format!("at least seq_len_k = {}", params.seq_len_k),
                params.kv_capacity,
            ));
        }
        Ok(Self {
            q_offset: params.q_offset_in_k,
            kv_capacity: params.kv_capacity,
            ..Self::new(kernel, tensors, &params.fresh())
        })
    }

    /// Checks and encodes the call.
    pub(super) fn encode(
        &self,
        encoder: &mut CommandEncoder,
        device: &MlxDevice,
        registry: &mut KernelRegistry,
    ) -> Result<()> {
        let variant = table::by_name(self.kernel)
            .ok_or_else(|| MlxError::KernelNotFound(self.kernel.into()))?;
        plan::simdgroups(variant, self.nsg)?;
        let problem = self.problem(variant)?;
        let [q, k, v, out] = self.tensors;
        let operands = Operands {
            mask: self.mask,
            tile_classes: self.blk,
            sinks: self.sinks,
            ..Operands::new(q, k, v, out)
        };
        let hint = Hint {
            kernel: Some(variant.kernel),
            simdgroups: self.nsg,
        };
        match ops::encode(encoder, &problem, &operands, hint)? {
            Some(planned) => registry.note(device.metal_device(), &planned),
            None => Ok(()),
        }
    }

    fn problem(&self, variant: &Variant) -> Result<Problem> {
        let p = &self.params;
        if p.head_dim as usize != variant.head_dim {
            return Err(MlxError::expected("head_dim", variant.head_dim, p.head_dim));
        }
        let shape = p.shape();
        let mut problem = Problem::builder(variant.dtype, shape)
            .scale(p.scale)
            .causal(p.do_causal)
            .query_offset(QueryOffset::At(self.q_offset.into()))
            .layout(self.layouts.keys)
            .key_capacity(self.kv_capacity as usize)
            .tile_classes(self.blk.is_some())
            .sinks(self.sinks.is_some())
            .refuse_empty();
        if self.layouts.queries != self.layouts.keys {
            let strides = self.query_strides(&shape)?;
            problem = problem
                .strides(Role::Query, strides)
                .strides(Role::Output, strides);
        }
        if let Some(mask) = self.mask {
            let dtype = match variant.mask {
                MaskKind::Additive => variant.dtype,
                MaskKind::Bool => DType::U8,
            };
            check_buffer("mask", mask, dtype, 0)?;
            problem = problem.mask(mask_spec(dtype, mask.shape(), &shape)?);
        }
        problem.build()
    }

    fn query_strides(&self, shape: &Shape) -> Result<Strides> {
        let layout = self.layouts.queries;
        let strides = layout.strides(shape.heads, shape.query_len, shape.qk_dim);
        strides
            .ok_or_else(|| MlxError::InvalidArgument(format!("Q: strides of {shape:?} overflow")))
    }
}

/// Where the planes of a dense mask lie: one for all batches and heads (`[qL, kL]`), one for each batch
/// (`[B, qL, kL]`), else one for each head of each batch.
fn mask_spec(dtype: DType, mask: &[usize], shape: &Shape) -> Result<MaskSpec> {
    let Shape {
        batch,
        heads,
        query_len,
        key_len,
        ..
    } = *shape;
    let single = MaskSpec::plane(dtype, key_len);
    let of_each_batch = mask == [batch, query_len, key_len];
    if mask.len() == 2 || batch == 1 && (heads == 1 || of_each_batch) {
        return Ok(single);
    }
    let plane = query_len.checked_mul(key_len);
    let planes = plane.and_then(|plane| plane.checked_mul(heads));
    match (plane, planes) {
        (Some(plane), _) if of_each_batch => Ok(MaskSpec {
            batch_stride: plane,
            ..single
        }),
        (Some(plane), Some(planes)) => Ok(MaskSpec {
            batch_stride: planes,
            head_stride: plane,
            ..single
        }),
        _ => Err(MlxError::InvalidArgument(format!(
            "mask: [B, H, qL, kL] of {shape:?} overflows"
        ))),
    }
}

/// Declares dispatchers, which differ in the kernel's name and in what else the signature has: tile
/// classes, a layout, simdgroups.
macro_rules! dispatchers {
    ($(
        $(#[$meta:meta])*
        $name:ident($kernel:literal $(, blk: $blk:ident)? $(, layout: $layout:ident)? $(, nsg: $nsg:ident)?);
    )*) => {$(
        $(#[$meta])*
        #[doc = ""]
        #[doc = concat!("Encodes `", $kernel, "`; see the [module](self) for operands.")]
        #[doc = ""]
        #[doc = "# Errors"]
        #[doc = "As the [module](self) has them. Nothing is encoded then."]
        #[allow(clippy::too_many_arguments)]
        pub fn $name(
            encoder: &mut $crate::CommandEncoder,
            device: &$crate::MlxDevice,
            registry: &mut $crate::KernelRegistry,
            q: &$crate::MlxBuffer,
            k: &$crate::MlxBuffer,
            v: &$crate::MlxBuffer,
            mask: Option<&$crate::MlxBuffer>,
            $($blk: Option<&$crate::MlxBuffer>,)?
            out: &$crate::MlxBuffer,
            params: &$crate::compat::flash_attn_prefill::FlashAttnPrefillParams,
            $($layout: $crate::compat::flash_attn_prefill::FlashAttnPrefillLayout,)?
            $($nsg: u32,)?
        ) -> $crate::error::Result<()> {
            let mut call =
                $crate::compat::prefill::PrefillCall::new($kernel, [q, k, v, out], params);
            call.mask = mask;
            $(call.blk = $blk;)?
            $(
                let layout: $crate::attention::Layout = $layout.into();
                call.layouts = $crate::compat::prefill::Layouts { queries: layout, keys: layout };
            )?
            $(call.nsg = Some($nsg);)?
            call.encode(encoder, device, registry)
        }
    )*};
}
pub(super) use dispatchers;

/// Declares dispatchers of queries at an offset among the keys of a cache.
macro_rules! resumed {
    ($( $(#[$meta:meta])* $name:ident($kernel:literal); )*) => {$(
        $(#[$meta])*
        #[doc = ""]
        #[doc = concat!("Encodes `", $kernel, "`; see the [module](self) for operands.")]
        #[doc = ""]
        #[doc = "# Errors"]
        #[doc = "As the [module](self) has them. Nothing is encoded then."]
        #[allow(clippy::too_many_arguments)]
        pub fn $name(
            encoder: &mut $crate::CommandEncoder,
            device: &$crate::MlxDevice,
            registry: &mut $crate::KernelRegistry,
            q: &$crate::MlxBuffer,
            k: &$crate::MlxBuffer,
            v: &$crate::MlxBuffer,
            out: &$crate::MlxBuffer,
            params: &$crate::compat::flash_attn_prefill::FlashAttnPrefillResumeParams,
        ) -> $crate::error::Result<()> {
            $crate::compat::prefill::PrefillCall::resumed($kernel, [q, k, v, out], params)?
                .encode(encoder, device, registry)
        }
    )*};
}
pub(super) use resumed;

/// Declares dispatchers with a sink logit for each head. Where tile classes are taken, the mask is mandatory.
macro_rules! with_sinks {
    ($(
        $(#[$meta:meta])*
        $name:ident($kernel:literal, mask: $mask:ty $(, blk: $blk:ident)? $(, queries: $queries:expr)?);
    )*) => {$(
        $(#[$meta])*
        #[doc = ""]
        #[doc = concat!("Encodes `", $kernel, "`; see the [module](self) for operands.")]
        #[doc = ""]
        #[doc = "# Errors"]
        #[doc = "As the [module](self) has them. Nothing is encoded then."]
        #[allow(clippy::too_many_arguments)]
        pub fn $name(
            encoder: &mut $crate::CommandEncoder,
            device: &$crate::MlxDevice,
            registry: &mut $crate::KernelRegistry,
            q: &$crate::MlxBuffer,
            k: &$crate::MlxBuffer,
            v: &$crate::MlxBuffer,
            mask: $mask,
            $($blk: &$crate::MlxBuffer,)?
            sinks: &$crate::MlxBuffer,
            out: &$crate::MlxBuffer,
            params: &$crate::compat::flash_attn_prefill::FlashAttnPrefillParams,
        ) -> $crate::error::Result<()> {
            let mut call =
                $crate::compat::prefill::PrefillCall::new($kernel, [q, k, v, out], params);
            call.mask = mask.into();
            call.sinks = Some(sinks);
            $(call.blk = Some($blk);)?
            $(call.layouts.queries = $queries;)?
            call.encode(encoder, device, registry)
        }
    )*};
}
pub(super) use with_sinks;
