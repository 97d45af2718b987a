// The mask fills and the tile classes. Macro: MASK_F16, 1 for f16 masks, else bf16.

#if MASK_F16
#define HIDDEN 0xfc00 // -infinity
#define TO_F32 f16_to_f32
#define MAX_PAIR "max.NaN.f16x2"
#else
#define HIDDEN 0xff80
#define TO_F32 bf16_to_f32
#define MAX_PAIR "max.NaN.bf16x2"
#endif

// A block a row: 0 where the key is visible, -infinity where it is not.
extern "C" __global__ void __launch_bounds__(256) fill(u16* mask, const MaskFillParams p) {
    const i64 row = blockIdx.x, position = row + p.q_abs_offset;
    u16* cells = mask + row * p.seq_len_k;
    for (i64 key = threadIdx.x; key < p.seq_len_k; key += 256) {
        cells[key] = score_bounds_show(position, key, p.causal != 0, i64(p.window)) ? 0 : HIDDEN;
    }
}

// The same for tokens of several sequences: a row sees keys of its own sequence alone, by their positions
// in it.
extern "C" __global__ void __launch_bounds__(256) fill_blocks(u16* mask, const u32* ids, const u32* positions, const BlockFillParams p) {
    const i64 row = blockIdx.x, position = positions[row];
    const u32 id = ids[row];
    u16* cells = mask + row * p.len;
    for (i64 key = threadIdx.x; key < p.len; key += 256) {
        const bool seen = ids[key] == id && score_bounds_show(position, i64(positions[key]), p.causal != 0, i64(p.window));
        cells[key] = seen ? 0 : HIDDEN;
    }
}

// The largest cell of a tile and the bits that its cells have set, two cells at a time.
struct Cells {
    u32 most = HIDDEN * 0x10001u; // the largest of the cells in even and in odd places, NaN once there is one
    u32 bits = 0;          // that any cell has set
    DEV_MEMBER void add(u32 pair) {
        asm(MAX_PAIR " %0, %0, %1;" : "+r"(most) : "r"(pair));
        bits |= pair;
    }
    DEV_MEMBER bool masked() const { return TO_F32(most & 0xffff) <= MASKED_AT_OR_BELOW && TO_F32(most >> 16) <= MASKED_AT_OR_BELOW; }
    DEV_MEMBER bool zero() const { return (bits & 0x7fff7fff) == 0; }
};

DEV u8 class_code(bool masked, bool zero) { return masked ? CLASS_SKIP : zero ? CLASS_FREE : CLASS_MIXED; }

// A warp a tile of any size. The first rule that fits: reaching past the keys: mixed; all masked: skip; all
// zero: free; else mixed. Rows past the last do not count.
extern "C" __global__ void __launch_bounds__(32) classify(const u16* mask, u8* classes, const BlkParams p, int bq, int bk) {
    const i64 tile = blockIdx.x, kt = tile % p.nk, qt = tile / p.nk;
    const i64 key0 = kt * bk, row0 = qt * bq;
    const i64 rows = p.seq_len_q - row0 < bq ? p.seq_len_q - row0 : bq;
    const bool whole = key0 + bk <= p.seq_len_k;
    bool masked = false, zero = false;
    if (whole) {
        Cells cells;
        for (i64 cell = threadIdx.x; cell < rows * bk; cell += 32)
            cells.add(mask[(row0 + cell / bk) * p.row_stride + key0 + cell % bk] * 0x10001u);
        masked = __all_sync(ALL_LANES, cells.masked());
        zero = __all_sync(ALL_LANES, cells.zero());
    }
    if (threadIdx.x == 0) classes[tile] = class_code(masked, zero);
}

// The cells of eight keys and `rows` rows. `AT_ONCE` loads are in flight together; those past the last row load the last
// row again.
template <int AT_ONCE> DEV Cells column(const u16* at, i64 row_stride, int rows) {
    Cells cells;
    for (u32 row = 0; row < u32(rows); row += AT_ONCE) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = *(const uint4*)(at + i64(min(row + i, u32(rows) - 1)) * row_stride);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            cells.add(x[i].x);
            cells.add(x[i].y);
            cells.add(x[i].z);
            cells.add(x[i].w);
        }
    }
    return cells;
}

// The same where rows lie on 16 bytes and `bk` is 8, 16, 32 or 64: a warp has the rows of a row of
// tiles and 256 keys, 8 keys a lane.
extern "C" __global__ void __launch_bounds__(128, 3) classify_wide(const u16* mask, u8* classes, const BlkParams p, int bq, int bk) {
    wait_for_kernel_before();
    const i64 across = (i64(p.seq_len_k) + 1023) / 1024;
    const i64 qt = blockIdx.x / across, key0 = (blockIdx.x % across) * 1024 + i64(threadIdx.x / 32) * 256;
    const int lane = threadIdx.x % 32;
    const i64 key = key0 + 8 * lane, row0 = qt * bq;
    const int rows = int(p.seq_len_q - row0 < bq ? p.seq_len_q - row0 : bq);
    const i64 kt = key / bk, tile_end = (kt + 1) * bk;
    const bool whole = tile_end <= p.seq_len_k;
    Cells cells;
    if (whole) {
        const u16* at = mask + row0 * p.row_stride + key;
        cells = rows > 8 ? column<32>(at, p.row_stride, rows) : column<8>(at, p.row_stride, rows);
    }
    const int lanes = bk / 8;
    // A bit a lane; those of the lanes that share a tile.
    const u32 of_tile = ((2u << (lanes - 1)) - 1) << (lane / lanes * lanes);
    const bool masked = (__ballot_sync(ALL_LANES, whole && cells.masked()) & of_tile) == of_tile;
    const bool zero = (__ballot_sync(ALL_LANES, whole && cells.zero()) & of_tile) == of_tile;
    if (lane % lanes == 0 && kt < p.nk) classes[qt * p.nk + kt] = class_code(masked, zero);
}
