// The mask fills and the tile classes.

// One threadgroup a row: 0 where the key is visible, -infinity where it is not.
template <typename T>
[[kernel]] void fill(
    device T* mask [[buffer(0)]],
    constant MaskFillParams& p [[buffer(1)]],
    uint row [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort threads [[threads_per_threadgroup]]) {
    const long position = long(row) + long(p.q_abs_offset);
    device T* cells = mask + ulong(row) * ulong(p.seq_len_k);
    for (long key = thread_index; key < long(p.seq_len_k); key += threads) {
        cells[key] = T(score_if_seen(0.0f, score_bounds_show(position, key, p.causal != 0, long(p.window))));
    }
}

template [[host_name("flash_attn_prefill_mask_fill_bf16")]] [[kernel]] decltype(fill<bfloat>) fill<bfloat>;
template [[host_name("flash_attn_prefill_mask_fill_f16")]] [[kernel]] decltype(fill<half>) fill<half>;

// The same for tokens of several sequences: a row sees keys of its own sequence alone, by their positions
// in it.
[[kernel]] void flash_attn_prefill_mask_fill_blockdiag_bf16(
    device bfloat* mask [[buffer(0)]],
    constant BlockFillParams& p [[buffer(1)]],
    device const uint* ids [[buffer(2)]],
    device const uint* positions [[buffer(3)]],
    uint row [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort threads [[threads_per_threadgroup]]) {
    const uint id = ids[row];
    const long position = long(positions[row]);
    device bfloat* cells = mask + ulong(row) * ulong(p.len);
    for (long key = thread_index; key < long(p.len); key += threads) {
        const bool seen = ids[key] == id
            && score_bounds_show(position, long(positions[key]), p.causal != 0, long(p.window));
        cells[key] = bfloat(score_if_seen(0.0f, seen));
    }
}

// One simdgroup a class tile. The first rule that fits: reaching past the keys: mixed; all masked: skip; all
// zero: free; else mixed. Rows past the last do not count.
template <typename T>
[[kernel]] void classify(
    device const T* mask [[buffer(0)]],
    device uchar* classes [[buffer(1)]],
    constant BlkParams& p [[buffer(2)]],
    uint3 tile [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
    const long key0 = long(tile.x) * blk_bk, row0 = long(tile.y) * blk_bq;
    const long rows = min(long(blk_bq), long(p.seq_len_q) - row0);
    bool masked = true, zero = true;
    const bool whole = key0 + blk_bk <= long(p.seq_len_k);
    if (whole) {
        for (long cell = lane; cell < rows * blk_bk; cell += 32) {
            const long row = row0 + cell / blk_bk, key = key0 + cell % blk_bk;
            const float value = float(mask[row * p.row_stride + key]);
            masked &= value <= MASKED_AT_OR_BELOW;
            zero &= value == 0.0f;
        }
        masked = simd_all(masked);
        zero = simd_all(zero);
    }
    if (lane == 0) {
        const int kind = !whole ? CLASS_MIXED : masked ? CLASS_SKIP : zero ? CLASS_FREE : CLASS_MIXED;
        classes[ulong(tile.y) * ulong(p.nk) + ulong(tile.x)] = uchar(kind);
    }
}

template [[host_name("flash_attn_prefill_blk_bf16")]] [[kernel]] decltype(classify<bfloat>) classify<bfloat>;
template [[host_name("flash_attn_prefill_blk_f16")]] [[kernel]] decltype(classify<half>) classify<half>;
