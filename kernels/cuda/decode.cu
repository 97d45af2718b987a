// Decode: one query over a cache, split over the keys (Dao et al. 2023, Flash-Decoding). A warp a
// (split, head): a split takes every `splits`-th run of 4 keys, a lane every 32nd element of a row.
// Macros: D, KV (the element type of K and V).

#define PER_LANE ((D + 31) / 32)
#define RUN 4

// Where row `key` of the keys or values of a head begins, in elements: the rows of a cache lie one after another.
DEV i64 kv_row(i64 head, i64 key) { return head + key * D; }

extern "C" __global__ void __launch_bounds__(32) partials(const float* q, const void* k, const void* v, float* out, const VecParams p) {
    const i64 split = blockIdx.x % p.splits, head = blockIdx.x / p.splits;
    const i64 base = head / (p.num_heads / p.num_kv_heads) * p.kv_capacity * D;
    const int lane = threadIdx.x;

    float query[PER_LANE], o[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = 32 * i + lane;
        query[i] = d < D ? q[head * D + d] : 0.0f;
        o[i] = 0.0f;
    }
    float m = NEG_INF, sum = 0.0f;
    for (i64 k0 = p.kv_start + split * RUN; k0 < p.kv_seq_len; k0 += i64(p.splits) * RUN) {
        float x[RUN], highest = m;
#pragma unroll
        for (int j = 0; j < RUN; j++) {
            float dot = 0.0f;
            if (k0 + j < p.kv_seq_len) {
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) {
                    const int d = 32 * i + lane;
                    if (d < D) dot += query[i] * element<KV>(k, kv_row(base, k0 + j) + d);
                }
            }
#pragma unroll
            for (int other = 16; other > 0; other /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, other);
            x[j] = score_scaled(dot, p.scale);
            if (p.softcap != 0.0f) x[j] = score_softcapped(x[j] / p.softcap, p.softcap);
            x[j] = score_if_seen(x[j], k0 + j < p.kv_seq_len);
            highest = fmaxf(highest, x[j]);
        }
        const float subtract = highest == NEG_INF ? 0.0f : highest, factor = expf(m - subtract);
        m = highest;
        sum *= factor;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) o[i] *= factor;
#pragma unroll
        for (int j = 0; j < RUN; j++) {
            if (k0 + j >= p.kv_seq_len) continue;
            const float weight = expf(x[j] - subtract);
            sum += weight;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                const int d = 32 * i + lane;
                if (d < D) o[i] += weight * element<KV>(v, kv_row(base, k0 + j) + d);
            }
        }
    }
    float* to = out + (head * p.splits + split) * (D + 2);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = 32 * i + lane;
        if (d < D) to[d] = o[i] * inverse;
    }
    if (lane == 0) {
        to[D] = m;
        to[D + 1] = sum;
    }
}
