// Attention in f32 on tensor cores, for compute capability 8.0 and later. A number is the sum of a high and a low part
// that TF32 holds (10 bits after the leading one), and a product of two is that of the high parts and the two mixed
// ones: what is left out is below 2^-21 of it (Markidis et al. 2018, section 4). Tensor cores round sums toward zero, so
// they sum RUN products at most; runs are added to each other as any f32.
//
// WARPS warps of 16 * MT rows. Macros: D (a multiple of 8), BM = 16 * MT * WARPS, BN (a multiple of 16), MT, WARPS,
// BLOCKS (threadblocks a processor), KV_F16, PACK, PAGED, and MASK, SOFTCAP and ALIBI: all or none.

#define THREADS (32 * WARPS)
#define STRIDE (D + 4) // of a row in shared memory, in chunks of 16 bytes odd
#define RUN 32

#if KV_F16
typedef u16 KvElement;
#else
typedef float KvElement;
#endif

// The rows of Q of a tile, which may be of several heads.
struct QueryRows {
    const Params& p;
    const Tile& t;
    const float* first;
    int before;
    DEV_MEMBER const float* at(int row) const {
        return first + p.q_strides[2] * query_of(p, before + row) + p.q_strides[1] * (head_of(p, t, before + row) - t.h);
    }
    DEV_MEMBER QueryRows from(int row) const { return {p, t, first, before + row}; }
};

// Copies N rows from `first` on to shared memory; zeros from row `end` on.
template <int N, typename Rows> DEV void load(float* to, const Rows& from, int first, int end, bool vector) {
    const Rows tile = from.from(first);
    const int there = end - first;
    if constexpr (sizeof(*from.first) == 4) {
        if (vector) {
#pragma unroll 4
            for (int i = threadIdx.x; i < N * (D / 4); i += THREADS) {
                const int row = i / (D / 4), column = 4 * (i % (D / 4));
                const bool in = row < there;
                copy16(shared_address(to + row * STRIDE + column), in ? tile.at(row) + column : from.first, in);
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < N * D; i += THREADS) {
                const int row = i / D, column = i % D;
                const bool in = row < there;
                copy4(shared_address(to + row * STRIDE + column), in ? tile.at(row) + column : from.first, in);
            }
        }
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < N * D; i += THREADS) {
            const int row = i / D, column = i % D;
            to[row * STRIDE + column] = row < there ? f16_to_f32(tile.at(row)[column]) : 0.0f;
        }
    }
}

DEV void ldmatrix4(float (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "r"(at) : "memory");
}

// c += a b, of 16 x 8 and 8 x 8 numbers.
DEV void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The high part is rounded, so that the low one has a bit less, and is cut to what TF32 holds by the product. CAREFUL: also
// of infinities, whose low part is 0, and of finite numbers that would be rounded to one. A NaN may be in the low part alone.
template <bool CAREFUL> DEV void part(float x, u32& high, u32& low) {
    const u32 bits = __float_as_uint(x);
    high = (bits + 0x1000u) & 0xffffe000u;
    if (CAREFUL && (high & 0x7fffffffu) == 0x7f800000u) high = bits & 0xffffe000u;
    const float rest = x - __uint_as_float(high);
    low = CAREFUL && x == __uint_as_float(high) ? 0 : __float_as_uint(rest);
}

template <bool CAREFUL, int N> DEV void parts(const float (&x)[N], u32 (&high)[N], u32 (&low)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) part<CAREFUL>(x[i], high[i], low[i]);
}

// Of two elements of K or V. TF32 holds every f16: it has no low part.
template <bool CAREFUL> DEV void key_parts(float x, float y, u32 (&high)[2], u32 (&low)[2]) {
#if KV_F16
    high[0] = __float_as_uint(x);
    high[1] = __float_as_uint(y);
#else
    part<CAREFUL>(x, high[0], low[0]);
    part<CAREFUL>(y, high[1], low[1]);
#endif
}

// The product of parts: `large` takes that of the high ones, `small` the mixed ones.
DEV void product(float (&large)[4], float (&small)[4], const u32 (&ah)[4], const u32 (&al)[4], const u32 (&bh)[2], const u32 (&bl)[2]) {
    mma(small, al, bh[0], bh[1]);
    if (!KV_F16) mma(small, ah, bl[0], bl[1]);
    mma(large, ah, bh[0], bh[1]);
}

// s = Q K^T.
template <int HIGH, bool CAREFUL> DEV void products(float (&s)[HIGH][BN / 8][4], u32 at_q, u32 at_k) {
#pragma unroll
    for (int m = 0; m < HIGH; m++)
        for (int i = 0; i < BN / 2; i++) s[m][i / 4][i % 4] = 0.0f;
    constexpr int STEPS = RUN / 8;
#pragma unroll 1
    for (int d0 = 0; d0 < D; d0 += RUN) {
        u32 ah[STEPS][HIGH][4], al[STEPS][HIGH][4];
#pragma unroll
        for (int d = 0; d < STEPS; d++) {
            if (D % RUN != 0 && d0 + 8 * d >= D) break;
#pragma unroll
            for (int m = 0; m < HIGH; m++) {
                float x[4];
                ldmatrix4(x, at_q + 4 * (16 * m * STRIDE + d0 + 8 * d));
                parts<CAREFUL>(x, ah[d][m], al[d][m]);
            }
        }
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            float large[HIGH][2][4], small[HIGH][2][4];
#pragma unroll
            for (int i = 0; i < HIGH * 8; i++) large[i / 8][i / 4 % 2][i % 4] = small[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
            for (int d = 0; d < STEPS; d++) {
                if (D % RUN != 0 && d0 + 8 * d >= D) break;
                float x[4];
                ldmatrix4(x, at_k + 4 * (16 * n * STRIDE + d0 + 8 * d));
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u32 bh[2], bl[2];
                    key_parts<CAREFUL>(x[2 * j], x[2 * j + 1], bh, bl);
#pragma unroll
                    for (int m = 0; m < HIGH; m++) product(large[m][j], small[m][j], ah[d][m], al[d][m], bh, bl);
                }
            }
#pragma unroll
            for (int m = 0; m < HIGH; m++)
#pragma unroll
                for (int i = 0; i < 8; i++) s[m][2 * n + i / 4][i % 4] += large[m][i / 4][i % 4] + small[m][i / 4][i % 4];
        }
    }
}

// What a thread has of HIGH * 16 rows: of row r of those 8 apart its columns of O, the highest score, and its share of the
// sum of weights.
template <int HIGH> struct State {
    float o[HIGH][D / 8][4], highest[HIGH][2], sum[HIGH][2];
};

// The weights of a tile, in parts, and what O is multiplied by before their product with V is added.
template <int HIGH> struct Weights {
    u32 high[HIGH][BN / 8][4], low[HIGH][BN / 8][4];
    float factor[HIGH][2];
};

// Adds the product of the weights and V to the O that a warp has, times `factor`. A thread reads W columns of a row at
// once, so that its 8 columns of W blocks lie side by side: of the W blocks from `block` on, column W * i + j of the rows
// is column i of block j. Rows are taken in the order in which a thread has their weights.
template <int W, bool CAREFUL, int HIGH> DEV void add_columns(float (&o)[HIGH][D / 8][4], const Weights<HIGH>& w, const float* v, int block) {
    const int lane = threadIdx.x % 32;
    const float* from = v + 2 * (lane % 4) * STRIDE + 8 * block + W * (lane / 4);
#pragma unroll
    for (int n0 = 0; n0 < BN / 8; n0 += RUN / 8) {
        float large[HIGH][W][4], small[HIGH][W][4];
#pragma unroll
        for (int i = 0; i < HIGH * W * 4; i++) large[i / (4 * W)][i / 4 % W][i % 4] = small[i / (4 * W)][i / 4 % W][i % 4] = 0.0f;
#pragma unroll
        for (int n = n0; n < n0 + RUN / 8 && n < BN / 8; n++) {
            float x[2][W];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float* row = from + (8 * n + r) * STRIDE;
                if constexpr (W == 4) *(float4*)x[r] = *(const float4*)row;
                else if constexpr (W == 2) *(float2*)x[r] = *(const float2*)row;
                else x[r][0] = *row;
            }
#pragma unroll
            for (int j = 0; j < W; j++) {
                u32 bh[2], bl[2];
                key_parts<CAREFUL>(x[0][j], x[1][j], bh, bl);
#pragma unroll
                for (int m = 0; m < HIGH; m++) product(large[m][j], small[m][j], w.high[m][n], w.low[m][n], bh, bl);
            }
        }
#pragma unroll
        for (int m = 0; m < HIGH; m++)
#pragma unroll
            for (int j = 0; j < W; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& x = o[m][block + j][i];
                    x = __fmaf_rn(x, n0 == 0 ? w.factor[m][i / 2] : 1.0f, large[m][j][i] + small[m][j][i]);
                }
    }
}

// e^(score - most). Not fused with the scale, so that all forms of the kernel agree.
DEV float weight_of(float score, float most) { return exp2_fast(__fadd_rn(score, -most) * LOG2E); }

// The column of the row that element `i` of `o[n]` is.
DEV int column_of(int n, int i) {
    const int lane = threadIdx.x % 32;
    constexpr int WIDE = D / 32 * 4; // blocks that are read by fours
    const int w = n < WIDE ? 4 : D / 8 - WIDE >= 2 && n < WIDE + 2 ? 2 : 1;
    const int first = n < WIDE ? n / 4 * 4 : w == 2 ? WIDE : n;
    return 8 * first + w * (2 * (lane % 4) + i) + (n - first);
}

// From the products of row r of those 8 apart to its scores.
DEV void to_scores(float (&x)[BN / 4], const float (&s)[BN / 8][4], int r, const Params& p, const Tile& t, bool masked, bool edge, int row, int key) {
#pragma unroll
    for (int i = 0; i < BN / 4; i++) x[i] = score_scaled(s[i / 2][2 * r + i % 2], p.scale);
#if MASK
    int rows[BN / 4], keys[BN / 4];
#pragma unroll
    for (int i = 0; i < BN / 4; i++) {
        rows[i] = row;
        keys[i] = key + 8 * (i / 2) + i % 2;
    }
    bias(x, p, t, masked, rows, keys);
#endif
    if (!edge) return;
    const int first = first_key(p, t, row) - key, end = end_key(p, t, row) - key;
#pragma unroll
    for (int i = 0; i < BN / 4; i++) {
        const int j = 8 * (i / 2) + i % 2;
        if (j < first || j >= end) x[i] = NEG_INF;
    }
}

// From the scores of row r of block m to its weights.
template <int HIGH> DEV void to_weights(Weights<HIGH>& w, State<HIGH>& state, const float (&x)[BN / 4], int m, int r, int run) {
    float most = state.highest[m][r];
#pragma unroll
    for (int i = 0; i < BN / 4; i++) most = fmaxf(most, x[i]);
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
    const float subtract = finite_max(most);
    w.factor[m][r] = run >= UPWARD ? 1.0f : weight_of(state.highest[m][r], subtract);
    state.highest[m][r] = most;
    float of_tile = 0.0f;
#pragma unroll
    for (int i = 0; i < BN / 4; i++) {
        const float weight = run >= UPWARD ? presence(x[i]) : weight_of(x[i], subtract);
        of_tile += weight;
        // As the product with V takes it: an even key in the first half of a block's, an odd one in the other.
        const int at = r + 2 * (i % 2);
        part<false>(weight, w.high[m][i / 2][at], w.low[m][i / 2][at]);
    }
    state.sum[m][r] = __fmaf_rn(state.sum[m][r], w.factor[m][r], of_tile);
}

// Stores the rows from `row0` on, or their part of the keys. Gives whether they are finite.
template <int HIGH> DEV bool finish_rows(const Params& p, const Tile& t, const State<HIGH>& state, int row0, int run) {
    const bool partial = p.splits > 1;
    const int lane = threadIdx.x % 32;
    bool finite = true;
#pragma unroll
    for (int m = 0; m < HIGH; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row0 + 16 * m + 8 * r + lane / 4;
            float sum = state.sum[m][r];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            if (row >= t.rows) continue;
            const float highest = state.highest[m][r];
            const Finish f = finish(highest, sum, p.sinks, head_of(p, t, row));
            float* out = partial ? partial_values(p, result_row(p, t, row), t.split) : (float*)p.o + o_offset(p, t, row);
            const float times = partial ? 1.0f : f.factor;
#pragma unroll
            for (int i = 0; i < D / 4; i++) {
                const int c = column_of(i / 2, i % 2);
                const float x = state.o[m][i / 2][2 * r + i % 2];
                out[c] = run >= UPWARD ? counted(out[c], x, run) : x * times;
                finite = finite && x * 0.0f == 0.0f;
            }
            if (lane % 4 != 0 || run >= UPWARD) continue;
            if (partial) *partial_stats(p, result_row(p, t, row), t.split) = make_float2(highest, sum);
            else store_lse(p, t, row, f.lse);
        }
    }
    return finite;
}

// A run over the tile's rows, or in the later ones over each warp's 16 from `first_row` of its own on. Gives whether the
// rows of all warps are finite.
template <bool FIRST> DEV bool tile_run(const Params& p, float* shared, const int later, const int first_row) {
    constexpr int HIGH = FIRST ? MT : 1;
    const int run = FIRST ? PLAIN : later;
    const Tile t = tile_of(p, opaque(blockIdx.x));
    if (t.m0 >= t.rows) return true;
    float* sm_q = shared;
    float* sm_k = sm_q + BM * STRIDE;
    float* sm_v = sm_k + BN * STRIDE;
    const QueryRows q = {p, t, q_rows<float>(p, t).first, 0};
    const KvRows<KvElement> k = kv_rows<KvElement>(p, t, p.k, p.k_strides), v = kv_rows<KvElement>(p, t, p.v, p.v_strides);
    const bool vector = p.vector & 1;
    const int lane = threadIdx.x % 32, local0 = 16 * MT * (threadIdx.x / 32) + first_row, row0 = t.m0 + local0;
    const u32 at_q = shared_address(sm_q + (local0 + lane % 16) * STRIDE + 4 * (lane / 16));
    const u32 at_k = shared_address(sm_k + (lane % 8 + 8 * (lane / 16)) * STRIDE + 4 * (lane / 8 % 2));
    const bool active = row0 < t.rows;

    State<HIGH> state;
#pragma unroll
    for (int m = 0; m < HIGH; m++) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) state.o[m][i / 4][i % 4] = 0.0f;
        state.highest[m][0] = state.highest[m][1] = NEG_INF;
        state.sum[m][0] = state.sum[m][1] = 0.0f;
    }

    Walk<1> walk(p, t, t.lo);
    if (walk.at < walk.end) {
        if (run == PLAIN) load<BM>(sm_q, q, t.m0, t.rows, vector);
        load<BN>(sm_k, k, walk.at * BN, t.sk, vector);
        copies_commit();
    }
    while (walk.at < walk.end) {
        const int k0 = walk.at * BN;
#if MASK
        const bool masked = p.mask && !walk.is_plain();
#else
        const bool masked = false;
#endif
        copies_wait<0>();
        __syncthreads(); // K is there, and the last tile's V has been read
        load<BN>(sm_v, v, k0, t.sk, vector);
        copies_commit();
        walk.next(p, t);

        Weights<HIGH> w;
        if (active) {
            float s[HIGH][BN / 8][4];
            products<HIGH, !FIRST>(s, at_q, at_k);
            const bool edge = k0 < t.free_lo || t.free_hi - k0 < BN;
#pragma unroll
            for (int i = 0; i < 2 * HIGH; i++) {
                const int m = i / 2, r = i % 2;
                float x[BN / 4];
                to_scores(x, s[m], r, p, t, masked, edge, row0 + 16 * m + 8 * r + lane / 4, k0 + 2 * (lane % 4));
                to_weights(w, state, x, m, r, run);
            }
        }
        copies_wait<0>();
        __syncthreads(); // V is there, and K has been read
        if (run != PLAIN) {
            for (int i = threadIdx.x; i < BN * STRIDE; i += THREADS) sm_v[i] = cleaned(sm_v[i], run);
            __syncthreads();
        }
        if (walk.at < walk.end) load<BN>(sm_k, k, walk.at * BN, t.sk, vector);
        copies_commit();
        if (!active) continue;
#pragma unroll
        for (int c = 0; c < D / 32; c++) add_columns<4, !FIRST>(state.o, w, sm_v, 4 * c);
        if constexpr (D % 32 >= 16) add_columns<2, !FIRST>(state.o, w, sm_v, D / 32 * 4);
        if constexpr (D % 16 == 8) add_columns<1, !FIRST>(state.o, w, sm_v, D / 8 - 1);
    }
    return __syncthreads_and(finish_rows(p, t, state, row0, run)) != 0;
}

__device__ __noinline__ void later_runs(const Params& p, float* shared) {
    for (int run = CLEAN; run != DONE; run = run == CLEAN ? UPWARD : run + 1)
        for (int row = 0; row < 16 * MT; row += 16) tile_run<false>(p, shared, run, row);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) float shared[];
    wait_for_kernel_before();
    if (!tile_run<true>(p, shared, PLAIN, 0)) later_runs(p, shared);
    if (p.splits > 1) {
        const Tile t = tile_of(p, blockIdx.x);
        if (t.m0 < t.rows) merge<TYPE_F32>(p, t, min(t.rows - t.m0, BM));
    }
}
