// The mask fill and the tile classes.

// A block a row: 0 where the key is visible, -infinity where it is not.
extern "C" __global__ void __launch_bounds__(256) fill(u16* mask, const MaskFillParams p) {
    const i64 row = blockIdx.x, position = row + p.q_abs_offset;
    u16* cells = mask + row * p.seq_len_k;
    for (i64 key = threadIdx.x; key < p.seq_len_k; key += 256) {
        const bool hidden = (p.causal != 0 && key > position) || (p.window != 0 && position - key >= p.window);
        cells[key] = hidden ? 0xff80 : 0;
    }
}

struct Flags {
    bool masked, zero;
    DEV_MEMBER void add(float cell) {
        masked = masked && cell <= -1.0e30f;
        zero = zero && cell == 0.0f;
    }
    DEV_MEMBER u8 code() const { return masked ? 0 : zero ? 2 : 1; }
};

// A warp a tile of any size. The first rule that fits: reaching past the keys: 1; all masked: 0; all
// zero: 2; else 1. Rows past the last do not count.
extern "C" __global__ void __launch_bounds__(32) classify(const u16* mask, u8* classes, const BlkParams p, int bq, int bk) {
    const i64 tile = blockIdx.x, kt = tile % p.nk, qt = tile / p.nk;
    const i64 key0 = kt * bk, row0 = qt * bq;
    const i64 rows = p.seq_len_q - row0 < bq ? p.seq_len_q - row0 : bq;
    const bool whole = key0 + bk <= p.seq_len_k;
    Flags flags = {true, true};
    if (whole) {
        for (i64 cell = threadIdx.x; cell < rows * bk; cell += 32)
            flags.add(bf16_to_f32(mask[(row0 + cell / bk) * p.row_stride + key0 + cell % bk]));
        flags.masked = __all_sync(ALL_LANES, flags.masked);
        flags.zero = __all_sync(ALL_LANES, flags.zero);
    }
    if (threadIdx.x == 0) classes[tile] = whole ? flags.code() : 1;
}

// The same where rows lie on 16 bytes and `bk` is 8, 16, 32 or 64: a warp has the rows of a row of
// tiles and 256 keys, 8 keys a lane.
extern "C" __global__ void __launch_bounds__(128) classify_wide(const u16* mask, u8* classes, const BlkParams p, int bq, int bk) {
    follow_kernel_before();
    const i64 across = (i64(p.seq_len_k) + 1023) / 1024;
    const i64 qt = blockIdx.x / across, key0 = (blockIdx.x % across) * 1024 + i64(threadIdx.x / 32) * 256;
    const int lane = threadIdx.x % 32;
    const i64 key = key0 + 8 * lane, row0 = qt * bq;
    const int rows = int(p.seq_len_q - row0 < bq ? p.seq_len_q - row0 : bq);
    const i64 kt = key / bk, tile_end = (kt + 1) * bk;
    const bool whole = tile_end <= p.seq_len_k;
    Flags flags = {true, true};
    if (whole) {
        const u16* cells = mask + row0 * p.row_stride + key;
#pragma unroll 16
        for (int row = 0; row < rows; row++) {
            const uint4 x = *(const uint4*)(cells + row * p.row_stride);
            const u32 pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                flags.add(__uint_as_float(pairs[i] << 16));
                flags.add(__uint_as_float(pairs[i] & 0xffff0000u));
            }
        }
    }
    const int lanes = bk / 8;
    for (int other = 1; other < lanes; other *= 2) {
        const bool masked = __shfl_xor_sync(ALL_LANES, int(flags.masked), other);
        const bool zero = __shfl_xor_sync(ALL_LANES, int(flags.zero), other);
        flags.masked = flags.masked && masked;
        flags.zero = flags.zero && zero;
    }
    if (lane % lanes == 0 && kt < p.nk) classes[qt * p.nk + kt] = whole ? flags.code() : 1;
}
