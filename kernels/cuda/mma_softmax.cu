// The online softmax of a warp's 16 rows, in the layout of mma.sync's results: a thread has `row` and `row + 8`, and of
// each 8 columns two.
//
// Macros: KEYS (that a warp scores at once), WN (warps that share the columns of O), and which steps of a score there may
// be: MASK, SOFTCAP, ALIBI. A kernel of one step always takes it; one of several takes those that Params names.

#define COLUMNS (WIDTH / WN) // of a warp
#define MASK_OF_ANY_TYPE 2   // as MASK; 1: of the type of Q

// The weight of a score s is exp2((s - m) * score_unit()). The reference `m` stands in for the running maximum: it follows
// where that leads by more than LEAD log2 units, so that most tiles leave O as it is.
struct State {
    float o[COLUMNS / 8][4];
    float m[2], sum[2];
};
#define LEAD 8.0f

// The unit of scores.
#define IN_PRODUCTS (!MASK && !SOFTCAP)           // products of Q and K: the scale, which is positive, comes with the exponential
#define IN_CAPS (SOFTCAP && !MASK && !ALIBI)      // -1 to 0, where the score is -cap to cap
#define IN_NATURAL (!IN_PRODUCTS && !IN_CAPS)     // natural logarithms

DEV float score_unit(const Params& p) {
    return IN_PRODUCTS ? p.scale_log2 : IN_CAPS ? 2.0f * LOG2E * p.softcap : LOG2E;
}
// A score in natural-log units.
DEV float natural(const Params& p, float score) {
    return IN_PRODUCTS ? score * p.scale : IN_CAPS ? p.softcap * (1.0f + 2.0f * score) : score;
}

DEV void start(State& state) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
        for (int i = 0; i < 4; i++) state.o[n][i] = 0.0f;
    state.m[0] = state.m[1] = NEG_INF;
    state.sum[0] = state.sum[1] = 0.0f;
}

#if IN_NATURAL
// The largest softcap whose tanh comes from an exponential alone: its error, a part of the cap, stays below that of a
// weight in 16 bits.
#define LARGEST_FAST_CAP 256.0f

// tanh(x / 2). `near`: also for x so small that the difference from 1 would lose them.
DEV float tanh_half(float x, bool near) {
    const float far_form = 1.0f - 2.0f * reciprocal_fast(exp2_fast(x * LOG2E) + 1.0f);
    if (!near) return far_form;
    // The Taylor series up to the seventh power: its relative error is below 2^-21 within 1/4.
    const float h = 0.5f * x, h2 = h * h;
    const float series = h * (1.0f + h2 * (-1.0f / 3 + h2 * (2.0f / 15 + h2 * (-17.0f / 315))));
    return fabsf(h) < 0.25f ? series : far_form;
}

#if IN_NATURAL
// The least number that a score which is not hidden has; NaN stays.
DEV float at_least_finite(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0fff7fffff;" : "=f"(y) : "f"(x));
    return y;
}
#endif

#if MASK == MASK_OF_ANY_TYPE
// A mask's cell, whatever its type is: one load for each size of element.
DEV float cell_at(const Params& p, i64 at) {
    u32 bits;
    if (p.mask_type == TYPE_F32) bits = ((const u32*)p.mask)[at];
    else if (p.mask_type == TYPE_BOOL) bits = ((const u8*)p.mask)[at] ? 0 : 0xff800000u;
    else bits = ((const u16*)p.mask)[at];
    return p.mask_type == TYPE_F16 ? f16_to_f32(u16(bits)) : __uint_as_float(p.mask_type == TYPE_BF16 ? bits << 16 : bits);
}
#endif

#if MASK
// The cells of keys `j` and `j + 1` in the row at `cells`. `pairs`: there are both, and they lie on 4 bytes.
DEV float2 two_cells(const Params& p, const Tile& t, i64 cells, int j, bool pairs) {
    const int first = min(j, t.sk - 1), second = min(j + 1, t.sk - 1);
#if MASK == MASK_OF_ANY_TYPE
    return make_float2(cell_at(p, cells + first), cell_at(p, cells + second));
#else
    const u16* row = (const u16*)p.mask + cells;
    const u32 pair = pairs ? *(const u32*)(row + j) : row[first] | u32(row[second]) << 16;
    return make_float2(WIDEN(u16(pair)), WIDEN(u16(pair >> 16)));
#endif
}

// Adds the mask's cells to the scores of a tile that the mask is not known to leave as they are. A class of CLASS_SKIP
// hides whatever the mask holds, and CLASS_FREE adds nothing. Cells past the last row or key are not read: nobody reads
// the score either. Scores that overflow are limited upward where `limit` says so, and downward always, so that a row that
// the mask hides is told from one whose scores overflowed.
DEV void mask_scores(float (&s)[KEYS / 8][4], const Params& p, const Tile& t, bool limit, int row, int key) {
    const bool pairs = (p.vector & 4) && key + (KEYS - 6) <= t.sk;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int seen = min(row + 8 * r, t.rows - 1), query = query_of(p, seen);
        const i64 cells = p.mask_strides[0] * t.b + p.mask_strides[1] * head_of(p, t, seen) + p.mask_strides[2] * (t.q_start + query);
        const u8* classes = p.classes ? p.classes + i64(query / CLASS_ROWS) * p.classes_stride : nullptr;
        u8 tile_class = CLASS_MIXED;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            const int j = key + 8 * n;
            if (classes && n % 2 == 0) tile_class = classes[min(j, t.sk - 1) / CLASS_KEYS];
            const float2 two = two_cells(p, t, cells, j, pairs);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float of_mask = i == 0 ? two.x : two.y;
                const float cell = tile_class == CLASS_SKIP ? NEG_INF : tile_class == CLASS_FREE ? 0.0f : of_mask;
                float& x = s[n][2 * r + i];
                const float y = score_masked(x, cell, 1.0f);
                x = score_if_seen(limit ? clamped(y) : at_least_finite(y), !score_cell_hides(cell));
            }
        }
    }
}
#endif

// The steps of score.h up to the biases. Each product and sum is rounded by itself or fused by name: left to the compiler,
// that could differ between the runs, and so would their bits. `row` and `key` are the thread's first; `limit`: scores that overflow are limited.
DEV void modify(float (&s)[KEYS / 8][4], const Params& p, const Tile& t, bool masked, bool limit, int row, int key) {
    if (limit) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = score_scaled(s[i / 4][i % 4], p.scale);
    } else {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = SCORE_PRODUCT(s[i / 4][i % 4], p.scale);
    }
#if SOFTCAP
    if (p.softcap != 0.0f) {
        const float in = 2.0f / p.softcap;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            s[i / 4][i % 4] = SCORE_PRODUCT(p.softcap, tanh_half(s[i / 4][i % 4] * in, p.softcap > LARGEST_FAST_CAP));
    }
#endif
#if MASK
    if (masked) mask_scores(s, p, t, limit, row, key);
#endif
#if ALIBI
    if (p.slopes) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float slope = p.slopes[head_of(p, t, row + 8 * r)];
            // Exact up to 2^24, and as close as a float is beyond.
            const float ahead = float(query_of(p, row + 8 * r) + t.q_off - key);
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                float& x = s[i / 2][2 * r + i % 2];
                const float y = __fmaf_rn(-slope, fabsf(ahead - float(8 * (i / 2) + i % 2)), x);
                x = score_if_seen(limit ? clamped(y) : at_least_finite(y), x != NEG_INF);
            }
        }
    }
#endif
}
#elif SOFTCAP
// tanh(x / 2) = 1 - 2 / (exp(x) + 1), whose last term is the score.
DEV void cap_scores(float (&s)[KEYS / 8][4], const Params& p) {
    const float in = p.scale * (2.0f * LOG2E / p.softcap);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = -reciprocal_fast(exp2_fast(s[i / 4][i % 4] * in) + 1.0f);
}
#elif ALIBI
DEV void slope_scores(float (&s)[KEYS / 8][4], const Params& p, const Tile& t, int row, int key) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float slope = p.slopes[head_of(p, t, row + 8 * r)] * p.inv_scale;
        // Exact up to 2^24, and as close as a float is beyond.
        const float ahead = float(query_of(p, row + 8 * r) + t.q_off - key);
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            float& x = s[i / 2][2 * r + i % 2];
            x = __fmaf_rn(-slope, fabsf(ahead - float(8 * (i / 2) + i % 2)), x);
        }
    }
}
#endif

// Turns products into scores and gives the thread's highest of each row. `edge`: the bounds may hide keys of the tile from
// some row. Scores that overflowed are limited where `limit` says so, as under a mask, and in the runs after the first:
// where one is seen elsewhere, O is not finite or the row is lost().
DEV void to_scores(float (&s)[KEYS / 8][4], float (&highest)[2], const Params& p, const Tile& t, bool masked, bool limit, bool edge, int row, int key, int run) {
#if IN_NATURAL
    modify(s, p, t, masked, limit || run != PLAIN, row, key);
#elif IN_CAPS
    cap_scores(s, p);
#else
#if ALIBI
    slope_scores(s, p, t, row, key);
#endif
    if (run != PLAIN) {
        // So that differences, and their products with the scale, are finite too.
        const float most = 0.5f * (3.4028235e38f / fmaxf(1.0f, p.scale_log2));
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            float& x = s[i / 4][i % 4];
            if (fabsf(x) > most) x = copysignf(most, x);
        }
    }
#endif
    if (edge) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int first = first_key(p, t, row + 8 * r) - key, end = end_key(p, t, row + 8 * r) - key;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                const int j = 8 * (i / 2) + i % 2;
                if (j < first || j >= end) s[i / 2][2 * r + i % 2] = NEG_INF;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float a = s[0][2 * r], b = s[0][2 * r + 1];
#pragma unroll
        for (int n = 1; n < KEYS / 8; n++) {
            a = fmaxf(a, s[n][2 * r]);
            b = fmaxf(b, s[n][2 * r + 1]);
        }
        highest[r] = fmaxf(a, b);
    }
}

// The highest of the four threads that share a row.
DEV float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

DEV float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// From this distance of the reference from 0 on, in log2 units, it is subtracted before the unit's product: rounding
// that product would move weights by more than scores differ. Scores in products, which are seldom so large, leave such
// references to the runs after the first.
#define FAR 4096.0f

// Turns scores into weights, in place, given the highest score of each row. Each row decides for itself, so that its bits
// do not depend on the rows beside it.
DEV void to_weights(float (&s)[KEYS / 8][4], State& state, const float (&highest)[2], float unit, int run) {
    float factor[2], off[2];
    bool leads = false, far = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float old = state.m[r];
        const bool lead = (highest[r] - old) * unit > LEAD;
        if (lead) state.m[r] = highest[r];
        const float m = finite_max(state.m[r]);
        factor[r] = lead ? exp2_fast((old - m) * unit) : 1.0f;
        off[r] = m * unit;
        leads |= lead;
        far |= !(fabsf(off[r]) <= FAR);
    }
    if (__any_sync(ALL_LANES, leads)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            state.sum[r] *= factor[r];
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                state.o[n][2 * r] *= factor[r];
                state.o[n][2 * r + 1] *= factor[r];
            }
        }
    }
    if ((IN_NATURAL || IN_PRODUCTS && run != PLAIN) && __any_sync(ALL_LANES, far)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool apart = !(fabsf(off[r]) <= FAR);
            const float a = apart ? 1.0f : unit, b = apart ? finite_max(state.m[r]) : off[r], c = apart ? unit : 1.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) s[n][i] = __fmaf_rn(s[n][i], a, -b) * c;
            }
        }
    } else {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = __fmaf_rn(s[n][i], unit, -off[i / 2]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float a = 0.0f, b = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            a += s[n][2 * r] = exp2_fast(s[n][2 * r]);
            b += s[n][2 * r + 1] = exp2_fast(s[n][2 * r + 1]);
        }
        state.sum[r] += a + b;
    }
}

// The weights of 16 keys as the product with V takes them.
DEV void pack_weights(u32 (&a)[4], const float (&s)[KEYS / 8][4], int block) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack(s[2 * block + i / 2][2 * (i % 2)], s[2 * block + i / 2][2 * (i % 2) + 1]);
}

// The weights of a run that counts.
DEV void to_presence(float (&s)[KEYS / 8][4]) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = presence(s[i / 4][i % 4]);
}

// Whether the run PLAIN was not enough for a row whose reference is `m`: it is too far, or every score that the row has
// seen in the tile's keys overflowed downward. Where a mask limits scores, rows without a key are told from those by
// whether they `met_unmasked` tiles.
DEV bool lost(const Params& p, const Tile& t, int row, float m, bool met_unmasked, int run) {
    if (run != PLAIN) return false;
    if (m != NEG_INF) return IN_PRODUCTS && !(fabsf(m * score_unit(p)) <= FAR);
    return met_unmasked && max(first_key(p, t, row), t.lo * BN) < min(i64(end_key(p, t, row)), i64(t.hi) * BN);
}
