// Attention in bf16 and f16 with mma.sync and cp.async, for compute capability 8.0 and later
// (Dao 2023, FlashAttention-2). WM x WN warps; a warp has 16 rows, and with WN > 1 the warps of one
// row share its keys in Q K^T and its columns in P V.
//
// Macros: D (a multiple of 8), BM = 16 * WM rows and BN keys a tile, WM, WN, BF16, GENERAL, PACK = 1.

#define THREADS (32 * WM * WN)
// Columns of a tile: the instructions take 16 at once. Columns from D on are zero and never stored.
#define WIDTH ((D + 15) / 16 * 16)
#define PADDED (WIDTH != D)
// Rows of shared memory hold chunks of 16 bytes. Where 8 rows fill whole bank cycles, chunks are
// swizzled; elsewhere a chunk of padding makes the row's length odd. Both keep ldmatrix free of
// conflicts.
#define CHUNKS (WIDTH / 8)
#define SWIZZLE (WIDTH % 64 == 0)
#define ROW_CHUNKS (SWIZZLE ? CHUNKS : CHUNKS + 1)
#define ROW_BYTES (16 * ROW_CHUNKS)
#define KEYS (BN / WN)   // of a warp in Q K^T
#define COLUMNS (WIDTH / WN) // of a warp in P V
#define P_ROW_BYTES (2 * BN + 16)

DEV u32 chunk_at(u32 base, int row, int chunk) {
    return base + u32(row * ROW_BYTES + 16 * (SWIZZLE ? chunk ^ (row & 7) : chunk));
}

DEV void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

DEV void ldmatrix2(u32 (&r)[2], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

DEV void ldmatrix4_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

#if BF16
#define MMA_TYPES "bf16.bf16"
#define ELEMENT TYPE_BF16
#define ROUND f32_to_bf16
#else
#define MMA_TYPES "f16.f16"
#define ELEMENT TYPE_F16
#define ROUND f32_to_f16
#endif

DEV void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEV u32 pack(float low, float high) { return u32(ROUND(low)) | u32(ROUND(high)) << 16; }

DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies ROWS rows from `first` on to shared memory; zeros from row `end` on.
template <int ROWS> DEV void load(u32 to, const HeadRows<u16>& from, int first, int end, bool vector) {
    const HeadRows<u16> tile = from.from(first);
    const int there = end - first;
    if (vector) {
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            const bool in = row < there && !(PADDED && chunk >= D / 8);
            copy16(chunk_at(to, row, chunk), in ? tile.at(row) + 8 * chunk : from.first, in);
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
            const int row = i / WIDTH, column = i % WIDTH;
            const u16 x = row < there && !(PADDED && column >= D) ? tile.at(row)[column] : u16(0);
            const u32 at = chunk_at(to, row, column / 8) + 2 * (column % 8);
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
        }
    }
}

// As `load` for Q, whose rows may be of several heads.
DEV void load_q(u32 to, const HeadRows<u16>& from, const Params& p, const Tile& t, bool vector) {
    if (p.pack == 1) return load<BM>(to, from, t.m0, t.rows, vector);
    for (int i = threadIdx.x; i < BM * CHUNKS; i += THREADS) {
        const int local = i / CHUNKS, chunk = i % CHUNKS, row = t.m0 + local;
        const bool in = row < t.rows && !(PADDED && chunk >= D / 8);
        const u16* at = from.first + p.q_strides[2] * (row / p.pack) + p.q_strides[1] * (row % p.pack) + 8 * chunk;
        if (vector) {
            copy16(chunk_at(to, local, chunk), in ? at : from.first, in);
        } else {
            for (int c = 0; c < 8; c++) {
                const u16 x = in ? at[c] : u16(0);
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(chunk_at(to, local, chunk) + 2 * c), "h"(x) : "memory");
            }
        }
    }
}

// A warp's 16 rows: two a thread, `row` and `row + 8`.
struct State {
    float o[COLUMNS / 8][4];
    float m[2], sum[2];
};

// Turns scores into weights, in place, and rescales sums and output to the new running maximum. EDGE: the bounds may
// hide keys of this tile from some row.
template <bool EDGE> DEV void to_weights(float (&s)[KEYS / 8][4], State& state, const Params& p, const Tile& t, bool masked, int k0, int row0, float* stats, int run) {
    const int lane = threadIdx.x % 32, wn = threadIdx.x / 32 / WM;
    const int row = row0 + lane / 4, key = k0 + wn * KEYS + 2 * (lane % 4);
    int first[2], end[2];
    if (EDGE) {
        for (int r = 0; r < 2; r++) {
            first[r] = first_key(p, t, row + 8 * r);
            end[r] = end_key(p, t, row + 8 * r);
        }
    }
    float highest[2] = {NEG_INF, NEG_INF};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = score_scaled(s[n][i], p.scale);
#if GENERAL
        const int rows[4] = {row, row, row + 8, row + 8};
        const int keys[4] = {key + 8 * n, key + 8 * n + 1, key + 8 * n, key + 8 * n + 1};
        bias<true>(s[n], p, t, masked, rows, keys);
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (EDGE) {
                const int j = key + 8 * n + i % 2;
                if (j < first[i / 2] || j >= end[i / 2]) s[n][i] = NEG_INF;
            }
            highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
        }
    }
    if (run >= UPWARD) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = presence(s[i / 4][i % 4]);
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(ALL_LANES, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(ALL_LANES, highest[r], 2));
    }
#if WN > 1
    const int local = (threadIdx.x / 32 % WM) * 16 + lane / 4;
    if (lane % 4 == 0) {
        stats[wn * BM + local] = highest[0];
        stats[wn * BM + local + 8] = highest[1];
    }
    __syncthreads();
    for (int w = 0; w < WN; w++) {
        highest[0] = fmaxf(highest[0], stats[w * BM + local]);
        highest[1] = fmaxf(highest[1], stats[w * BM + local + 8]);
    }
#endif
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float m = fmaxf(state.m[r], highest[r]);
        const float subtract = finite_max(m);
        const float factor = exp2_fast((state.m[r] - subtract) * LOG2E);
        state.m[r] = m;
        state.sum[r] *= factor;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            state.o[n][2 * r] *= factor;
            state.o[n][2 * r + 1] *= factor;
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                s[n][i] = exp2_fast((s[n][i] - subtract) * LOG2E);
                state.sum[r] += s[n][i];
            }
        }
    }
}

DEV void store_row(const Params& p, const Tile& t, const State& state, int r, int row, int column, float sum) {
    if (p.splits > 1) {
        float* out = p.partials + (result_row(p, t, row) * p.splits + t.split) * (D + 2);
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            if (PADDED && column + 8 * n >= D) continue;
            out[column + 8 * n] = state.o[n][2 * r] * inverse;
            out[column + 8 * n + 1] = state.o[n][2 * r + 1] * inverse;
        }
        if (column == 0) {
            out[D] = state.m[r];
            out[D + 1] = sum;
        }
        return;
    }
    const Finish f = finish(state.m[r], sum, p.sinks, head_of(p, t, row));
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
    float* partial = p.partials + (result_row(p, t, row) * p.splits + t.split) * (D + 2);
    u16* out = (u16*)p.o + o_offset(p, t, row);
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; i++) {
        const int c = column + 8 * (i / 2) + i % 2;
        const float count = state.o[i / 2][2 * r + i % 2];
        if (!(count > 0.0f) || (PADDED && c >= D)) continue;
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

// Threadblocks a processor. With one warp's rows a tile the host counts on four; at large head dims on two, since
// shared memory holds no more.
#define BLOCKS (WM > 1 ? 1 : D > 256 ? 2 : 4)

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 raw[];
    for (int run = PLAIN; run != DONE;) {
        // Opaque, so that values for a later run are not kept in registers through the first.
        u32 block = blockIdx.x;
        asm volatile("" : "+r"(block));
        const Tile t = tile_of(p, block);
        if (t.m0 >= t.rows) return;

        const u32 sm_q = shared_address(raw), sm_k = sm_q + BM * ROW_BYTES, sm_v = sm_k + BN * ROW_BYTES;
        [[maybe_unused]] const u32 sm_p = sm_v + BN * ROW_BYTES;
        float* stats = (float*)(raw + (BM + 2 * BN) * ROW_BYTES + BM * P_ROW_BYTES);
        const HeadRows<u16> q = q_rows<u16>(p, t);
        const HeadRows<u16> k = kv_rows<u16>(t, p.k, p.k_strides), v = kv_rows<u16>(t, p.v, p.v_strides);
        const bool vector = p.vector & 1;

        const int lane = threadIdx.x % 32, wm = threadIdx.x / 32 % WM, wn = threadIdx.x / 32 / WM;
        const int row0 = t.m0 + 16 * wm;
        // Rows past the last are not worked on where a whole warp has them alone.
        const bool active = row0 < t.rows;

        State state;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
            for (int i = 0; i < 4; i++) state.o[n][i] = 0.0f;
        state.m[0] = state.m[1] = NEG_INF;
        state.sum[0] = state.sum[1] = 0.0f;

        Walk walk(p, t);
        if (walk.at < walk.end) {
            if (run == PLAIN) load_q(sm_q, q, p, t, vector);
            load<BN>(sm_k, k, walk.at * BN, t.sk, vector);
            copies_commit();
        }
        while (walk.at < walk.end) {
            const int k0 = walk.at * BN;
            copies_wait();
            __syncthreads(); // K is there, and the last tile's V has been read
            load<BN>(sm_v, v, k0, t.sk, vector);
            copies_commit();

            float s[KEYS / 8][4];
            if (active || WN > 1) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
#pragma unroll
                for (int d = 0; d < WIDTH / 16; d++) {
                    u32 a[4];
                    ldmatrix4(a, chunk_at(sm_q, 16 * wm + lane % 16, 2 * d + lane / 16));
                    if constexpr (KEYS == 8) {
                        u32 b[2];
                        ldmatrix2(b, chunk_at(sm_k, wn * KEYS + lane % 8, 2 * d + lane / 8 % 2));
                        mma(s[0], a, b[0], b[1]);
                    } else {
#pragma unroll
                        for (int n = 0; n < KEYS / 16; n++) {
                            u32 b[4];
                            ldmatrix4(b, chunk_at(sm_k, wn * KEYS + 16 * n + lane % 8 + 8 * (lane / 16), 2 * d + lane / 8 % 2));
                            mma(s[2 * n], a, b[0], b[1]);
                            mma(s[2 * n + 1], a, b[2], b[3]);
                        }
                    }
                }
                const bool masked = p.mask && !walk.is_plain();
                // The general form is compiled once, with bounds.
                if (GENERAL || k0 < t.free_lo || t.free_hi - k0 < BN) to_weights<true>(s, state, p, t, masked, k0, row0, stats, run);
                else to_weights<bool(GENERAL)>(s, state, p, t, masked, k0, row0, stats, run);
#if WN > 1
                const u32 at = sm_p + u32((16 * wm + lane / 4) * P_ROW_BYTES + 2 * (wn * KEYS + 2 * (lane % 4)));
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 16 * n), "r"(pack(s[n][0], s[n][1])) : "memory");
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 16 * n + 8 * P_ROW_BYTES), "r"(pack(s[n][2], s[n][3])) : "memory");
                }
#endif
            }

            copies_wait();
            __syncthreads(); // V is there, and K has been read
            if (run != PLAIN) {
                clean_halves<!BF16>(raw + (sm_v - sm_q), BN * ROW_BYTES, threadIdx.x, THREADS, run);
                __syncthreads();
            }
            walk.seek(p, t, walk.at + 1);
            if (walk.at < walk.end) {
                load<BN>(sm_k, k, walk.at * BN, t.sk, vector);
                copies_commit();
            }
            if (active || WN > 1) {
#pragma unroll
                for (int c = 0; c < BN / 16; c++) {
                    u32 a[4];
#if WN > 1
                    ldmatrix4(a, sm_p + u32((16 * wm + lane % 16) * P_ROW_BYTES + 32 * c + 16 * (lane / 16)));
#else
                    a[0] = pack(s[2 * c][0], s[2 * c][1]);
                    a[1] = pack(s[2 * c][2], s[2 * c][3]);
                    a[2] = pack(s[2 * c + 1][0], s[2 * c + 1][1]);
                    a[3] = pack(s[2 * c + 1][2], s[2 * c + 1][3]);
#endif
#pragma unroll
                    for (int n = 0; n < COLUMNS / 16; n++) {
                        u32 b[4];
                        ldmatrix4_trans(b, chunk_at(sm_v, 16 * c + lane % 16, wn * (COLUMNS / 8) + 2 * n + lane / 16));
                        mma(state.o[2 * n], a, b[0], b[1]);
                        mma(state.o[2 * n + 1], a, b[2], b[3]);
                    }
                }
            }
        }

        bool finite = true;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row0 + lane / 4 + 8 * r;
            if (run >= UPWARD) {
                if (row < t.rows) count_row(p, t, state, r, row, wn * COLUMNS + 2 * (lane % 4), run);
                continue;
            }
            float sum = state.sum[r];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
#if WN > 1
            // Each warp of a row has the sum over its own keys.
            const int local = 16 * wm + lane / 4 + 8 * r;
            __syncthreads();
            if (lane % 4 == 0) stats[wn * BM + local] = sum;
            __syncthreads();
            sum = 0.0f;
            for (int w = 0; w < WN; w++) sum += stats[w * BM + local];
#endif
            if (row >= t.rows) continue;
            store_row(p, t, state, r, row, wn * COLUMNS + 2 * (lane % 4), sum);
            finite = finite && is_finite(state, r);
        }
        // Also the barrier between this run's last reads of shared memory and the next one's copies.
        if (__syncthreads_and(finite) && run == PLAIN) return;
        run = run == CLEAN ? UPWARD : run + 1;
    }
}
