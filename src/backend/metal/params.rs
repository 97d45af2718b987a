//! The structs that the Metal prefill kernels read.

use bytemuck::{Pod, Zeroable};

use crate::backend::gpu_struct::gpu_struct;

gpu_struct! {
    /// Sizes, scale and strides of a prefill. `softcapping` is the softcap where the kernel's
    /// constant 312 is set, else 1.0 and not read.
    AttnParamsGpu = "AttnParams", ATTN_PARAMS_TEXT, 160 {
        /// Batch size, or count of packed sequences.
        b: i32 = "int B" @ 0,
        /// Query heads.
        h: i32 = "int H" @ 4,
        /// Head dimension.
        d: i32 = "int D" @ 8,
        /// Query length; the longest of packed sequences.
        ql: i32 = "int qL" @ 12,
        /// Key length; the longest of packed sequences.
        kl: i32 = "int kL" @ 16,
        /// Query heads for each key/value head.
        gqa_factor: i32 = "int gqa_factor" @ 20,
        /// Score scale, not premultiplied by log2(e).
        scale: f32 = "float scale" @ 24,
        /// Softcap, or 1.0.
        softcapping: f32 = "float softcapping" @ 28,
        /// Query tiles, rounded up.
        nq: i32 = "int NQ" @ 32,
        /// Key tiles, rounded up.
        nk: i32 = "int NK" @ 36,
        /// Whole query tiles.
        nq_aligned: i32 = "int NQ_aligned" @ 40,
        /// Whole key tiles.
        nk_aligned: i32 = "int NK_aligned" @ 44,
        /// Rows of the last, partial query tile.
        ql_rem: i32 = "int qL_rem" @ 48,
        /// Keys of the last, partial key tile.
        kl_rem: i32 = "int kL_rem" @ 52,
        /// Position of query row 0 among the keys; not read where the extra params say bottom right.
        ql_off: i32 = "int qL_off" @ 56,
        /// Keeps the strides on 8 bytes.
        _pad: i32 = "int pad" @ 60,
        /// Batch, head and sequence strides of Q, in elements.
        q_strides: [i64; 3] = "int64_t Q_strides[3]" @ 64,
        /// Likewise of K.
        k_strides: [i64; 3] = "int64_t K_strides[3]" @ 88,
        /// Likewise of V.
        v_strides: [i64; 3] = "int64_t V_strides[3]" @ 112,
        /// Likewise of O.
        o_strides: [i64; 3] = "int64_t O_strides[3]" @ 136,
    }
}

gpu_struct! {
    /// Strides of the mask; bound with it.
    AttnMaskParamsGpu = "AttnMaskParams", ATTN_MASK_PARAMS_TEXT, 24 {
        /// Batch, head and query-row strides, in elements; 0 broadcasts.
        m_strides: [i64; 3] = "int64_t M_strides[3]" @ 0,
    }
}

gpu_struct! {
    /// What the newer features need; bound where constants 307, 308, 311, 314 or 315 are set.
    AttnExtraParamsGpu = "AttnExtraParams", ATTN_EXTRA_PARAMS_TEXT, 32 {
        /// Keys seen up to and including a query's position, or -1 for all.
        window: i32 = "int window" @ 0,
        /// Keys seen after a query's position, or -1 for all.
        window_right: i32 = "int window_right" @ 4,
        /// 1: the offset of each sequence that is packed or has a length of its own is its kL - qL; 0: `qL_off` holds.
        bottom_right: i32 = "int bottom_right" @ 8,
        /// Keeps the strides on 8 bytes.
        _pad: i32 = "int pad" @ 12,
        /// Batch and head strides of the log-sum-exp, in elements; rows are contiguous.
        lse_strides: [i64; 2] = "int64_t L_strides[2]" @ 16,
    }
}

gpu_struct! {
    /// The pages of K and V; bound where constant 313 is set.
    AttnPagesParamsGpu = "AttnPagesParams", ATTN_PAGES_PARAMS_TEXT, 16 {
        /// Pages of the pool.
        count: i32 = "int count" @ 0,
        /// Base-2 logarithm of the keys of a page.
        shift: i32 = "int shift" @ 4,
        /// Entries of a sequence in the block table.
        per_sequence: i64 = "int64_t per_sequence" @ 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_every_field_in_order() {
        assert!(ATTN_PARAMS_TEXT.starts_with("struct AttnParams {\n    int B;\n    int H;\n"));
        assert_eq!(ATTN_PARAMS_TEXT.matches(';').count(), 21);
        assert_eq!(ATTN_PARAMS_TEXT.matches("int64_t").count(), 4);
    }
}
