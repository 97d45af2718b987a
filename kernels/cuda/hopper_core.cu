// What the Hopper attention kernels share: options, parameters, tiles, masks and the softmax.
// Goes between hopper_ptx.cu and a kernel's own text.

// What the host defines: D head dim, BN keys a tile, WGS consumer warpgroups, STAGES,
// REGS_PRODUCER, REGS_CONSUMER; F16; and what follows, each off by default.
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
#ifndef VARLEN // packed sequences
#define VARLEN 0
#endif
#ifndef SPECULATE // take weights against the maximum so far, without a look at the new scores
#define SPECULATE (D <= 256)
#endif

#define BM (64 * WGS) // query rows of a tile; at head dim 512, of a pair of CTAs
#define PANELS ((D + 63) / 64)
#define CLASS_ROWS (D >= 512 ? 8 : 32)
#define CLASS_KEYS (D >= 512 ? 64 : 16)
#define LIST_CAP 1024 // key tiles that a problem with classes may have, so that 10 bits number them

struct Params {
    int batch, heads, kv_group;      // kv_group: query heads for each key/value head
    int sq, sk;                      // the longest, if packed
    int q_off;                       // position of query row 0 among the keys
    int left, right;                 // keys before and after a position that are seen
    int tiles_m, tiles, section;     // query tiles; all tiles; heads that share the L2 cache
    int bottom_right;                // packed: each sequence's offset is its sk - sq
    float scale, scale_log2;         // scale * log2(e)
    float softcap;                   // 0: none
    float inv_scale;                 // 1 / scale
    const float* sinks;              // [heads] or null
    const float* slopes;             // [heads] or null (ALiBi)
    float* lse;                      // or null
    const void* mask;                // columns contiguous
    const u8* classes;               // [ceil(sq / CLASS_ROWS), classes_stride]
    const int* cu_q;                 // packed: [batch + 1]
    const int* cu_k;
    u16* o;                          // written directly where rows are packed or none is visible
    i64 o_strides[3];                // batch, head, row; in elements
    i64 lse_strides[2];              // batch, head
    i64 mask_strides[3];             // batch, head, row
    i64 classes_stride;              // from row to row
};

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

#define NEG_INF __int_as_float(0xff800000)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// The parameters again, `zero` bytes on.
DEV const Params& params_at(const Params& p, int zero) { return *(const Params*)((const u8*)&p + zero); }

struct Tile {
    int b, h, m0;        // batch, head, first row
    int sq, sk, q_off;   // of the sequence
    int q_start, k_start;
    int lo, hi;          // key tiles [lo, hi)
};

// The key tiles [lo, hi) that some of `rows` rows from `row` on sees.
DEV void bounds(const Params& p, const Tile& t, int row, int rows, int& lo, int& hi) {
    lo = 0;
    hi = (t.sk + BN - 1) / BN;
#if RIGHT
    const int end = min(row + rows, t.sq) + t.q_off + p.right; // keys that the last row sees
    hi = min(hi, end <= 0 ? 0 : (end + BN - 1) / BN);
#endif
#if LEFT
    lo = max(0, (row + t.q_off - p.left) / BN);
#endif
    if (row >= t.sq || hi < lo) hi = lo;
}

// The tile at `index`, where heads of a section go together and a head's last rows come first. With
// `half` 1 or 2 an index stands for two tiles of one head, which together are as long as any other
// such two: the longer, or the shorter, if there is one.
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
    t.m0 = (half == 2 ? 2 * m + 1 == p.tiles_m ? p.tiles_m : m : p.tiles_m - 1 - m) * BM;
#if VARLEN
    t.q_start = p.cu_q[t.b];
    t.k_start = p.cu_k[t.b];
    t.sq = p.cu_q[t.b + 1] - t.q_start;
    t.sk = p.cu_k[t.b + 1] - t.k_start;
    t.q_off = p.bottom_right ? t.sk - t.sq : p.q_off;
#else
    t.q_start = t.k_start = 0;
    t.sq = p.sq;
    t.sk = p.sk;
    t.q_off = p.q_off;
#endif
    bounds(p, t, t.m0, BM, t.lo, t.hi);
    return t;
}

// A tile that another thread worked out; what all tiles have in common is where it always is.
DEV Tile tile_told(const Params& p, const Tile& from) {
    Tile t = from;
#if !VARLEN
    t.q_start = t.k_start = 0;
    t.sq = p.sq;
    t.sk = p.sk;
    t.q_off = p.q_off;
#endif
    return t;
}

// A bool known when compiling.
template <bool B>
struct Is {
    DEV_MEMBER constexpr operator bool() const { return B; }
};
typedef Is<true> Yes;
typedef Is<false> No;

// `x`, from which nothing that follows is worked out ahead of time and kept: where four warpgroups
// compute, or a thread holds 256 columns of O, there are no registers for that.
DEV int anew(int x) {
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
    tid = anew(tid);
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

// The unit of the softmax's reference, to log2 units.
DEV float score_unit(const Params& p) {
    return (SCORE_MOD ? 1.0f : p.scale_log2) / shrink(p);
}

// The same, to natural units.
DEV float natural_unit(const Params& p) {
    if (SCORE_MOD) return LN2 / shrink(p);
    return MASK ? __uint_as_float((__float_as_uint(p.scale) & 0x7fffff) | 0x40000000) : p.scale;
}

// The unit of scores that modify() has seen, to that of the reference.
DEV float tile_unit(const Params& p, bool masked) {
    return masked ? 1.0f : shrink(p);
}

// Natural units, which a mask's cells have, to that of the reference.
DEV float cell_unit(const Params& p) {
    return (SCORE_MOD ? LOG2E : p.inv_scale) * shrink(p);
}

#if MASK
#if MASK != 4
DEV float mask_value(MaskElement v) {
#if MASK == 1
    return bf16_to_f32(v);
#elif MASK == 2
    return f16_to_f32(v);
#else
    return v;
#endif
}
#endif

// A hidden cell of an additive mask gives -infinity where x is finite, else NaN: that ends in the run
// CLEAN, which has `select_mask`.
DEV float add_mask(float x, MaskElement v, const Params& p) {
    x *= shrink(p);
#if MASK == 4
    return v ? x : NEG_INF;
#else
    return __fmaf_rn(mask_value(v), cell_unit(p), x);
#endif
}


// What classes hidden and free of mask say of two neighbours.
DEV MaskPair pair_of(bool hidden) {
#if MASK == 1
    return hidden ? 0xff80ff80u : 0u;
#elif MASK == 2
    return hidden ? 0xfc00fc00u : 0u;
#elif MASK == 3
    const float f = hidden ? NEG_INF : 0.0f;
    return make_float2(f, f);
#else
    return hidden ? 0 : 0x0101;
#endif
}

DEV MaskElement single_of(bool hidden) {
#if MASK == 3
    return pair_of(hidden).x;
#else
    return (MaskElement)pair_of(hidden);
#endif
}

// Brings a warpgroup's rows of the mask for key tile `tile` near.
template <int N>
DEV void prefetch_mask(const Params& p, const Tile& t, const Rows& r, int row0, int tile, int tid) {
    tid = anew(tid);
    const u32 lines = (N * sizeof(MaskElement) + 127) / 128, per = 128 / sizeof(MaskElement);
#pragma unroll
    for (int i = 0; i < (64 * lines + 127) / 128; i++) {
        const u32 at = i * 128 + (u32)tid;
        const int row = t.m0 + row0 + (int)(at / lines), col = tile * N + (int)(at % lines * per);
        if (row < t.sq && col < t.sk)
            asm volatile("prefetch.global.L1 [%0];" ::"l"(
                (const MaskElement*)p.mask + (r.mask + (i64)row * p.mask_strides[2] + col)));
    }
}
#endif

#if CLASSES
#define ACROSS (BN / CLASS_KEYS) // classes of a row of class tiles that a key tile has
// Whether those can be read four at a time.
DEV bool classes_in_words(const Params& p) {
    return ACROSS % 4 == 0 && (((u64)p.classes | p.classes_stride) & 3) == 0;
}
#endif

// The classes of a thread's two rows in a key tile: a mask is read and added in tiles of class 1 alone.
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
    DEV_MEMBER u32 of(int, int) const { return 1; }
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

template <int N> DEV void clamp_all(float (&s)[N]) {
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = clamped(s[j]);
}

#if MASK && MASK != 4
// Adds an additive mask in runs after the first: the scores of hidden cells are -infinity, whatever they were.
template <int N>
DEV void select_mask(float (&s)[N / 2], const Params& p, const Rows& r, int c0, const Cells& cells) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = min(r.row + 8 * half, r.sq - 1);
        const MaskElement* at =
            (const MaskElement*)p.mask + (r.mask + (i64)row * p.mask_strides[2] + c0);
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const int column = 8 * (j / 2) + j % 2;
            const u32 cell = cells.of(half, 8 * (j / 2));
            MaskElement v = single_of(cell == 0);
            // Volatile, so that few are under way: each takes a register.
            if (cell == 1 && c0 + column < r.sk) v = *(const volatile MaskElement*)(at + column);
            float& x = s[4 * (j / 2) + 2 * half + j % 2];
            x = mask_value(v) == NEG_INF ? NEG_INF : add_mask(x, v, p);
            if (j % 4 == 3) __syncwarp(); // ptxas moves no load past it
        }
    }
}
#endif

// What happens to scores before the softmax, for key tile `tile`.
template <int N>
DEV void modify(float (&s)[N / 2], const Params& p, const Rows& r, int tile, bool masked, int run,
                const Cells& cells = Cells()) {
    const int c0 = tile * N + r.col;
    if (run >= EXACT) clamp_all(s);
#if SCORE_MOD
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
        float x = s[j];
        if (p.softcap != 0.0f) {
            // c tanh(x scale / c) in log2 units
            float e = exp2_fast(x * r.cap_in);
            x = r.cap_out - 2.0f * r.cap_out * rcp_fast(e + 1.0f);
        } else {
            x = x * p.scale_log2;
        }
        if (p.slopes) {
            int col = c0 + 8 * (j / 4) + (j & 1);
            int pos = r.pos + ((j >> 1) & 1) * 8;
            x -= r.slope * fabsf((float)(pos - col));
        }
        s[j] = x;
    }
    if (run >= EXACT) clamp_all(s);
#endif
    if (!masked) return;
#if MASK
#if MASK != 4
    const bool selected = run != PLAIN;
    if (selected) select_mask<N>(s, p, r, c0, cells);
#else
    const bool selected = false;
#endif
    const bool whole = tile * N + N <= r.sk;
    // Two neighbours can be read at once.
    const bool pairs = (((u64)p.mask / sizeof(MaskElement) | p.mask_strides[0] | p.mask_strides[1] |
                         p.mask_strides[2]) & 1) == 0;
#pragma unroll
    for (int half = 0; half < 2 && !selected; half++) {
        const int row = min(r.row + 8 * half, r.sq - 1);
        const MaskElement* at =
            (const MaskElement*)p.mask + (r.mask + (i64)row * p.mask_strides[2] + c0);
        if (whole && pairs) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                MaskPair v = pair_of(cells.of(half, 8 * j) == 0);
                if (cells.of(half, 8 * j) == 1) v = *(const MaskPair*)(at + 8 * j);
                float& a = s[4 * j + 2 * half];
                float& b = s[4 * j + 2 * half + 1];
#if MASK == 3
                a = add_mask(a, v.x, p);
                b = add_mask(b, v.y, p);
#else
                a = add_mask(a, (MaskElement)v, p);
                b = add_mask(b, (MaskElement)(v >> (8 * sizeof(MaskElement))), p);
#endif
            }
        } else {
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const u32 cell = cells.of(half, 8 * j);
                    float& a = s[4 * j + 2 * half + e];
                    if (cell != 1) a = add_mask(a, single_of(cell == 0), p);
                    else if (c0 + 8 * j + e < r.sk) a = add_mask(a, at[8 * j + e], p);
                }
            }
        }
    }
#endif
    // Most warps see all of a tile from one side or from both.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int last = r.sk - 1;
#if RIGHT
        last = min(last, r.pos + 8 * half + p.right);
#endif
        last -= c0;
        if (__any_sync(~0u, last < N - 1)) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * j + e > last) s[4 * j + 2 * half + e] = NEG_INF;
            }
        }
#if LEFT
        const int first = r.pos + 8 * half - p.left - c0;
        if (__any_sync(~0u, first > 0)) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * j + e < first) s[4 * j + 2 * half + e] = NEG_INF;
            }
        }
#endif
    }
}

// The softmax of a thread's two rows so far. `ref` is what scores are measured against: near the
// maximum, but no more than that. Weights and their sum `l` are relative to it.
struct Soft {
    float ref[2], l[2];
    float alpha[2]; // what O is multiplied by before the next product is added, if `scaled`
    float part[2];  // this tile's sums, if `grown`
    bool scaled, grown;
};

DEV Soft soft_start() {
    return Soft{{NEG_INF, NEG_INF}, {0.0f, 0.0f}, {1.0f, 1.0f}, {0.0f, 0.0f}, false, false};
}

// Whether differences of huge scores are taken before they are multiplied: with an additive mask in
// every run, since masks of huge finite values are common; else in the run EXACT.
#define MASKS_EXACTLY (MASK && MASK != 4 && !SCORE_MOD)

// Scores of one row, in `unit`, to weights; returns the thread's part of their sum.
template <int N>
DEV float weigh(float (&s)[N / 2], int half, float ref, float sc, float unit, bool masked, bool exact = false) {
    const float off = ref * sc, by = sc * unit;
    // The fused product would lose the difference. Each row decides for itself.
    const bool early = exact || (MASKS_EXACTLY && masked && fabsf(off) > 4096.0f);
    if (MASKS_EXACTLY ? (exact || masked) && __any_sync(~0u, early) : exact) {
        const float a = early ? unit : by, b = early ? ref : off, c = early ? sc : 1.0f;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            s[4 * j + 2 * half] = __fmaf_rn(s[4 * j + 2 * half], a, -b) * c;
            s[4 * j + 2 * half + 1] = __fmaf_rn(s[4 * j + 2 * half + 1], a, -b) * c;
        }
    } else
    {
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            s[4 * j + 2 * half] = __fmaf_rn(s[4 * j + 2 * half], by, -off);
            s[4 * j + 2 * half + 1] = __fmaf_rn(s[4 * j + 2 * half + 1], by, -off);
        }
    }
    float x = 0.0f, y = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        s[4 * j + 2 * half] = exp2_fast(s[4 * j + 2 * half]);
        s[4 * j + 2 * half + 1] = exp2_fast(s[4 * j + 2 * half + 1]);
        x += s[4 * j + 2 * half];
        y += s[4 * j + 2 * half + 1];
    }
    return x + y;
}

// Scores above `ref` give weights above 1. f16 holds them up to 2^16, so there the reference is
// kept above the maximum, and what still grows past that is done again.
#if F16
#define HEADROOM 8.0f
#define POISON 32768.0f
#else
#define HEADROOM 0.0f
#define POISON 1.8446744e19f
#endif

// Scores to weights. Usually without a look at their maximum: they are taken against the reference
// that there is, and where their sum then shows that they have grown much, the reference follows
// for the tiles to come. Weights too large for that (a leap by 2^64, in f16 2^24) make the sum
// infinite; such rows are done again in the run EXACT. The maximum comes first in a row's first tile
// and while its reference is very low. No row's bits depend on the rows beside it.
template <int N>
DEV void softmax(float (&s)[N / 2], Soft& f, float sc, float unit, bool masked, bool first, int run) {
    if (run >= UPWARD) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) s[j] = presence(s[j]);
        f.alpha[0] = f.alpha[1] = 1.0f;
        f.scaled = f.grown = false;
        return;
    }
    first = first || !SPECULATE || run == EXACT;
    if (first || __any_sync(~0u, !(f.ref[0] * sc > -16384.0f) || !(f.ref[1] * sc > -16384.0f))) {
        bool some = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float a = s[2 * half], b = s[2 * half + 1];
#pragma unroll
            for (int j = 1; j < N / 8; j++) {
                a = fmaxf(a, s[4 * j + 2 * half]);
                b = fmaxf(b, s[4 * j + 2 * half + 1]);
            }
            a = fmaxf(a, b);
            a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
            a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
            a *= unit;
            const float old = f.ref[half];
            // O is not rescaled for less than 2^8.
            // The exact division would take a register more.
            const float above = HEADROOM > 0.0f ? __fdividef(HEADROOM, sc) : 0.0f;
            const bool leads = first || !(old * sc > -16384.0f);
            const float now = leads && (a - old) * sc > 8.0f - HEADROOM ? a + above : old;
            f.ref[half] = now;
            // Where no key was visible yet: weights are 0, not 2^(-inf + inf).
            const float ref = now == NEG_INF ? 0.0f : now;
            const float shrunk = exp2_fast((old - ref) * sc);
            f.alpha[half] = (f.scaled ? f.alpha[half] : 1.0f) * shrunk;
            const float sum = weigh<N>(s, half, ref, sc, unit, masked, run == EXACT);
            f.l[half] = f.l[half] * shrunk + sum;
            f.part[half] = leads ? 0.0f : sum;
            some |= f.alpha[half] != 1.0f;
        }
        f.scaled = __any_sync(~0u, some);
        f.grown = __any_sync(~0u, !(f.part[0] + f.part[1] < 4096.0f));
        return;
    }
    f.part[0] = weigh<N>(s, 0, f.ref[0], sc, unit, masked);
    f.part[1] = weigh<N>(s, 1, f.ref[1], sc, unit, masked);
    f.l[0] += f.part[0];
    f.l[1] += f.part[1];
    f.grown = __any_sync(~0u, !(f.part[0] + f.part[1] < 4096.0f));
}

// After O took this tile's factor: where weights have grown much, the reference follows, and O and
// the sum shrink by as much.
DEV void settle(Soft& f, float sc) {
    f.scaled = f.grown;
    if (!f.grown) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = f.part[half], most = sum;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        f.alpha[half] = 1.0f;
        if (!(sum < POISON)) {
            f.l[half] = sum * __int_as_float(0x7f800000); // infinite, or NaN
        } else if (most >= 4096.0f) { // enough to set `grown` by itself
            const float by = log2_fast(sum) + HEADROOM;
            f.ref[half] += by / sc;
            f.alpha[half] = exp2_fast(-by);
            f.l[half] *= f.alpha[half];
        }
    }
}

// The first element of O's row `row` of a tile.
DEV u16* output_row(const Params& p, const Tile& t, int row) {
    return p.o + (i64)(VARLEN ? 0 : t.b) * p.o_strides[0] + (i64)t.h * p.o_strides[1] +
           (i64)(t.q_start + row) * p.o_strides[2];
}

DEV float half_to_f32(u16 x) { return F16 ? f16_to_f32(x) : bf16_to_f32(x); }

DEV bool is_finite(u16 x) { return (x & 0x7fff) < (F16 ? 0x7c00 : 0x7f80); }

// Above this many powers of two a fused difference is too coarse.
#define FAR_REFERENCE 16384.0f
#define LARGEST 3.4028235e38f

// What O is multiplied by in the end, for scores of `sc` a unit; writes the rows' log-sum-exp. `over`: the speculation failed, and
// the run EXACT is to do the row again, which finds NaN in all of it then.
DEV void finish(float (&inv)[2], bool (&over)[2], const Soft& f, const Params& p, float sc, const Tile& t, const Rows& r, int run) {
    inv[0] = inv[1] = 1.0f;
    over[0] = over[1] = false;
    if (run >= UPWARD) return;
    const float infinity = __int_as_float(0x7f800000);
    float* lse = p.lse + (i64)(VARLEN ? 0 : t.b) * p.lse_strides[0] + (i64)t.h * p.lse_strides[1] +
                 t.q_start;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = f.l[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        // In natural units, that of a mask's largest numbers is finite.
        float top = f.ref[half] == NEG_INF ? NEG_INF : clamped(f.ref[half] * natural_unit(p));
        // With an additive mask all but the tiles that are free of it take differences first. Where scores
        // are modified `sc` is a power of two, and the fused difference is exact until it overflows.
        const bool far = (SCORE_MOD || !MASKS_EXACTLY || CLASSES) && f.ref[half] != NEG_INF &&
                         !(fabsf(f.ref[half] * sc) <= (SCORE_MOD ? LARGEST : FAR_REFERENCE));
        over[half] = run < EXACT && (sum >= 1.0e38f || f.ref[half] == infinity || far);
        float part = 1.0f;
        if (p.sinks && sum != 0.0f) {
            const float sink = p.sinks[t.h];
            // Under an additive mask rounded as its cells are, so that equal huge numbers stay equal.
            const float above = MASK && MASK != 4 ? (f.ref[half] - __fmul_rn(sink, cell_unit(p))) * sc
                                                  : (top - sink) * LOG2E;
            part = exp2_fast(fminf(above, 0.0f));
            sum = sum * part + exp2_fast(fminf(-above, 0.0f));
            top = fmaxf(top, sink);
        }
        inv[half] = over[half] ? __int_as_float(0x7fffffff) : sum == 0.0f ? 0.0f : part / sum;
        const int row = r.row + 8 * half;
        if (p.lse && (r.col & 7) == 0 && row < t.sq && (run != EXACT || !is_finite(*output_row(p, t, row))))
            lse[row] = sum == 0.0f ? NEG_INF : top + log2_fast(sum) * LN2;
    }
}

// Adds zero times two finished elements of O to `zeros`: NaN once one is not finite.
DEV void test_finite(u32& zeros, u32 pair) {
#if F16
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
#endif
}

// Merges a run after CLEAN into 64 rows of O from `row` on, columns from `column` on: its WIDTH columns
// are staged in panels of ROWS rows. The run EXACT has the rows alone in which the speculation failed,
// the others what they count.
template <int WIDTH, int ROWS>
DEV void merge_rows(const Params& p, const Tile& t, int row, int column, const u8* staged, int tid, int run) {
#pragma unroll 1
    for (int i = tid; i < 64 * WIDTH; i += 128) {
        const int r = i / WIDTH, c = i % WIDTH;
        if (row + r >= t.sq) return;
        const u16 x = *(const u16*)(staged + (c / 64) * ROWS * 128 + r * 128 + ((c / 8 % 8 ^ (r & 7)) << 4) + c % 8 * 2);
        u16* to = output_row(p, t, row + r) + column + c;
        if (run == EXACT) {
            if (!is_finite(*to)) *to = x;
        } else {
            *to = (u16)pack2(counted(half_to_f32(*to), half_to_f32(x), run), 0.0f);
        }
    }
}

// Which run comes after `run`, by what was found.
struct Again {
    u32 clean; // an element of O is not finite
    u32 exact; // the speculation failed in a row
    u32 count; // an element of V is not finite
};

DEV int run_after(int run, const volatile Again& again) {
    if (run == PLAIN) return again.clean ? CLEAN : again.exact ? EXACT : DONE;
    if (run == CLEAN && again.exact) return EXACT;
    if (run <= EXACT) return again.count ? UPWARD : DONE;
    return run + 1;
}

// O and log-sum-exp of `rows` rows from `row` on that see no key, by the 128 threads of a group.
DEV void write_unseen(const Params& p, const Tile& t, int row, int rows, int tid) {
    tid = anew(tid);
    u16* o = p.o + (i64)(VARLEN ? 0 : t.b) * p.o_strides[0] + (i64)t.h * p.o_strides[1] +
             (i64)t.q_start * p.o_strides[2];
    float* lse = p.lse + (i64)(VARLEN ? 0 : t.b) * p.lse_strides[0] + (i64)t.h * p.lse_strides[1] +
                 t.q_start;
#pragma unroll 1
    for (int i = tid; i < rows * (D / 8); i += 128) {
        const int r = row + i / (D / 8);
        if (r < t.sq)
            *(uint4*)(o + r * p.o_strides[2] + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    if (p.lse && tid < rows && row + tid < t.sq)
        lse[row + tid] = NEG_INF;
}

#if VARLEN
// Makes zeros of rows [first, ROWS) of V, by the 128 threads of a group: where they are another
// sequence's, their weights are 0, but 0 times what another may hold need not be.
template <int WIDTH, int ROWS>
DEV void clear_rows(u8* panels, int first, int tid) {
    first = max(first, 0);
    for (int i = tid; i < WIDTH * (ROWS - first) * 8; i += 128) {
        const int row = first + i / 8 % (ROWS - first), panel = i / 8 / (ROWS - first);
        *(uint4*)(panels + (panel * ROWS + row) * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
}
#endif

#if CLASSES
// What the class tiles of query tile `t` and key tile `tile` say of each 64 rows w: bit w, some key is
// visible to some row; bit 8 + w, some is hidden or biased.
DEV u32 class_of(const Params& p, const Tile& t, int tile) {
    const int down = 64 / CLASS_ROWS;
    const int keys = min(ACROSS, (t.sk + CLASS_KEYS - 1) / CLASS_KEYS - tile * ACROSS);
    const bool words = classes_in_words(p) && keys == ACROSS;
    const int rows = (t.sq - 1) / CLASS_ROWS - t.m0 / CLASS_ROWS; // past the last that one again
    const u8* first = p.classes + tile * ACROSS + t.m0 / CLASS_ROWS * p.classes_stride;
    u32 zero[BM / 64], two[BM / 64]; // bits of the classes, and of their difference from 2
    if (words) {
        // No load waits for another.
#pragma unroll
        for (int w = 0; w < BM / 64; w++) {
            u32 x[down * (ACROSS + 3) / 4];
#pragma unroll
            for (int i = 0; i < down * ACROSS / 4; i++)
                x[i] = ((const u32*)(first + min(w * down + i % down, rows) * p.classes_stride))[i / down];
            zero[w] = two[w] = 0;
#pragma unroll
            for (int i = 0; i < down * ACROSS / 4; i++) {
                zero[w] |= x[i];
                two[w] |= x[i] ^ 0x02020202u;
            }
        }
    } else {
#pragma unroll
        for (int w = 0; w < BM / 64; w++) {
            zero[w] = two[w] = 0;
#pragma unroll 1
            for (int i = 0; i < down * keys; i++) {
                const u8 x = first[min(w * down + i % down, rows) * p.classes_stride + i / down];
                zero[w] |= x;
                two[w] |= x ^ 2;
            }
        }
    }
    u32 out = 0;
#pragma unroll
    for (int w = 0; w < BM / 64; w++) {
        bool part = (tile + 1) * BN > t.sk;
#if RIGHT
        part |= (tile + 1) * BN - 1 > t.m0 + 64 * w + t.q_off + p.right;
#endif
#if LEFT
        part |= tile * BN < min(t.m0 + 64 * w + 64, t.sq) - 1 + t.q_off - p.left;
#endif
        out |= (zero[w] ? (two[w] || part ? 0x101 : 1) : 0x100) << w;
    }
    return out;
}

// The key tiles of `t` that are not skipped, last first, by one warp: `list` has tile | 0x400 << w if
// something is hidden from the 64 rows w, which see no more than entries [from[w], to[w]). Returns how
// many.
DEV int list_tiles(u16* list, int* from, int* to, const Params& p, const Tile& t, int lane) {
    int len = 0, first = 0, end = 0; // the last two of the 64 rows that are this lane's
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
