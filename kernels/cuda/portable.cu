// Attention in bf16 and f16 with mma.sync and cp.async, for compute capability 8.0 and later
// (Dao 2023, FlashAttention-2). WM x WN warps; a warp has 16 * MT rows, so that what it reads of K and V from shared
// memory serves MT products. With WN > 1 the warps of one row share its keys in Q K^T and its columns in P V.
//
// Macros: D, BM = 16 * MT * WM rows and BN keys a tile, WM, WN, MT, KEYS = BN / WN, BLOCKS (threadblocks a processor),
// BF16, PACK = 1, PAGED, and those of mma_softmax.cu.

#define THREADS (32 * WM * WN)
#define P_ROW_BYTES (2 * BN + 16)

// s = Q K^T, for the rows of Q at `at_q` and the keys at `at_k`. What is read from shared memory is on its way while the
// product before it runs.
template <int HIGH> DEV void products(float (&s)[HIGH][KEYS / 8][4], u32 at_q, u32 at_k) {
    constexpr int BLOCKS_OF_KEYS = (KEYS + 15) / 16, DEPTH = WIDTH / 16;
    u32 a[2][HIGH][4], b[2][4];
    const auto read_q = [&](int d) {
#pragma unroll
        for (int m = 0; m < HIGH; m++) ldmatrix4(a[d % 2][m], further(at_q, 16 * m, d));
    };
    const auto read_k = [&](int d, int n) {
        u32 (&to)[4] = b[(d * BLOCKS_OF_KEYS + n) % 2];
        if (KEYS == 8) ldmatrix2(to, further(at_k, 0, d));
        else ldmatrix4(to, further(at_k, 16 * n, d));
    };
#pragma unroll
    for (int m = 0; m < HIGH; m++)
        for (int i = 0; i < KEYS / 2; i++) s[m][i / 4][i % 4] = 0.0f;
    read_q(0);
    read_k(0, 0);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
#pragma unroll
        for (int n = 0; n < BLOCKS_OF_KEYS; n++) {
            if (n + 1 < BLOCKS_OF_KEYS) {
                read_k(d, n + 1);
            } else if (d + 1 < DEPTH) {
                read_q(d + 1);
                read_k(d + 1, 0);
            }
            const u32 (&keys)[4] = b[(d * BLOCKS_OF_KEYS + n) % 2];
#pragma unroll
            for (int m = 0; m < HIGH; m++) mma(s[m][2 * n], a[d % 2][m], keys[0], keys[1]);
            if constexpr (KEYS > 8) {
#pragma unroll
                for (int m = HIGH - 1; m >= 0; m--) mma(s[m][2 * n + 1], a[d % 2][m], keys[2], keys[3]);
            }
        }
    }
}

// With WN > 1: puts a warp's weights where the warps that share its rows read them.
DEV void store_weights(const float (&s)[KEYS / 8][4], u32 at_p) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at_p + 16 * n), "r"(pack(s[n][0], s[n][1])) : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at_p + 16 * n + 8 * P_ROW_BYTES), "r"(pack(s[n][2], s[n][3])) : "memory");
    }
}

// O += P V, for the weights in `s`, or with WN > 1 in shared memory, and the values at `at_v`.
template <int HIGH> DEV void add_values(State (&state)[HIGH], const float (&s)[HIGH][KEYS / 8][4], u32 at_v, u32 weights) {
    constexpr int ACROSS = COLUMNS / 16, DOWN = BN / 16;
    u32 a[HIGH][4], b[2][4];
    ldmatrix4_trans(b[0], at_v);
#pragma unroll
    for (int c = 0; c < DOWN; c++) {
#pragma unroll
        for (int m = 0; m < HIGH; m++) {
#if WN > 1
            const int lane = threadIdx.x % 32;
            ldmatrix4(a[m], weights + u32((16 * m + lane % 16) * P_ROW_BYTES + 32 * c + 16 * (lane / 16)));
#else
            pack_weights(a[m], s[m], c);
#endif
        }
#pragma unroll
        for (int n = 0; n < ACROSS; n++) {
            const int i = c * ACROSS + n;
            if (n + 1 < ACROSS) ldmatrix4_trans(b[(i + 1) % 2], further(at_v, 16 * c, n + 1));
            else if (c + 1 < DOWN) ldmatrix4_trans(b[(i + 1) % 2], further(at_v, 16 * c + 16, 0));
#pragma unroll
            for (int m = 0; m < HIGH; m++) {
                mma(state[m].o[2 * n], a[m], b[i % 2][0], b[i % 2][1]);
                mma(state[m].o[2 * n + 1], a[m], b[i % 2][2], b[i % 2][3]);
            }
        }
    }
}

// With WN > 1: the maximum, or sum, of a row over the warps that share it. `local` is the row in the tile.
template <bool SUM> DEV void across(float (&x)[2], float* shares, int local) {
#if WN > 1
    const int lane = threadIdx.x % 32, wn = threadIdx.x / 32 / WM;
    __syncthreads();
    if (lane % 4 == 0) {
        shares[wn * BM + local] = x[0];
        shares[wn * BM + local + 8] = x[1];
    }
    __syncthreads();
    for (int r = 0; r < 2; r++) {
        x[r] = SUM ? 0.0f : NEG_INF;
        for (int w = 0; w < WN; w++) {
            const float y = shares[w * BM + local + 8 * r];
            x[r] = SUM ? x[r] + y : fmaxf(x[r], y);
        }
    }
#endif
}

DEV void store_row(const Params& p, const Tile& t, const State& state, int r, int row, int column, float sum) {
    const float m = state.m[r] == NEG_INF ? NEG_INF : natural(p, state.m[r]);
    if (p.splits > 1) {
        float* out = partial_values(p, result_row(p, t, row), t.split);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            if (PADDED && column + 8 * n >= D) continue;
            *(float2*)(out + column + 8 * n) = make_float2(state.o[n][2 * r], state.o[n][2 * r + 1]);
        }
        if (column == 0) *partial_stats(p, result_row(p, t, row), t.split) = make_float2(m, sum);
        return;
    }
    const Finish f = finish(m, sum, p.sinks, head_of(p, t, row));
    u16* out = (u16*)p.o + o_offset(p, t, row);
    if (p.vector & 2) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            if (PADDED && column + 8 * n >= D) continue;
            *(u32*)(out + column + 8 * n) = pack(state.o[n][2 * r] * f.factor, state.o[n][2 * r + 1] * f.factor);
        }
    } else {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            if (PADDED && column + 8 * n >= D) continue;
            out[column + 8 * n] = ROUND(state.o[n][2 * r] * f.factor);
            out[column + 8 * n + 1] = ROUND(state.o[n][2 * r + 1] * f.factor);
        }
    }
    if (column == 0) store_lse(p, t, row, f.lse);
}

// After a run that counts: merges a row of counts into the output that the runs before stored.
DEV void count_row(const Params& p, const Tile& t, const State& state, int r, int row, int column, int run) {
    float* partial = partial_values(p, result_row(p, t, row), t.split);
    u16* out = (u16*)p.o + o_offset(p, t, row);
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; i++) {
        const int c = column + 8 * (i / 2) + i % 2;
        const float count = state.o[i / 2][2 * r + i % 2];
        if (PADDED && c >= D) continue;
        if (p.splits > 1) partial[c] = counted(partial[c], count, run);
        else out[c] = ROUND(counted(element<ELEMENT>(out, c), count, run));
    }
}

DEV bool is_finite(const State& state, int r) {
    float zero = 0.0f;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) zero += state.o[n][2 * r] * 0.0f + state.o[n][2 * r + 1] * 0.0f;
    return zero == 0.0f;
}

// Stores a warp's rows, from `local0` of the tile on, or counts them; gives whether all are as they should be.
template <int HIGH> DEV bool finish_rows(const Params& p, const Tile& t, const State (&state)[HIGH], int local0, float* shares, bool met_unmasked, int run) {
    const int lane = threadIdx.x % 32, wn = threadIdx.x / 32 / WM;
    bool finite = true;
#pragma unroll
    for (int m = 0; m < HIGH; m++) {
        const int local = local0 + 16 * m + lane / 4;
        float sum[2] = {quad_sum(state[m].sum[0]), quad_sum(state[m].sum[1])};
        if (run < UPWARD) across<true>(sum, shares, local);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = t.m0 + local + 8 * r, column = wn * COLUMNS + 2 * (lane % 4);
            if (row >= t.rows) continue;
            if (run >= UPWARD) {
                count_row(p, t, state[m], r, row, column, run);
            } else {
                store_row(p, t, state[m], r, row, column, sum[r]);
                finite = finite && is_finite(state[m], r) && !lost(p, t, row, state[m].m[r], met_unmasked, run);
            }
        }
    }
    // Also the barrier between this run's last reads of shared memory and the next one's copies.
    return __syncthreads_and(finite) != 0;
}

// A run over the tile's rows; gives whether they are finite. FIRST: the run PLAIN. The later ones are compiled apart, as a
// function of their own, since what they need in registers would make the first a fifth slower.
template <bool FIRST> DEV bool tile_run(const Params& p, u8* raw, const int later, const int first_row) {
    constexpr int HIGH = FIRST ? MT : 1;
    const int run = FIRST ? PLAIN : later;
    const Tile t = tile_of(p, opaque(blockIdx.x));
    if (t.m0 >= t.rows) return true;

    const u32 sm_q = shared_address(raw), sm_k = sm_q + BM * ROW_BYTES, sm_v = sm_k + BN * ROW_BYTES;
    [[maybe_unused]] const u32 sm_p = sm_v + BN * ROW_BYTES;
    float* shares = (float*)(raw + (BM + 2 * BN) * ROW_BYTES + BM * P_ROW_BYTES);
    const HeadRows<u16> q = q_rows<u16>(p, t);
    const KvRows<u16> k = kv_rows<u16>(p, t, p.k, p.k_strides), v = kv_rows<u16>(p, t, p.v, p.v_strides);
    const bool vector = p.vector & 1;
    const float unit = score_unit(p);

    const int lane = threadIdx.x % 32, wm = threadIdx.x / 32 % WM, wn = threadIdx.x / 32 / WM;
    const int local0 = 16 * MT * wm + first_row, row0 = t.m0 + local0;
    const u32 at_q = a_at(sm_q, local0, 0), at_v = a_at(sm_v, 0, wn * COLUMNS);
    const u32 at_k = b_at(sm_k, wn * KEYS, 0);
    [[maybe_unused]] const u32 at_p = sm_p + u32((local0 + lane / 4) * P_ROW_BYTES + 2 * (wn * KEYS + 2 * (lane % 4)));
    // Rows past the last are not worked on where a whole warp has them alone.
    const bool active = row0 < t.rows;

    State state[HIGH];
#pragma unroll
    for (int m = 0; m < HIGH; m++) start(state[m]);

    bool met_unmasked = false;
    Walk<1> walk(p, t, t.lo);
    if (walk.at < walk.end) {
        if (run == PLAIN) load_q<THREADS>(sm_q, q, p, t, vector, threadIdx.x);
        load<BN, THREADS>(sm_k, k, walk.at * BN, t.sk, vector, threadIdx.x);
        copies_commit();
    }
    while (walk.at < walk.end) {
        const int k0 = walk.at * BN;
        const bool masked = MASK && p.mask && !walk.is_plain();
        copies_wait<0>();
        __syncthreads(); // K is there, and the last tile's V has been read
        load<BN, THREADS>(sm_v, v, k0, t.sk, vector, threadIdx.x);
        copies_commit();
        walk.next(p, t);

        float s[HIGH][KEYS / 8][4];
        if (active || WN > 1) {
            products(s, at_q, at_k);
            met_unmasked |= !masked;
            const bool edge = k0 < t.free_lo || t.free_hi - k0 < BN;
#pragma unroll
            for (int m = 0; m < HIGH; m++) {
                const int row = row0 + 16 * m + lane / 4, key = k0 + wn * KEYS + 2 * (lane % 4);
                float highest[2];
                to_scores(s[m], highest, p, t, masked, false, edge, row, key, run);
                if (run >= UPWARD) {
                    to_presence(s[m]);
                } else {
                    highest[0] = quad_max(highest[0]);
                    highest[1] = quad_max(highest[1]);
                    across<false>(highest, shares, local0 + 16 * m + lane / 4);
                    to_weights(s[m], state[m], highest, unit, run);
                }
                if (WN > 1) store_weights(s[m], at_p + u32(16 * m * P_ROW_BYTES));
            }
        }
        copies_wait<0>();
        __syncthreads(); // V is there, and K has been read
        if (run != PLAIN) {
            clean_halves<!BF16>(raw + (sm_v - sm_q), BN * ROW_BYTES, threadIdx.x, THREADS, run);
            __syncthreads();
        }
        if (walk.at < walk.end) load<BN, THREADS>(sm_k, k, walk.at * BN, t.sk, vector, threadIdx.x);
        copies_commit();
        if (active || WN > 1) add_values(state, s, at_v, sm_p + u32(local0 * P_ROW_BYTES));
    }

    return finish_rows(p, t, state, local0, shares, !MASK || met_unmasked, run);
}

__device__ __noinline__ void later_runs(const Params& p, u8* raw) {
    for (int run = CLEAN; run != DONE; run = run == CLEAN ? UPWARD : run + 1)
        for (int row = 0; row < 16 * MT; row += 16) tile_run<false>(p, raw, run, row);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 raw[];
    wait_for_kernel_before();
    if (!tile_run<true>(p, raw, PLAIN, 0)) later_runs(p, raw);
    if (p.splits > 1) {
        const Tile t = tile_of(p, blockIdx.x);
        if (t.m0 < t.rows) merge<ELEMENT>(p, t, min(t.rows - t.m0, BM));
    }
}
