// The steps of score.h from the softcap to the biases, for the scores of a thread. The scale comes before them,
// and the bounds after.

#if MASK || SOFTCAP || ALIBI
// Adds the mask's cell to each score, as the class of its class tile says: CLASS_SKIP hides whatever the mask
// holds, CLASS_FREE adds nothing. A row past the last or a key past the last has no cell.
template <int TYPE, int N> DEV void add_mask(float (&s)[N], const Params& p, const Tile& t, const int (&rows)[N], const int (&keys)[N]) {
    u8 tile_class = CLASS_MIXED;
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (rows[i] >= t.rows || keys[i] >= t.sk) continue;
        const int query = query_of(p, rows[i]);
        if (p.classes) tile_class = p.classes[i64(query / CLASS_ROWS) * p.classes_stride + keys[i] / CLASS_KEYS];
        if (tile_class == CLASS_FREE) continue;
        float cell = NEG_INF;
        if (tile_class != CLASS_SKIP) {
            const i64 row = p.mask_strides[0] * t.b + p.mask_strides[1] * head_of(p, t, rows[i]) + p.mask_strides[2] * (t.q_start + query);
            cell = element<TYPE>(p.mask, row + keys[i]);
        }
        s[i] = score_if_seen(clamped(score_masked(s[i], cell, 1.0f)), !score_cell_hides(cell));
    }
}

// Softcap, mask and ALiBi, in natural-log units; hidden scores stay hidden.
template <int N> DEV void bias(float (&s)[N], const Params& p, const Tile& t, bool masked, const int (&rows)[N], const int (&keys)[N]) {
    if (p.softcap != 0.0f) {
#pragma unroll
        for (int i = 0; i < N; i++) s[i] = score_softcapped(s[i] / p.softcap, p.softcap);
    }
    if (masked) {
        switch (p.mask_type) {
        case TYPE_F32: add_mask<TYPE_F32>(s, p, t, rows, keys); break;
        case TYPE_F16: add_mask<TYPE_F16>(s, p, t, rows, keys); break;
        case TYPE_BF16: add_mask<TYPE_BF16>(s, p, t, rows, keys); break;
        case TYPE_BOOL: add_mask<TYPE_BOOL>(s, p, t, rows, keys); break;
        }
    }
    if (p.slopes) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float distance = score_distance(query_of(p, rows[i]) + t.q_off, i64(keys[i]));
            const float x = score_alibi(s[i], p.slopes[head_of(p, t, rows[i])], distance);
            s[i] = score_if_seen(clamped(x), s[i] != NEG_INF);
        }
    }
}
#endif

DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A maximum to subtract: a row that has seen nothing yet subtracts 0, so that -inf - -inf never is.
DEV float finite_max(float m) { return m == NEG_INF ? 0.0f : m; }

// Of a finished row: what its sum of weighted values is multiplied by, after the sink has joined the
// sum; and its log-sum-exp.
struct Finish {
    float factor, lse;
};

DEV Finish finish(float m, float sum, const float* sinks, int h) {
    if (sum == 0.0f) return {0.0f, NEG_INF};
    float scale = 1.0f;
    if (sinks) {
        const float sink = sinks[h], with = fmaxf(m, sink);
        scale = expf(m - with);
        sum = sum * scale + expf(sink - with);
        m = with;
    }
    return {scale / sum, m + logf(sum)};
}
