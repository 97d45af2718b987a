// Attention of few query rows over many keys, in bf16 and f16 (Dao et al. 2023, Flash-Decoding). The memory's bandwidth
// bounds it: every warp walks key tiles of its own and has STAGES of them under way, and nothing in the loop waits for
// another warp. The rows of all heads of a group are in one tile, so that K and V are read once.
//
// Macros: D, BM = 16 * MT rows and BN keys a tile, WARPS, WN (warps that walk together, score the same keys and have
// D / WN columns of V each), KEYS = BN, STAGES, BLOCKS (threadblocks a processor), BF16, PACK = 1, PAGED, and those of
// mma_softmax.cu.

#define THREADS (32 * WARPS)
#define MT (BM / 16)
#define GROUPS (WARPS / WN)
#define TOGETHER (32 * WN)
#define TILE_BYTES (BN * ROW_BYTES)
#define RESULT_STRIDE (WIDTH + 8) // so that the rows of a quarter warp lie in different banks
// Fragments of Q stay in registers where there is room.
#define Q_HELD (MT == 1 && D <= 256)

// Waits until STAGES - 2 tiles at most are under way, and for the warps that walk together.
DEV void stage_wait(int group) {
    copies_wait<STAGES - 2>();
    if (WN == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(TOGETHER) : "memory");
}

DEV void group_barrier(int group) {
    if (WN == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(TOGETHER) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 raw[];
    wait_for_kernel_before();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / WN, wn = warp % WN;
    const int together = threadIdx.x % TOGETHER;
    const u32 sm_q = shared_address(raw), ring = sm_q + BM * ROW_BYTES + group * (2 * STAGES * TILE_BYTES);
    // After the loop the rings hold each group's results instead.
    float* results = (float*)(raw + BM * ROW_BYTES);
    __shared__ float2 stats[GROUPS][BM];
    const u32 at_q = a_at(sm_q, 0, 0), at_k = b_at(ring, 0, 0), at_v = a_at(ring + TILE_BYTES, 0, wn * COLUMNS);
    const float unit = score_unit(p);
    for (int run = PLAIN; run != DONE;) {
        const Tile t = tile_of(p, opaque(blockIdx.x));
        if (t.m0 >= t.rows) return;
        const int rows = min(t.rows - t.m0, BM);
        const HeadRows<u16> q = q_rows<u16>(p, t);
        const KvRows<u16> k = kv_rows<u16>(p, t, p.k, p.k_strides), v = kv_rows<u16>(p, t, p.v, p.v_strides);
        const bool vector = p.vector & 1;

        const auto fetch = [&](int stage, int tile) {
            const u32 to = ring + stage * (2 * TILE_BYTES);
            load<BN, TOGETHER>(to, k, tile * BN, t.sk, vector, together);
            load<BN, TOGETHER>(to + TILE_BYTES, v, tile * BN, t.sk, vector, together);
        };
        if (run == PLAIN) load_q<THREADS>(sm_q, q, p, t, vector, threadIdx.x);
        copies_commit();
        Walk<GROUPS> ahead(p, t, t.lo + group), walk = ahead;
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; stage++) {
            if (ahead.at < ahead.end) {
                fetch(stage, ahead.at);
                ahead.next(p, t);
            }
            copies_commit();
        }
        copies_wait<STAGES - 1>(); // for Q, which was first
        __syncthreads();
        u32 held[Q_HELD ? MT : 1][Q_HELD ? WIDTH / 16 : 1][4];
        if (Q_HELD) {
#pragma unroll
            for (int i = 0; i < MT * (WIDTH / 16); i++)
                ldmatrix4(held[Q_HELD ? i / (WIDTH / 16) : 0][Q_HELD ? i % (WIDTH / 16) : 0],
                          further(at_q, 16 * (i / (WIDTH / 16)), i % (WIDTH / 16)));
        }

        State state[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) start(state[m]);

        for (int stage = 0; walk.at < walk.end; walk.next(p, t), stage = stage + 1 == STAGES ? 0 : stage + 1) {
            stage_wait(group);
            // The stage before this one has been read.
            if (ahead.at < ahead.end) {
                fetch(stage == 0 ? STAGES - 1 : stage - 1, ahead.at);
                ahead.next(p, t);
            }
            copies_commit();
            const int k0 = walk.at * BN;
            const u32 offset = stage * (2 * TILE_BYTES);
            if (run != PLAIN) {
                clean_halves<!BF16>(raw + (ring - sm_q) + offset + TILE_BYTES, TILE_BYTES, together, TOGETHER, run);
                group_barrier(group);
            }

            float s[MT][KEYS / 8][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
                for (int i = 0; i < KEYS / 2; i++) s[m][i / 4][i % 4] = 0.0f;
#pragma unroll
            for (int d = 0; d < WIDTH / 16; d++) {
                u32 a[MT][4];
                if (!Q_HELD) {
#pragma unroll
                    for (int m = 0; m < MT; m++) ldmatrix4(a[m], further(at_q, 16 * m, d));
                }
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    u32 b[4];
                    ldmatrix4(b, further(at_k + offset, 16 * n, d));
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        const u32 (&from)[4] = Q_HELD ? held[Q_HELD ? m : 0][Q_HELD ? d : 0] : a[m];
                        mma(s[m][2 * n], from, b[0], b[1]);
                        mma(s[m][2 * n + 1], from, b[2], b[3]);
                    }
                }
            }
            const bool masked = p.mask && !walk.is_plain();
            const bool edge = k0 < t.free_lo || t.free_hi - k0 < BN;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const int row = t.m0 + 16 * m + lane / 4, key = k0 + 2 * (lane % 4);
                float highest[2];
                // Under a mask every tile is limited, so that hidden rows are told from those that overflowed.
                to_scores(s[m], highest, p, t, masked, p.mask, edge, row, key, run);
                if (run >= UPWARD) {
                    to_presence(s[m]);
                    continue;
                }
                highest[0] = quad_max(highest[0]);
                highest[1] = quad_max(highest[1]);
                to_weights(s[m], state[m], highest, unit, run);
            }
#pragma unroll
            for (int c = 0; c < BN / 16; c++) {
                u32 a[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) pack_weights(a[m], s[m], c);
#pragma unroll
                for (int n = 0; n < COLUMNS / 16; n++) {
                    u32 b[4];
                    ldmatrix4_trans(b, further(at_v + offset, 16 * c, n));
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma(state[m].o[2 * n], a[m], b[0], b[1]);
                        mma(state[m].o[2 * n + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }

        bool finite = true;
        copies_wait<0>();
        __syncthreads(); // the rings have been read
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = 16 * m + 8 * r + lane / 4;
                const float sum = quad_sum(state[m].sum[r]);
                if (row >= rows) continue;
                if (wn == 0 && lane % 4 == 0) stats[group][row] = make_float2(state[m].m[r], sum);
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++) {
                    const int column = wn * COLUMNS + 8 * n + 2 * (lane % 4);
                    *(float2*)(results + (group * BM + row) * RESULT_STRIDE + column) = make_float2(state[m].o[n][2 * r], state[m].o[n][2 * r + 1]);
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * (D / 4); i += THREADS) {
            const int local = i / (D / 4), column = 4 * (i % (D / 4)), row = t.m0 + local;
            float m = NEG_INF, sum = 0.0f;
#pragma unroll
            for (int g = 0; g < GROUPS; g++) m = fmaxf(m, stats[g][local].x);
            float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const float2 of = stats[g][local];
                const float factor = run >= UPWARD ? 1.0f : exp2_fast((of.x - finite_max(m)) * unit);
                const float4 x = *(const float4*)(results + (g * BM + local) * RESULT_STRIDE + column);
                sum += factor * of.y;
                o.x += weighted(x.x, factor);
                o.y += weighted(x.y, factor);
                o.z += weighted(x.z, factor);
                o.w += weighted(x.w, factor);
            }
            finite = finite && o.x * 0.0f + o.y * 0.0f + o.z * 0.0f + o.w * 0.0f == 0.0f && !lost(p, t, row, m, !p.mask, run);
            const float in_natural = m == NEG_INF ? m : natural(p, m);
            float* partial = partial_values(p, result_row(p, t, row), t.split) + column;
            u16* out = (u16*)p.o + o_offset(p, t, row) + column;
            if (run >= UPWARD) {
                const float count[4] = {o.x, o.y, o.z, o.w};
                for (int c = 0; c < 4; c++) {
                    if (p.splits > 1) partial[c] = counted(partial[c], count[c], run);
                    else if (count[c] > 0.0f) out[c] = ROUND(counted(element<ELEMENT>(out, c), count[c], run));
                }
            } else if (p.splits > 1) {
                *(float4*)partial = o;
                if (column == 0) *partial_stats(p, result_row(p, t, row), t.split) = make_float2(in_natural, sum);
            } else {
                const Finish f = finish(in_natural, sum, p.sinks, head_of(p, t, row));
                o = make_float4(o.x * f.factor, o.y * f.factor, o.z * f.factor, o.w * f.factor);
                store4<ELEMENT>(out, 0, o, p.vector & 2);
                if (column == 0) store_lse(p, t, row, f.lse);
            }
        }
        // Also the barrier between this run's last reads of shared memory and the next one's copies.
        if (__syncthreads_and(finite) && run == PLAIN) break;
        run = run == CLEAN ? UPWARD : run + 1;
    }
    if (p.splits > 1) {
        const Tile t = tile_of(p, blockIdx.x);
        merge<ELEMENT>(p, t, min(t.rows - t.m0, BM));
    }
}
