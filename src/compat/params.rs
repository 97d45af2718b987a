//! Where a kernel of this crate finds its params.

use crate::backend::Kernel;
use crate::backend::metal::bindings::{constant, names, other, prefill};
use crate::backend::metal::params::{AttnExtraParamsGpu, AttnMaskParamsGpu, AttnParamsGpu};
use crate::backend::metal::table;
use crate::backend::shared_params::{
    BlkParamsGpu, BlockFillParamsGpu, MaskFillParamsGpu, VecParamsGpu,
};

/// Params at one index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Param {
    pub(super) index: usize,
    size: usize,
    /// Where the count of sequences stands, for boundaries: one more than the count of `size` bytes.
    pub(super) count_in: Option<usize>,
}

impl Param {
    const fn of<T>(index: usize) -> Self {
        Self {
            index,
            size: size_of::<T>(),
            count_in: None,
        }
    }

    const fn boundaries(index: usize) -> Self {
        Self {
            count_in: Some(prefill::PARAMS),
            ..Self::of::<u32>(index)
        }
    }

    /// How many bytes the kernel reads, as the params that hold the count say.
    pub(super) fn bytes(&self, counted: Option<&[u8]>) -> usize {
        let Some(params) = counted else {
            return self.size;
        };
        // The batch is the first field.
        let batch = params.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
        let count = usize::try_from(batch).unwrap_or(0).saturating_add(1);
        count.saturating_mul(self.size)
    }
}

/// The params of a kernel, those that count others first; none of a text that is not ours.
pub(super) fn params(kernel: &Kernel) -> impl Iterator<Item = Param> {
    const FILL: &[Param] = &[Param::of::<MaskFillParamsGpu>(other::FILL_PARAMS)];
    const BLOCKS: &[Param] = &[Param::of::<BlockFillParamsGpu>(other::BLOCKS_PARAMS)];
    const BLK: &[Param] = &[Param::of::<BlkParamsGpu>(other::BLK_PARAMS)];
    const VEC: &[Param] = &[Param::of::<VecParamsGpu>(other::VEC_PARAMS)];
    const REDUCE: &[Param] = &[Param::of::<VecParamsGpu>(other::REDUCE_PARAMS)];
    const PREFILL: &[Param] = &[
        Param::of::<AttnParamsGpu>(prefill::PARAMS),
        Param::of::<AttnMaskParamsGpu>(prefill::MASK_PARAMS),
        Param::of::<AttnExtraParamsGpu>(prefill::EXTRA_PARAMS),
        Param::boundaries(prefill::CU_SEQLENS_Q),
        Param::boundaries(prefill::CU_SEQLENS_K),
    ];
    let params = match kernel.name.as_str() {
        _ if kernel.foreign => &[],
        names::MASK_FILL | names::MASK_FILL_F16 => FILL,
        names::MASK_FILL_BLOCKS => BLOCKS,
        names::BLK | names::BLK_F16 => BLK,
        names::VEC_F32 | names::VEC_F16 => VEC,
        names::VEC_REDUCE => REDUCE,
        name if table::by_name(name).is_some() => PREFILL,
        _ => &[],
    };
    // Without packed sequences, what is bound as boundaries is not read.
    let packed = kernel.constants.bool(constant::IS_VARLEN);
    params
        .iter()
        .copied()
        .filter(move |param| packed || param.count_in.is_none())
}
