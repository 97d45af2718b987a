// The steps of score.h for the scores of a thread, in other units. Three of them have a second form here, for speed:
// - the scale, where nothing but a mask or bounds follows, is left to the softmax, whose exponent multiplies by it
//   anyway; a mask's cells are brought to the unit of unscaled scores instead (cell_unit);
// - the softcap comes from one exponential and one reciprocal, since tanhf takes some twenty instructions;
// - visibility is compared as columns of the tile, and only in warps that the bounds cut.

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

// Adds a cell. A hidden cell gives -infinity where x is finite, else NaN, which the output's test finds: the run CLEAN
// then selects (`select_mask`).
DEV float add_mask(float x, MaskElement v, const Params& p) {
    x *= shrink(p);
#if MASK == 4
    return score_if_seen(x, v);
#else
    return score_masked(x, mask_value(v), cell_unit(p));
#endif
}

// Two cells of a class tile that is skipped (`hidden`) or free of the mask.
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

// Prefetches a warpgroup's rows of the mask for key tile `tile` into the L1 cache.
template <int N>
DEV void prefetch_mask(const Params& p, const Tile& t, const Rows& r, int row0, int tile, int tid) {
    tid = opaque(tid);
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

template <int N> DEV void limit_all(float (&s)[N]) {
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = clamped(s[j]);
}

#if SCORE_MOD
// Scores scaled and capped, c tanh(x scale / c), in log2 units. The difference loses bits of a score far
// below the cap, so the host gives no large caps.
template <int N> DEV void cap_scores(float (&s)[N], const Params& p, const Rows& r) {
    if (p.softcap == 0.0f) {
#pragma unroll
        for (int j = 0; j < N; j++) s[j] = score_scaled(s[j], p.scale_log2);
        return;
    }
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = r.cap_out - 2.0f * r.cap_out * rcp_fast(exp2_fast(s[j] * r.cap_in) + 1.0f);
}
#endif

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
            MaskElement v = single_of(cell == CLASS_SKIP);
            // Volatile, so that few loads are in flight: each takes a register.
            if (cell == CLASS_MIXED && c0 + column < r.sk) v = *(const volatile MaskElement*)(at + column);
            float& x = s[4 * (j / 2) + 2 * half + j % 2];
            x = score_if_seen(add_mask(x, v, p), !score_cell_hides(mask_value(v)));
            if (j % 4 == 3) __syncwarp(); // ptxas moves no load past it
        }
    }
}
#endif

// The first and last key that the bounds show to a row.
DEV int first_key(const Params& p, const Rows& r, int half) {
    return LEFT ? max(0, score_first_key(r.pos + 8 * half, p.left)) : 0;
}

DEV int last_key(const Params& p, const Rows& r, int half) {
    return RIGHT ? min(r.sk - 1, score_last_key(r.pos + 8 * half, p.right)) : r.sk - 1;
}

// Softcap, biases and visibility for the scores of key tile `tile`; `masked`: some key of it may be hidden or biased.
template <int N>
DEV void modify(float (&s)[N / 2], const Params& p, const Rows& r, int tile, bool masked, int run,
                const Cells& cells = Cells()) {
    const int c0 = tile * N + r.col;
    if (run >= EXACT) limit_all(s);
#if SCORE_MOD
    cap_scores(s, p, r);
    if (p.slopes) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            int col = c0 + 8 * (j / 4) + (j & 1);
            int pos = r.pos + ((j >> 1) & 1) * 8;
            s[j] = score_alibi(s[j], r.slope, score_distance(pos, col));
        }
    }
    if (run >= EXACT) limit_all(s);
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
                MaskPair v = pair_of(cells.of(half, 8 * j) == CLASS_SKIP);
                if (cells.of(half, 8 * j) == CLASS_MIXED) v = *(const MaskPair*)(at + 8 * j);
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
                    if (cell != CLASS_MIXED) a = add_mask(a, single_of(cell == CLASS_SKIP), p);
                    else if (c0 + 8 * j + e < r.sk) a = add_mask(a, at[8 * j + e], p);
                }
            }
        }
    }
#endif
    // In most warps no row is cut by a bound, on one side or on both.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int last = last_key(p, r, half) - c0;
        if (__any_sync(~0u, last < N - 1)) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * j + e > last) s[4 * j + 2 * half + e] = NEG_INF;
            }
        }
#if LEFT
        const int first = first_key(p, r, half) - c0;
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
