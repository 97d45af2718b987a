// The online softmax of a warp's 16 rows, in the layout of mma.sync's results: a thread has `row` and `row + 8`, and of
// each 8 columns two. Macros: KEYS (that a warp scores at once), WN (warps that share the columns of O), GENERAL.

#define COLUMNS (WIDTH / WN) // of a warp

// The weight of a score s is exp2((s - m) * score_unit()). The reference `m` stands in for the running maximum: it follows
// where that leads by more than LEAD log2 units, so that most tiles leave O as it is.
struct State {
    float o[COLUMNS / 8][4];
    float m[2], sum[2];
};
#define LEAD 8.0f

#if GENERAL
// Scores are in natural units: biases are.
DEV float score_unit(const Params& p) { return LOG2E; }
DEV float natural_unit(const Params& p) { return 1.0f; }
#else
// Scores are products of Q and K, and the scale, which is positive, comes with the exponential.
DEV float score_unit(const Params& p) { return p.scale_log2; }
DEV float natural_unit(const Params& p) { return p.scale; }
#endif

DEV void start(State& state) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
        for (int i = 0; i < 4; i++) state.o[n][i] = 0.0f;
    state.m[0] = state.m[1] = NEG_INF;
    state.sum[0] = state.sum[1] = 0.0f;
}

#if GENERAL
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

// A mask's cell, whatever its type is: one load for each size of element.
DEV float any_element(const void* base, i64 at, int type) {
    u32 bits;
    if (type == TYPE_F32) bits = ((const u32*)base)[at];
    else if (type == TYPE_BOOL) bits = ((const u8*)base)[at] ? 0 : 0xff800000u;
    else bits = ((const u16*)base)[at];
    return type == TYPE_F16 ? f16_to_f32(u16(bits)) : __uint_as_float(type == TYPE_BF16 ? bits << 16 : bits);
}

// Adds the mask's cells to the scores of a tile that the mask is not known to leave as they are. A class of CLASS_SKIP
// hides whatever the mask holds, and CLASS_FREE adds nothing. Cells past the last row or key are not read: nobody reads
// the score either.
DEV void mask_scores(float (&s)[KEYS / 8][4], const Params& p, const Tile& t, int row, int key) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int seen = min(row + 8 * r, t.rows - 1), query = query_of(p, seen);
        const i64 cells = p.mask_strides[0] * t.b + p.mask_strides[1] * head_of(p, t, seen) + p.mask_strides[2] * (t.q_start + query);
        const u8* classes = p.classes ? p.classes + i64(query / CLASS_ROWS) * p.classes_stride : nullptr;
        u8 tile_class = CLASS_MIXED;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            const int j = min(key + 8 * (i / 2) + i % 2, t.sk - 1);
            if (classes && i % 4 == 0) tile_class = classes[j / CLASS_KEYS];
            float cell = any_element(p.mask, cells + j, p.mask_type);
            cell = tile_class == CLASS_SKIP ? NEG_INF : tile_class == CLASS_FREE ? 0.0f : cell;
            float& x = s[i / 2][2 * r + i % 2];
            x = score_if_seen(clamped(score_masked(x, cell, 1.0f)), !score_cell_hides(cell));
        }
    }
}

// The steps of score.h up to the biases. `row` and `key` are the thread's first; `limit`: scores that overflow are limited.
DEV void modify(float (&s)[KEYS / 8][4], const Params& p, const Tile& t, bool masked, bool limit, int row, int key) {
    if (limit) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = score_scaled(s[i / 4][i % 4], p.scale);
    } else {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] *= p.scale;
    }
    if (p.softcap != 0.0f) {
        const float in = 2.0f / p.softcap;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            s[i / 4][i % 4] = p.softcap * tanh_half(s[i / 4][i % 4] * in, p.softcap > LARGEST_FAST_CAP);
    }
    if (masked) mask_scores(s, p, t, row, key);
    if (p.slopes) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float slope = p.slopes[head_of(p, t, row + 8 * r)];
            // Exact up to 2^24, and as close as a float is beyond.
            const float ahead = float(query_of(p, row + 8 * r) + t.q_off - key);
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                float& x = s[i / 2][2 * r + i % 2];
                const float y = score_alibi(x, slope, fabsf(ahead - float(8 * (i / 2) + i % 2)));
                x = limit ? score_if_seen(clamped(y), x != NEG_INF) : y;
            }
        }
    }
}
#endif

// Turns products into scores and gives the thread's highest of each row. `edge`: the bounds may hide keys of the tile from
// some row. Scores that overflowed are limited where `limit` says so, as under a mask, and in the runs after the first:
// where one is seen elsewhere, O is not finite or the row is lost().
DEV void to_scores(float (&s)[KEYS / 8][4], float (&highest)[2], const Params& p, const Tile& t, bool masked, bool limit, bool edge, int row, int key, int run) {
#if GENERAL
    modify(s, p, t, masked, limit || run != PLAIN, row, key);
#else
    if (run != PLAIN) {
        // So that the product with the scale is finite too.
        const float most = 3.4028235e38f / fmaxf(1.0f, 2.0f * p.scale_log2);
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
// that product would move weights by more than scores differ. Without a mask, whose finite numbers may be huge, such
// references are left to the runs after the first.
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
    if ((GENERAL || run != PLAIN) && __any_sync(ALL_LANES, far)) {
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
    if (m != NEG_INF) return !GENERAL && !(fabsf(m * score_unit(p)) <= FAR);
    return met_unmasked && max(first_key(p, t, row), t.lo * BN) < min(i64(end_key(p, t, row)), i64(t.hi) * BN);
}
