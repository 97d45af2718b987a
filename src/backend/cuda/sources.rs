//! The texts of the CUDA kernels, embedded. A module's text is a list of parts: what all start with,
//! the parameters' structs, and the kernels. A list is known by its address.

use super::abi;
use crate::backend::score::SCORE_TEXT;
use crate::backend::shared_params;

const COMMON: &str = include_str!("../../../kernels/cuda/common.cu");
const SCORE_PRELUDE: &str = include_str!("../../../kernels/cuda/score_prelude.cu");
const ELEMENTS: &str = include_str!("../../../kernels/cuda/elements.cu");
const CAREFUL: &str = include_str!("../../../kernels/cuda/careful.cu");
const TILES: &str = include_str!("../../../kernels/cuda/tiles.cu");
const SCORES: &str = include_str!("../../../kernels/cuda/scores.cu");
const MERGE: &str = include_str!("../../../kernels/cuda/merge.cu");
const MMA: &str = include_str!("../../../kernels/cuda/mma.cu");
const SOFTMAX: &str = include_str!("../../../kernels/cuda/mma_softmax.cu");

/// What both Hopper kernels share, and the texts of one.
macro_rules! hopper {
    ($($kernel:literal),+) => {
        &[
            include_str!("../../../kernels/cuda/hopper_ptx.cu"),
            SCORE_PRELUDE,
            SCORE_TEXT,
            CAREFUL,
            abi::CUDA_PARAMS_TEXT,
            include_str!("../../../kernels/cuda/hopper_tiles.cu"),
            include_str!("../../../kernels/cuda/hopper_classes.cu"),
            include_str!("../../../kernels/cuda/hopper_scores.cu"),
            include_str!("../../../kernels/cuda/hopper_rows.cu"),
            include_str!("../../../kernels/cuda/hopper_softmax.cu"),
            $(include_str!($kernel),)+
        ]
    };
}

/// What the kernels over tiles for every GPU share, and the texts of one.
macro_rules! tiled {
    ($($part:expr),+) => {
        &[
            COMMON,
            SCORE_PRELUDE,
            SCORE_TEXT,
            ELEMENTS,
            CAREFUL,
            abi::CUDA_PARAMS_TEXT,
            TILES,
            SCORES,
            MERGE,
            $($part,)+
        ]
    };
}

/// Attention in 16 bits, for compute capability 8.0 and later.
pub(super) static PORTABLE: &[&str] = tiled!(
    MMA,
    SOFTMAX,
    include_str!("../../../kernels/cuda/portable.cu")
);

/// The same for few queries over many keys.
pub(super) static FEW: &[&str] = tiled!(MMA, SOFTMAX, include_str!("../../../kernels/cuda/few.cu"));

/// Attention in 16 bits for Hopper, with its own primitives.
pub(super) static HOPPER: &[&str] = hopper!(
    "../../../kernels/cuda/hopper_shared.cu",
    "../../../kernels/cuda/hopper_producer.cu",
    "../../../kernels/cuda/hopper_consumer.cu",
    "../../../kernels/cuda/hopper_output.cu",
    "../../../kernels/cuda/hopper.cu"
);

/// The same at head dim 512.
pub(super) static HOPPER_WIDE: &[&str] = hopper!("../../../kernels/cuda/hopper512.cu");

/// Attention in f32 on tensor cores.
pub(super) static TF32: &[&str] = tiled!(include_str!("../../../kernels/cuda/tf32.cu"));

/// The same without them.
pub(super) static FMA: &[&str] = tiled!(include_str!("../../../kernels/cuda/fma.cu"));

/// The join of partial results.
pub(super) static COMBINE: &[&str] = &[
    COMMON,
    SCORE_PRELUDE,
    SCORE_TEXT,
    ELEMENTS,
    CAREFUL,
    abi::CUDA_PARAMS_TEXT,
    SCORES,
    include_str!("../../../kernels/cuda/combine.cu"),
];

/// The mask fills and the tile classes.
pub(super) static MASKS: &[&str] = &[
    COMMON,
    SCORE_PRELUDE,
    SCORE_TEXT,
    ELEMENTS,
    shared_params::MASK_FILL_PARAMS_TEXT,
    shared_params::BLOCK_FILL_PARAMS_TEXT,
    shared_params::BLK_PARAMS_TEXT,
    include_str!("../../../kernels/cuda/masks.cu"),
];

/// Decode.
pub(super) static DECODE: &[&str] = &[
    COMMON,
    SCORE_PRELUDE,
    SCORE_TEXT,
    ELEMENTS,
    CAREFUL,
    shared_params::VEC_PARAMS_TEXT,
    include_str!("../../../kernels/cuda/decode.cu"),
];
