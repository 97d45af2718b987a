// Tile classes: which cells of the mask a thread must read, and which key tiles are skipped.

#if CLASSES
#define ACROSS (BN / CLASS_KEYS) // classes of a row of class tiles that a key tile has
// Whether those can be read four at a time.
DEV bool classes_in_words(const Params& p) {
    return ACROSS % 4 == 0 && (((u64)p.classes | p.classes_stride) & 3) == 0;
}
#endif

// The classes of a thread's two rows in a key tile: a mask is read and added in mixed tiles alone.
// Below head dim 512 a warp's 16 rows have the same.
struct Cells {
#if CLASSES && CLASS_ROWS < 16
    u32 of_row[2];
    DEV_MEMBER u32 of(int half, int) const { return of_row[half]; }
#elif CLASSES
    u32 word[(ACROSS + 3) / 4];
    DEV_MEMBER u32 of(int, int column) const {
        const int at = column / CLASS_KEYS;
        return word[at / 4] >> (8 * (at % 4)) & 0xff;
    }
#else
    DEV_MEMBER u32 of(int, int) const { return CLASS_MIXED; }
#endif
};

DEV Cells cells_of(const Params& p, const Rows& r, int tile) {
    Cells cells;
#if CLASSES && CLASS_ROWS < 16
#pragma unroll
    for (int half = 0; half < 2; half++)
        cells.of_row[half] = p.classes[min(r.row + 8 * half, r.sq - 1) / CLASS_ROWS * p.classes_stride + tile];
#elif CLASSES
    const u8* at = p.classes + min(r.row, r.sq - 1) / CLASS_ROWS * p.classes_stride + tile * ACROSS;
    const int keys = min(ACROSS, (r.sk + CLASS_KEYS - 1) / CLASS_KEYS - tile * ACROSS);
    if (classes_in_words(p) && keys == ACROSS) {
#pragma unroll
        for (int i = 0; i < ACROSS / 4; i++) cells.word[i] = ((const u32*)at)[i];
    } else {
#pragma unroll
        for (int i = 0; i < (ACROSS + 3) / 4; i++) cells.word[i] = 0;
#pragma unroll
        for (int i = 0; i < ACROSS; i++)
            cells.word[i / 4] |= (i < keys ? (u32)at[i] : 0) << (8 * (i % 4));
    }
#endif
    return cells;
}

#if CLASSES
// A summary of the class tiles in query tile `t` and key tile `tile`, for each 64 rows w: bit w, some key is visible to
// some row; bit 8 + w, some key is hidden or biased.
DEV u32 class_of(const Params& p, const Tile& t, int tile) {
    const int down = 64 / CLASS_ROWS;
    const int keys = min(ACROSS, (t.sk + CLASS_KEYS - 1) / CLASS_KEYS - tile * ACROSS);
    const bool words = classes_in_words(p) && keys == ACROSS;
    const int rows = (t.sq - 1) / CLASS_ROWS - t.m0 / CLASS_ROWS; // past the last that one again
    const u8* first = p.classes + tile * ACROSS + t.m0 / CLASS_ROWS * p.classes_stride;
    u32 unskipped[BM / 64], unfree[BM / 64]; // bits of the classes, and of what tells them from CLASS_FREE
    if (words) {
        // No load waits for another.
#pragma unroll
        for (int w = 0; w < BM / 64; w++) {
            u32 x[down * (ACROSS + 3) / 4];
#pragma unroll
            for (int i = 0; i < down * ACROSS / 4; i++)
                x[i] = ((const u32*)(first + min(w * down + i % down, rows) * p.classes_stride))[i / down];
            unskipped[w] = unfree[w] = 0;
#pragma unroll
            for (int i = 0; i < down * ACROSS / 4; i++) {
                unskipped[w] |= x[i];
                unfree[w] |= x[i] ^ CLASS_FREE * 0x01010101u;
            }
        }
    } else {
#pragma unroll
        for (int w = 0; w < BM / 64; w++) {
            unskipped[w] = unfree[w] = 0;
#pragma unroll 1
            for (int i = 0; i < down * keys; i++) {
                const u8 x = first[min(w * down + i % down, rows) * p.classes_stride + i / down];
                unskipped[w] |= x;
                unfree[w] |= x ^ CLASS_FREE;
            }
        }
    }
    u32 out = 0;
#pragma unroll
    for (int w = 0; w < BM / 64; w++) {
        const bool part = hides_keys(p, t, t.m0 + 64 * w, tile);
        out |= (unskipped[w] ? (unfree[w] || part ? 0x101 : 1) : 0x100) << w;
    }
    return out;
}

// The key tiles of `t` that are not skipped, last first, by one warp: `list` has tile | 0x400 << w if
// something is hidden from the 64 rows w, which see no more than entries [from[w], to[w]). Returns how
// many.
DEV int list_tiles(u16* list, int* from, int* to, const Params& p, const Tile& t, int lane) {
    int len = 0, first = 0, end = 0; // `first` and `end` are those of 64 rows w = lane
    for (int at = t.hi - 1; at >= t.lo; at -= 32) {
        const int tile = at - lane;
        const u32 c = tile >= t.lo ? class_of(p, t, tile) : 0;
        const u32 some = __ballot_sync(~0u, c & 0xff);
        if (c & 0xff) list[len + __popc(some & ((1u << lane) - 1))] = (u16)(tile | c >> 8 << 10);
        u32 seen = 0;
#pragma unroll
        for (int w = 0; w < BM / 64; w++) {
            const u32 of_w = __ballot_sync(~0u, c >> w & 1);
            if (lane == w) seen = of_w;
        }
        if (seen) {
            if (end == 0) first = len + __popc(some & ((seen & -seen) - 1));
            end = len + __popc(some & (~0u >> __clz(seen)));
        }
        len += __popc(some);
    }
    if (lane < BM / 64) {
        from[lane] = first;
        to[lane] = end;
    }
    return len;
}
#endif
