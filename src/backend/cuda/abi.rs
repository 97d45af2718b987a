//! The struct that the CUDA attention kernels read.

use bytemuck::{Pod, Zeroable};

use crate::backend::gpu_struct::gpu_struct;

gpu_struct! {
    /// Everything that the CUDA attention kernels read besides memory. Pointers are addresses on the
    /// device; null where the problem has no such operand. Strides are in elements: batch, head, row.
    CudaParams = "Params", CUDA_PARAMS_TEXT, 376 {
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
        /// Partial results, written and merged where the keys are split: for each row and split D values; then for
        /// each a maximum and a sum. D values, a maximum and a sum where they are joined apart.
        partials: u64 = "float* partials" @ 296,
        /// Where the keys are split: how many threadblocks of each tile, and of each group of its splits, are done. All
        /// are 0 before and after.
        counters: u64 = "u32* counters" @ 304,
        /// Query rows of a head: the query length, or all packed rows.
        rows: i64 = "int64_t rows" @ 312,
        /// Splits of the keys.
        splits: i32 = "int splits" @ 320,
        /// Element type of the mask: 1 f32, 2 f16, 3 bf16, 4 bool.
        mask_type: i32 = "int mask_type" @ 324,
        /// Bit 0: rows of Q, K and V lie on 16 bytes; bit 1: rows of O on 4; bit 2: rows of the mask on 4.
        vector: i32 = "int vector" @ 328,
        /// Batches that results are laid out in: 1 where sequences are packed.
        result_batch: i32 = "int result_batch" @ 332,
        /// Query heads of one key/value head that share a tile's rows, or 1.
        pack: i32 = "int pack" @ 336,
        /// Where keys lie in pages: the page size is 1 << page_shift.
        page_shift: i32 = "int page_shift" @ 340,
        /// Pages of each sequence, a row of `per_sequence` entries.
        block_table: u64 = "const int* block_table" @ 344,
        /// Key lengths of the sequences; one that is not from 0 to the key length stands for that.
        key_lengths: u64 = "const u32* key_lengths" @ 352,
        /// Entries of a sequence in the block table.
        per_sequence: i64 = "int64_t per_sequence" @ 360,
        /// Pages of the pool. An entry that names none of them stands for page 0.
        pages: i32 = "int pages" @ 368,
        /// Keeps the size on 8 bytes.
        _pad: i32 = "int pad" @ 372,
    }
}
