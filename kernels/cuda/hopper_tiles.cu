// What both Hopper kernels share: options, tiles, rows and the units of scores. Goes after careful.cu and Params;
// hopper_classes.cu, hopper_scores.cu, hopper_rows.cu, hopper_softmax.cu and a kernel's own texts follow.

// The host defines D (head dim), BN (keys of a tile), WGS (consumer warpgroups), STAGES, REGS_PRODUCER,
// REGS_CONSUMER and F16. The following options are off by default.
#ifndef RIGHT // keys after a row's position + right are hidden
#define RIGHT 0
#endif
#ifndef LEFT // keys before a row's position - left are hidden
#define LEFT 0
#endif
#ifndef MASK // 1 bf16, 2 f16, 3 f32: added to the scores; 4 bytes: nonzero attends
#define MASK 0
#endif
#ifndef CLASSES // a byte for CLASS_ROWS x CLASS_KEYS scores: 0 all hidden, 2 free of mask, 1 else
#define CLASSES 0
#endif
#ifndef SCORE_MOD // softcap or ALiBi (or a scale that is not positive): scores are scaled first
#define SCORE_MOD 0
#endif
#ifndef VARLEN // sequences have lengths of their own, and rows or keys may be packed
#define VARLEN 0
#endif
#ifndef PAGED // K and V lie in pages; with VARLEN
#define PAGED 0
#endif
#ifndef SPECULATE // compute weights against the reference as it is, without a maximum over the new scores
#define SPECULATE (D <= 256)
#endif

#define BM (64 * WGS) // query rows of a tile; at head dim 512, of a pair of CTAs
#define PANELS ((D + 63) / 64)
#define CLASS_ROWS CLASS_ROWS_AT(D)
#define CLASS_KEYS CLASS_KEYS_AT(D)
#define FAR (1 << 30) // bounds of positions from here on bound nothing
#define LIST_CAP 1024 // key tiles that a problem with classes may have, so that 10 bits number them

#if MASK == 1 || MASK == 2
typedef u16 MaskElement;
typedef u32 MaskPair;
#elif MASK == 3
typedef float MaskElement;
typedef float2 MaskPair;
#elif MASK == 4
typedef u8 MaskElement;
typedef u16 MaskPair;
#endif

// The parameters at an offset of `zero` bytes: an opaque zero makes the compiler load their fields again.
DEV const Params& params_at(const Params& p, int zero) { return *(const Params*)((const u8*)&p + zero); }

struct Tile {
    int b, h, m0;        // sequence, head, first row
    int sq, sk, q_off;   // of the sequence
    int q_start, k_start;
    int lo, hi;          // key tiles [lo, hi)
};

// The key tiles [lo, hi) that some of `rows` rows from `row` on sees.
DEV void bounds(const Params& p, const Tile& t, int row, int rows, int& lo, int& hi) {
    lo = 0;
    hi = (t.sk + BN - 1) / BN;
#if RIGHT
    const int end = score_last_key(min(row + rows, t.sq) + t.q_off, p.right); // one past the last row's last key
    hi = min(hi, end <= 0 ? 0 : (end + BN - 1) / BN);
#endif
#if LEFT
    lo = max(0, score_first_key(row + t.q_off, p.left) / BN);
#endif
    if (row >= t.sq || hi < lo) hi = lo;
}

// The batch entry of Q, O and the log-sum-exp that holds a tile's rows.
DEV int batch_of_rows(const Params& p, const Tile& t) { return VARLEN && p.cu_q ? 0 : t.b; }

// Where the keys and values of a tile's head are in the tensor maps: every copy of K and V takes its coordinates
// from here.
#if PAGED
#define MOST_BOX_ROWS (BN & -BN)
struct KvHead {
    const int* table; // the sequence's pages
    u32 pages;
    int head, keys, shift;
    // Rows of a copy, which lies in one page.
    DEV_MEMBER int box() const { return min(1 << shift, MOST_BOX_ROWS); }
    // An entry that names no page of the pool stands for page 0.
    DEV_MEMBER int page(int key) const {
        const u32 page = u32(__ldg(table + (key >> shift)));
        return page < pages ? int(page) : 0;
    }
    DEV_MEMBER int row(int key) const { return key & ((1 << shift) - 1); }
};

DEV KvHead kv_head_of(const Params& p, const Tile& t) {
    return {p.block_table + p.per_sequence * t.b, u32(p.pages), t.h / p.kv_group, t.sk, p.page_shift};
}
#else
struct KvHead {
    int first, head, batch;
    // The row that key tile `tile` starts at.
    DEV_MEMBER int row(int tile) const { return first + tile * BN; }
};

DEV KvHead kv_head_of(const Params& p, const Tile& t) {
    return KvHead{t.k_start, t.h / p.kv_group, VARLEN && p.cu_k ? 0 : t.b};
}
#endif

// Whether key tile `tile` hides a key from one of the 64 rows from `row` on, by position or by ending past the
// keys.
DEV bool hides_keys(const Params& p, const Tile& t, int row, int tile) {
    bool hides = (tile + 1) * BN > t.sk;
#if RIGHT
    hides |= (tile + 1) * BN - 1 > score_last_key(row + t.q_off, p.right);
#endif
#if LEFT
    hides |= tile * BN < score_first_key(min(row + 64, t.sq) - 1 + t.q_off, p.left);
#endif
    return hides;
}

// The tile at `index`, where heads of a section go together and a head's last rows come first. With
// `half` 1 or 2 an index stands for two tiles of one head, which together are as long as any other
// such two of its sequence: the longer, or the shorter, if there is one.
DEV Tile tile_of(const Params& p, int index, int half = 0) {
    Tile t;
    int per = p.section * (half ? (p.tiles_m + 1) / 2 : p.tiles_m);
    int s = index / per, r = index - s * per;
    int first = s * p.section;
    int in = min(p.section, p.batch * p.heads - first);
    int m = r / in;
    int bh = first + (r - m * in);
    t.b = bh / p.heads;
    t.h = bh - t.b * p.heads;
    t.q_start = t.k_start = 0;
    t.sq = p.sq;
    t.sk = p.sk;
    t.q_off = p.q_off;
#if VARLEN
    if (p.key_lengths) t.sk = int(min(p.key_lengths[t.b], u32(p.sk)));
    if (p.cu_q) {
        t.q_start = p.cu_q[t.b];
        t.sq = p.cu_q[t.b + 1] - t.q_start;
    }
    if (p.cu_k) {
        t.k_start = p.cu_k[t.b];
        t.sk = p.cu_k[t.b + 1] - t.k_start;
    }
    if (p.bottom_right) t.q_off = t.sk - t.sq;
    const int own = half ? (t.sq + BM - 1) / BM : p.tiles_m;
    const bool there = !half || 2 * m + half <= own;
#else
    const int own = p.tiles_m;
    const bool there = half != 2 || 2 * m + 2 <= own;
#endif
    t.m0 = (!there ? own : half == 2 ? m : own - 1 - m) * BM;
    bounds(p, t, t.m0, BM, t.lo, t.hi);
    return t;
}

// A tile that the producer put in shared memory. Fields that are the same for every tile are read from the
// parameters again: they are cheap to load there and need no registers in between.
DEV Tile tile_of_producer(const Params& p, const Tile& from) {
    Tile t = from;
#if !VARLEN
    t.q_start = t.k_start = 0;
    t.sq = p.sq;
    t.sk = p.sk;
    t.q_off = p.q_off;
#endif
    return t;
}

// Hides `x` from the optimiser, so that it does not hoist address arithmetic out of the loop: where four warpgroups
// compute, or a thread holds 256 columns of O, there are no registers for the results.
DEV int opaque(int x) {
    if (D <= 64 || D >= 512) asm volatile("" : "+r"(x));
    return x;
}

// The two rows of scores that a thread holds: `row` and `row + 8` of the sequence, at key positions
// `pos` and `pos + 8`, and of each tile the columns `col + 8 j` and the next.
struct Rows {
    int row, pos, col, sq, sk;
    float slope, cap_in, cap_out;
    i64 mask;
};

// Those of thread `tid` of the warpgroup whose rows start at `row0` of the tile.
DEV Rows rows_of(const Params& p, const Tile& t, int row0, int tid) {
    tid = opaque(tid);
    Rows r;
    r.row = t.m0 + row0 + (tid >> 5) * 16 + (tid >> 2 & 7);
    r.pos = r.row + t.q_off;
    r.col = 2 * (tid & 3);
    r.sq = t.sq;
    r.sk = t.sk;
#if SCORE_MOD
    r.slope = p.slopes ? p.slopes[t.h] * LOG2E : 0.0f;
    r.cap_in = p.softcap != 0.0f ? 2.0f * LOG2E * p.scale / p.softcap : 0.0f;
    r.cap_out = p.softcap * LOG2E;
#endif
#if MASK
    r.mask = (i64)t.b * p.mask_strides[0] + (i64)t.h * p.mask_strides[1] +
             (i64)t.q_start * p.mask_strides[2];
#endif
    return r;
}

// Scores under a mask are shrunk by a power of two, so that in their unit the sum of any two finite
// numbers, a score and a cell of the mask, is finite.
DEV float shrink(const Params& p) {
    if (!MASK) return 1.0f;
    return SCORE_MOD ? 0.25f : 0.5f * __uint_as_float(__float_as_uint(p.scale) & 0x7f800000);
}

// Factor from the unit of the softmax's reference to log2 units.
DEV float score_unit(const Params& p) {
    return (SCORE_MOD ? 1.0f : p.scale_log2) / shrink(p);
}

// Factor from the unit of the reference to natural units.
DEV float natural_unit(const Params& p) {
    if (SCORE_MOD) return LN2 / shrink(p);
    return MASK ? __uint_as_float((__float_as_uint(p.scale) & 0x7fffff) | 0x40000000) : p.scale;
}

// Factor from the unit of scores after modify() to that of the reference.
DEV float tile_unit(const Params& p, bool masked) {
    return masked ? 1.0f : shrink(p);
}

// Factor from natural units, those of a mask's cells, to the unit of the reference.
DEV float cell_unit(const Params& p) {
    return (SCORE_MOD ? LOG2E : p.inv_scale) * shrink(p);
}
