// Decode: one query over a cache, split over the keys, then joined (Dao et al. 2023, Flash-Decoding).

constant constexpr int MAX_PER_LANE = 512 / 32;
constant constexpr int KEYS_A_STEP = 4;

// The dot product of a query and a key where it, or its product with the scale, came out infinite or
// NaN. Where both are finite the sum is computed again in a range that holds it, and kept to what the
// scale leaves finite.
template <typename KV>
METAL_FUNC float finite_dot(
    float dot, thread const float* query, device const KV* key, int dim, float scale, ushort lane) {
    float sum = 0.0f;
    UNROLL for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = i * 32 + lane;
        if (d < dim) { sum += (query[i] * 0x1p-70f) * (float(key[d]) * 0x1p-70f); }
    }
    sum = simd_sum(sum);
    const float limit = -LOWEST / 2.0f / max(abs(scale), 1.0f);
    return isfinite(sum) ? clamp(sum * 0x1p70f * 0x1p70f, -limit, limit) : dot;
}

// One simdgroup a (split, head). A split takes every `splits`-th run of 4 keys; a lane holds every
// 32nd element of a row. Partial results of a split: its D output values, its maximum in
// natural-log units, its sum. Keys outside the range are not read.
template <typename KV>
[[kernel]] void decode(
    device const float* q [[buffer(0)]],
    device const KV* k [[buffer(1)]],
    device const KV* v [[buffer(2)]],
    device float* partials [[buffer(3)]],
    constant VecParams& p [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
    const int dim = int(p.head_dim);
    const long split = group.x, head = group.y;
    const long kv_head = head / (p.num_heads / p.num_kv_heads);
    const long first = kv_head * long(p.kv_capacity) * dim;
    const KvRows<KV> keys{k + first, dim}, values{v + first, dim};

    float query[MAX_PER_LANE], o[MAX_PER_LANE];
    UNROLL for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = i * 32 + lane;
        query[i] = d < dim ? q[head * dim + d] : 0.0f;
        o[i] = 0.0f;
    }

    float running_max = LOWEST, running_sum = 0.0f;
    const long last = p.kv_seq_len, stride = long(p.splits) * KEYS_A_STEP;
    for (long k0 = long(p.kv_start) + split * KEYS_A_STEP; k0 < last; k0 += stride) {
        const int there = int(min(long(KEYS_A_STEP), last - k0));
        float x[KEYS_A_STEP];
        UNROLL for (int j = 0; j < KEYS_A_STEP; ++j) { x[j] = -INFINITY; }
        float step_max = running_max;
        UNROLL for (int j = 0; j < KEYS_A_STEP; ++j) {
            if (j >= there) { continue; }
            device const KV* key = kv_row(keys, k0 + j);
            float dot = 0.0f;
            UNROLL for (int i = 0; i < MAX_PER_LANE; ++i) {
                const int d = i * 32 + lane;
                if (d < dim) { dot += query[i] * float(key[d]); }
            }
            dot = simd_sum(dot);
            if (!isfinite(dot * p.scale)) { dot = finite_dot(dot, query, key, dim, p.scale, lane); }
            float score = score_scaled(dot, p.scale);
            if (p.softcap != 0.0f) { score = score_softcapped(score / p.softcap, p.softcap); }
            x[j] = score * HALF_LOG2E;
            step_max = max(step_max, x[j]);
        }
        const float factor = weight_at(running_max - step_max);
        running_max = step_max;
        running_sum *= factor;
        UNROLL for (int i = 0; i < MAX_PER_LANE; ++i) { o[i] *= factor; }
        UNROLL for (int j = 0; j < KEYS_A_STEP; ++j) {
            if (j >= there) { continue; }
            const float weight = weight_at(x[j] - step_max);
            running_sum += weight;
            device const KV* value = kv_row(values, k0 + j);
            UNROLL for (int i = 0; i < MAX_PER_LANE; ++i) {
                const int d = i * 32 + lane;
                if (d < dim) { o[i] += weight * float(value[d]); }
            }
        }
    }

    device float* out = partials + (head * long(p.splits) + split) * (dim + 2);
    UNROLL for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = i * 32 + lane;
        if (d < dim) { out[d] = running_sum != 0.0f ? o[i] / running_sum : 0.0f; }
    }
    if (lane == 0) {
        out[dim] = running_sum != 0.0f ? clamp(running_max * (2.0f * LN2), LOWEST, -LOWEST) : -INFINITY;
        out[dim + 1] = running_sum;
    }
}

template [[host_name("flash_attn_vec_f32")]] [[kernel]] decltype(decode<float>) decode<float>;
template [[host_name("flash_attn_vec_f16kv")]] [[kernel]] decltype(decode<half>) decode<half>;

// One simdgroup a head: joins the splits, weighted by exp(maximum) * sum.
[[kernel]] void flash_attn_vec_reduce(
    device const float* partials [[buffer(0)]],
    device float* o [[buffer(1)]],
    constant VecParams& p [[buffer(2)]],
    uint head [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
    const long dim = p.head_dim, splits = p.splits;
    device const float* of_head = partials + long(head) * splits * (dim + 2);
    float highest = LOWEST;
    for (long s = 0; s < splits; ++s) { highest = max(highest, of_head[s * (dim + 2) + dim]); }
    float total = 0.0f;
    for (long s = 0; s < splits; ++s) {
        device const float* split = of_head + s * (dim + 2);
        total += fast::exp2((split[dim] - highest) * LOG2E) * split[dim + 1];
    }
    const float inverse = total != 0.0f ? 1.0f / total : 0.0f;
    for (long d = lane; d < dim; d += 32) {
        float sum = 0.0f;
        for (long s = 0; s < splits; ++s) {
            device const float* split = of_head + s * (dim + 2);
            sum += fast::exp2((split[dim] - highest) * LOG2E) * split[dim + 1] * split[d];
        }
        o[long(head) * dim + d] = sum * inverse;
    }
}
