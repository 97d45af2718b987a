// Partial results of the parts that the keys of a tile are cut into, and their merge in the launch that makes them
// (Dao et al. 2023, Flash-Decoding): the threadblock that finishes last merges. Where there are many parts, the last of
// each MERGED merges theirs, and the last of those the rest. Parts are merged in their order, whoever does it.
// Macro: D (a multiple of 4).

#define MERGED 16

// A row's part: the weighted sum of values, not divided, and its maximum, in natural units, and sum of weights. The merged
// values of MERGED parts lie where those of the first did; maximum and sum have a place of their own.
DEV float* partial_values(const Params& p, i64 row, int split) { return p.partials + (row * p.splits + split) * D; }
DEV float2* partial_stats(const Params& p, i64 row, int split) {
    return (float2*)(p.partials + p.rows * p.heads * p.result_batch * p.splits * D) + row * p.splits + split;
}
DEV float2* merged_stats(const Params& p, i64 row, int group) {
    return partial_stats(p, p.rows * p.heads * p.result_batch, 0) + row * ((p.splits + MERGED - 1) / MERGED) + group;
}

// Whether this threadblock is the last of `count` that come here; what the others wrote before can be read then. The
// counter is 0 again after the last.
DEV bool is_last(u32* counter, int count) {
    __shared__ u32 arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counter, 1u);
        if (arrived == u32(count) - 1) *counter = 0;
    }
    __syncthreads();
    const bool last = arrived == u32(count) - 1;
    if (last) __threadfence();
    return last;
}

// Stores four elements of an output row; `on4`: rows lie on 4 bytes.
template <int OUT> DEV void store4(void* o, i64 at, float4 x, bool on4) {
    if constexpr (OUT == TYPE_F32) {
        float* to = (float*)o + at;
        to[0] = x.x;
        to[1] = x.y;
        to[2] = x.z;
        to[3] = x.w;
    } else {
        const auto round = [](float x) { return OUT == TYPE_F16 ? f32_to_f16(x) : f32_to_bf16(x); };
        const u16 e[4] = {round(x.x), round(x.y), round(x.z), round(x.w)};
        u16* to = (u16*)o + at;
        if (on4) {
            *(u32*)to = e[0] | u32(e[1]) << 16;
            *(u32*)(to + 2) = e[2] | u32(e[3]) << 16;
        } else {
            for (int i = 0; i < 4; i++) to[i] = e[i];
        }
    }
}

// A visible infinity or NaN stays whatever the weight of its part.
DEV float weighted(float x, float factor) { return fabsf(x) <= 3.4028235e38f ? x * factor : x; }

enum Merge {
    SOME,      // MERGED parts, the group's, into one
    OF_GROUPS, // what that gave, into the output
    ALL,       // all parts, into the output
};

// Merges `count` parts of every row of a tile from part `first` on. A warp has 128 columns of a row, and all that it reads
// is on the way at once.
template <int OUT> DEV void merge_parts(const Params& p, const Tile& t, int rows, Merge what, int first, int count) {
    const int step = what == OF_GROUPS ? MERGED : 1;
    constexpr int ACROSS = (D + 127) / 128;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int item = threadIdx.x / 32; item < rows * ACROSS; item += blockDim.x / 32) {
        const int r = t.m0 + item / ACROSS, c = item % ACROSS * 128 + 4 * lane;
        const i64 row = result_row(p, t, r);
        const float2* from = what == OF_GROUPS ? merged_stats(p, row, lane) : partial_stats(p, row, first + lane);
        const float2 stats = lane < count ? __ldcg(from) : make_float2(NEG_INF, 0.0f);
        float4 x[MERGED];
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
            x[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (i < count && c < D) x[i] = __ldcg((const float4*)(partial_values(p, row, first + i * step) + c));
        }
        float m = stats.x;
#pragma unroll
        for (int other = MERGED / 2; other > 0; other /= 2) m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, other));
        const float factor = expf(stats.x - finite_max(m));
        float sum = stats.y * factor;
#pragma unroll
        for (int other = MERGED / 2; other > 0; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
        m = __shfl_sync(ALL_LANES, m, 0);
        sum = __shfl_sync(ALL_LANES, sum, 0);
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
            const float by = __shfl_sync(ALL_LANES, factor, i);
            if (i >= count) continue;
            o.x += weighted(x[i].x, by);
            o.y += weighted(x[i].y, by);
            o.z += weighted(x[i].z, by);
            o.w += weighted(x[i].w, by);
        }
        if (what != SOME) {
            const Finish f = finish(m, sum, p.sinks, head_of(p, t, r));
            o = make_float4(o.x * f.factor, o.y * f.factor, o.z * f.factor, o.w * f.factor);
            if (c < D) store4<OUT>(p.o, o_offset(p, t, r) + c, o, p.vector & 2);
            if (c == 0) store_lse(p, t, r, f.lse);
        } else {
            if (c < D) *(float4*)(partial_values(p, row, first) + c) = o;
            if (c == 0) *merged_stats(p, row, first / MERGED) = make_float2(m, sum);
        }
    }
}

// After all parts of `rows` rows of this threadblock's tile are stored.
template <int OUT> DEV void merge(const Params& p, const Tile& t, int rows) {
    const int groups = (p.splits + MERGED - 1) / MERGED;
    u32* counters = p.counters + i64(blockIdx.x / u32(p.splits)) * (groups + 1);
    Merge what = groups > 1 ? SOME : ALL;
#pragma unroll 1
    for (;; what = OF_GROUPS) {
        const int first = what == SOME ? t.split / MERGED * MERGED : 0;
        const int count = what == SOME ? min(MERGED, p.splits - first) : what == ALL ? p.splits : groups;
        if (!is_last(counters + (what == SOME ? 1 + t.split / MERGED : 0), count)) return;
        merge_parts<OUT>(p, t, rows, what, first, count);
        if (what != SOME) return;
    }
}
