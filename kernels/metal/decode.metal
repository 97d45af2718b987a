// Decode: one query over a cache, split over the keys, then joined (Dao et al. 2023, Flash-Decoding).

constant constexpr int MAX_PER_LANE = 512 / 32;
constant constexpr int KEYS_A_STEP = 4;

// One simdgroup a (split, head). A split takes every `splits`-th run of 4 keys; a lane holds every
// 32nd element of a row. Partial results of a split: its D output values, its maximum in
// natural-log units, its sum.
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
    device const KV* keys = k + kv_head * long(p.kv_capacity) * dim;
    device const KV* values = v + kv_head * long(p.kv_capacity) * dim;

    float query[MAX_PER_LANE], o[MAX_PER_LANE];
    for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = i * 32 + lane;
        query[i] = d < dim ? q[head * dim + d] : 0.0f;
        o[i] = 0.0f;
    }

    float running_max = LOWEST, running_sum = 0.0f;
    const long last = p.kv_seq_len, stride = long(p.splits) * KEYS_A_STEP;
    for (long k0 = long(p.kv_start) + split * KEYS_A_STEP; k0 < last; k0 += stride) {
        const int there = int(min(long(KEYS_A_STEP), last - k0));
        float x[KEYS_A_STEP];
        float step_max = running_max;
        for (int j = 0; j < there; ++j) {
            float dot = 0.0f;
            for (int i = 0; i < MAX_PER_LANE; ++i) {
                const int d = i * 32 + lane;
                if (d < dim) { dot += query[i] * float(keys[(k0 + j) * dim + d]); }
            }
            float score = simd_sum(dot) * p.scale;
            if (p.softcap != 0.0f) { score = p.softcap * precise::tanh(score / p.softcap); }
            x[j] = score * LOG2E;
            step_max = max(step_max, x[j]);
        }
        const float factor = fast::exp2(running_max - step_max);
        running_max = step_max;
        running_sum *= factor;
        for (int i = 0; i < MAX_PER_LANE; ++i) { o[i] *= factor; }
        for (int j = 0; j < there; ++j) {
            const float weight = fast::exp2(x[j] - step_max);
            running_sum += weight;
            for (int i = 0; i < MAX_PER_LANE; ++i) {
                const int d = i * 32 + lane;
                if (d < dim) { o[i] += weight * float(values[(k0 + j) * dim + d]); }
            }
        }
    }

    device float* out = partials + (head * long(p.splits) + split) * (dim + 2);
    for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = i * 32 + lane;
        if (d < dim) { out[d] = running_sum > 0.0f ? o[i] / running_sum : 0.0f; }
    }
    if (lane == 0) {
        out[dim] = running_sum > 0.0f ? running_max * LN2 : -INFINITY;
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
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    for (long d = lane; d < dim; d += 32) {
        float sum = 0.0f;
        for (long s = 0; s < splits; ++s) {
            device const float* split = of_head + s * (dim + 2);
            sum += fast::exp2((split[dim] - highest) * LOG2E) * split[dim + 1] * split[d];
        }
        o[long(head) * dim + d] = sum * inverse;
    }
}
