//! The structs that kernels read, and their text in the kernels' languages: one definition gives
//! both, so that host and kernel cannot disagree.

use bytemuck::{Pod, Zeroable};

/// Declares a `repr(C)` struct and the text of its twin in MSL and CUDA.
macro_rules! gpu_struct {
    (
        $(#[$meta:meta])*
        $name:ident = $twin:literal, $text:ident, $bytes:literal {
            $( $(#[$fmeta:meta])* $field:ident : $ty:tt = $decl:literal @ $offset:literal ),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
        pub struct $name { $( $(#[$fmeta])* pub $field: $ty, )* }

        #[doc = concat!("`", $twin, "` as the kernels declare it.")]
        pub const $text: &str = concat!(
            "struct ", $twin, " {\n", $( "    ", $decl, ";\n", )* "};\n"
        );

        const _: () = {
            assert!(size_of::<$name>() == $bytes);
            $( assert!(std::mem::offset_of!($name, $field) == $offset); )*
        };
    };
}

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
    /// What the newer features need; bound where constants 307, 308 or 311 are set, or where the
    /// offset is bottom right.
    AttnExtraParamsGpu = "AttnExtraParams", ATTN_EXTRA_PARAMS_TEXT, 32 {
        /// Keys seen up to and including a query's position, or -1 for all.
        window: i32 = "int window" @ 0,
        /// Keys seen after a query's position, or -1 for all.
        window_right: i32 = "int window_right" @ 4,
        /// 1: each packed sequence's offset is its kL - qL; 0: `qL_off` holds.
        bottom_right: i32 = "int bottom_right" @ 8,
        /// Keeps the strides on 8 bytes.
        _pad: i32 = "int pad" @ 12,
        /// Batch and head strides of the log-sum-exp, in elements; rows are contiguous.
        lse_strides: [i64; 2] = "int64_t L_strides[2]" @ 16,
    }
}

gpu_struct! {
    /// Arguments of the mask fill.
    MaskFillParamsGpu = "MaskFillParams", MASK_FILL_PARAMS_TEXT, 20 {
        /// Rows.
        seq_len_q: u32 = "uint seq_len_q" @ 0,
        /// Columns.
        seq_len_k: u32 = "uint seq_len_k" @ 4,
        /// Keys of the window, or 0 for none.
        window: u32 = "uint window" @ 8,
        /// 1: keys after a row's position are masked.
        causal: u32 = "uint causal" @ 12,
        /// Position of row 0.
        q_abs_offset: u32 = "uint q_abs_offset" @ 16,
    }
}

gpu_struct! {
    /// Arguments of the tile classes; the tile itself is in constants 400 and 401.
    BlkParamsGpu = "BlkParams", BLK_PARAMS_TEXT, 24 {
        /// Rows of the mask.
        seq_len_q: u32 = "uint seq_len_q" @ 0,
        /// Columns of the mask.
        seq_len_k: u32 = "uint seq_len_k" @ 4,
        /// Tiles down.
        nq: u32 = "uint nq" @ 8,
        /// Tiles across.
        nk: u32 = "uint nk" @ 12,
        /// Elements from one mask row to the next.
        row_stride: i64 = "int64_t row_stride" @ 16,
    }
}

gpu_struct! {
    /// Arguments of the decode kernels.
    VecParamsGpu = "VecParams", VEC_PARAMS_TEXT, 40 {
        /// Query heads.
        num_heads: u32 = "uint num_heads" @ 0,
        /// Key/value heads.
        num_kv_heads: u32 = "uint num_kv_heads" @ 4,
        /// Head dimension.
        head_dim: u32 = "uint head_dim" @ 8,
        /// Valid keys; the query stands at the last.
        kv_seq_len: u32 = "uint kv_seq_len" @ 12,
        /// Rows that K and V have room for.
        kv_capacity: u32 = "uint kv_capacity" @ 16,
        /// First visible key.
        kv_start: u32 = "uint kv_start" @ 20,
        /// Score scale, not premultiplied by log2(e).
        scale: f32 = "float scale" @ 24,
        /// Softcap, or 0 for none.
        softcap: f32 = "float softcap" @ 28,
        /// Partial results of each head.
        splits: u32 = "uint splits" @ 32,
        /// Keeps the size on 8 bytes.
        _pad: u32 = "uint pad" @ 36,
    }
}

gpu_struct! {
    /// Everything that the CUDA attention kernels read besides memory. Pointers are addresses on the
    /// device; null where the problem has no such operand. Strides are in elements: batch, head, row.
    /// The Hopper kernels read the fields up to `classes_stride`.
    CudaParams = "Params", CUDA_PARAMS_TEXT, 336 {
        /// Batch size, or count of packed sequences.
        batch: i32 = "int batch" @ 0,
        /// Query heads.
        heads: i32 = "int heads" @ 4,
        /// Query heads for each key/value head.
        kv_group: i32 = "int kv_group" @ 8,
        /// Query length; the longest of packed sequences.
        sq: i32 = "int sq" @ 12,
        /// Key length; the longest of packed sequences.
        sk: i32 = "int sk" @ 16,
        /// Position of query row 0 among the keys.
        q_off: i32 = "int q_off" @ 20,
        /// Keys seen before a query's own position, or -1 for all; the Hopper kernels take a bound past
        /// all keys instead.
        left: i32 = "int left" @ 24,
        /// Keys seen after a query's own position, or -1 for all; 0 is causal.
        right: i32 = "int right" @ 28,
        /// Query tiles of a sequence and a head, or the heads that share them.
        tiles_m: i32 = "int tiles_m" @ 32,
        /// All query tiles.
        tiles: i32 = "int tiles" @ 36,
        /// Heads whose keys and values share the cache: their tiles are neighbours in the grid.
        section: i32 = "int section" @ 40,
        /// 1: each packed sequence's offset is its key length less its query length.
        bottom_right: i32 = "int bottom_right" @ 44,
        /// Score scale.
        scale: f32 = "float scale" @ 48,
        /// Score scale times log2(e).
        scale_log2: f32 = "float scale_log2" @ 52,
        /// Softcap, or 0 for none.
        softcap: f32 = "float softcap" @ 56,
        /// 1 / scale.
        inv_scale: f32 = "float inv_scale" @ 60,
        /// Sink logits.
        sinks: u64 = "const float* sinks" @ 64,
        /// ALiBi slopes.
        slopes: u64 = "const float* slopes" @ 72,
        /// The log-sum-exp, written.
        lse: u64 = "float* lse" @ 80,
        /// The mask; its columns are contiguous.
        mask: u64 = "const void* mask" @ 88,
        /// Tile classes.
        classes: u64 = "const u8* classes" @ 96,
        /// Cumulative query lengths of packed sequences.
        cu_q: u64 = "const u32* cu_q" @ 104,
        /// Cumulative key lengths of packed sequences.
        cu_k: u64 = "const u32* cu_k" @ 112,
        /// O, written.
        o: u64 = "void* o" @ 120,
        /// Strides of O.
        o_strides: [i64; 3] = "int64_t o_strides[3]" @ 128,
        /// Batch and head strides of the log-sum-exp; rows are contiguous.
        lse_strides: [i64; 2] = "int64_t lse_strides[2]" @ 152,
        /// Strides of the mask; 0 broadcasts.
        mask_strides: [i64; 3] = "int64_t mask_strides[3]" @ 168,
        /// Classes of one row of class tiles.
        classes_stride: i64 = "int64_t classes_stride" @ 192,
        /// Q.
        q: u64 = "const void* q" @ 200,
        /// K.
        k: u64 = "const void* k" @ 208,
        /// V.
        v: u64 = "const void* v" @ 216,
        /// Strides of Q.
        q_strides: [i64; 3] = "int64_t q_strides[3]" @ 224,
        /// Strides of K.
        k_strides: [i64; 3] = "int64_t k_strides[3]" @ 248,
        /// Strides of V.
        v_strides: [i64; 3] = "int64_t v_strides[3]" @ 272,
        /// Partial results, written and joined where the keys are split: for each row and split D
        /// values, a maximum, a sum.
        partials: u64 = "float* partials" @ 296,
        /// Query rows of a head: the query length, or all packed rows.
        rows: i64 = "int64_t rows" @ 304,
        /// Splits of the keys.
        splits: i32 = "int splits" @ 312,
        /// Element type of the mask: 1 f32, 2 f16, 3 bf16, 4 bool.
        mask_type: i32 = "int mask_type" @ 316,
        /// Bit 0: rows of Q, K and V lie on 16 bytes; bit 1: rows of O on 4.
        vector: i32 = "int vector" @ 320,
        /// Batches that results are laid out in: 1 where sequences are packed.
        result_batch: i32 = "int result_batch" @ 324,
        /// Query heads of one key/value head that share a tile's rows, or 1.
        pack: i32 = "int pack" @ 328,
        /// Keeps the size on 8 bytes.
        _pad: i32 = "int pad" @ 332,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and sizes of the fields of a struct's text.
    fn fields(text: &str) -> Vec<(String, usize)> {
        let body = text.split_once("struct Params {").unwrap().1;
        let body = body.split_once("\n}").unwrap().0;
        let lines = body.lines().map(|line| line.split("//").next().unwrap());
        let mut all = Vec::new();
        for declaration in lines.collect::<String>().split(';') {
            let Some((of, names)) = declaration
                .trim()
                .rsplit_once("* ")
                .map(|(_, names)| (8, names))
                .or_else(|| {
                    let (kind, names) = declaration.trim().split_once(' ')?;
                    let size = if ["int", "float"].contains(&kind) {
                        4
                    } else {
                        8
                    };
                    Some((size, names))
                })
            else {
                continue;
            };
            for name in names.split(',').map(str::trim) {
                let (name, count) = name.split_once('[').unwrap_or((name, "1]"));
                let count: usize = count.trim_end_matches(']').parse().unwrap();
                all.push((name.to_string(), of * count));
            }
        }
        all
    }

    #[test]
    fn hopper_kernels_read_the_first_fields() {
        let ours = fields(CUDA_PARAMS_TEXT);
        let theirs = fields(include_str!("../../kernels/cuda/hopper_tiles.cu"));
        assert_eq!(ours.iter().map(|(_, size)| size).sum::<usize>(), 336);
        assert!(theirs.len() > 25);
        assert_eq!(ours[..theirs.len()], theirs);
    }

    #[test]
    fn text_has_every_field_in_order() {
        assert!(ATTN_PARAMS_TEXT.starts_with("struct AttnParams {\n    int B;\n    int H;\n"));
        assert_eq!(ATTN_PARAMS_TEXT.matches(';').count(), 21);
        assert_eq!(ATTN_PARAMS_TEXT.matches("int64_t").count(), 4);
    }
}
