// Attention in f32 without tensor cores, for head dims for which those of tf32.cu would not have the registers. 128
// threads: 16 groups of rows by 8 of columns; a thread has BM / 16 rows, every 8th key in Q K^T, and 4 of every 32 columns
// in P V. Products are summed in runs of at most 32, runs one after another.
//
// Macros: D, BM and BN (multiples of 16), KV_F16, PACK = 0, PAGED, and MASK, SOFTCAP and ALIBI: all 1, or all 0.

#define THREADS 128
#define STRIDE (D + 4) // of a row in shared memory, so that the 8 columns' reads meet no bank twice
#define P_STRIDE (BN + 4)
#define ROWS (BM / 16)
#define KEYS (BN / 8)
#define RUNS ((D + 31) / 32)

#if KV_F16
typedef u16 KvElement;
#else
typedef float KvElement;
#endif

// Copies N rows from `first` on to shared memory; zeros from row `end` on.
template <int N, typename Rows> DEV void load(float* to, const Rows& from, int first, int end, bool vector) {
    const Rows tile = from.from(first);
    const int there = end - first;
    if constexpr (sizeof(*from.first) == 4) {
        if (vector) {
            for (int i = threadIdx.x; i < N * (D / 4); i += THREADS) {
                const int row = i / (D / 4), column = 4 * (i % (D / 4));
                const bool in = row < there;
                copy16(shared_address(to + row * STRIDE + column), in ? tile.at(row) + column : from.first, in);
            }
        } else {
            for (int i = threadIdx.x; i < N * D; i += THREADS) {
                const int row = i / D, column = i % D;
                const bool in = row < there;
                copy4(shared_address(to + row * STRIDE + column), in ? tile.at(row) + column : from.first, in);
            }
        }
    } else {
        for (int i = threadIdx.x; i < N * D; i += THREADS) {
            const int row = i / D, column = i % D;
            to[row * STRIDE + column] = row < there ? f16_to_f32(tile.at(row)[column]) : 0.0f;
        }
    }
    copies_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) float shared[];
    // A run over the threadblock's rows; gives whether they are finite. The first is compiled apart from the others.
    auto rows = [&](auto, const int run) {
        const Tile t = tile_of(p, opaque(blockIdx.x));
        if (t.m0 >= t.sq) return true;

        float* sm_q = shared;
        float* sm_kv = sm_q + BM * STRIDE;
        float* sm_p = sm_kv + BN * STRIDE;
        const HeadRows<float> q = q_rows<float>(p, t);
        const KvRows<KvElement> k = kv_rows<KvElement>(p, t, p.k, p.k_strides);
        const KvRows<KvElement> v = kv_rows<KvElement>(p, t, p.v, p.v_strides);
        const bool vector = p.vector & 1;
        const int group = threadIdx.x / 8, column = threadIdx.x % 8;
        const int local = group * ROWS, row0 = t.m0 + local;

        float o[ROWS][RUNS][4], m[ROWS], sum[ROWS];
        int first[ROWS], end[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < 4 * RUNS; i++) o[r][i / 4][i % 4] = 0.0f;
            m[r] = NEG_INF;
            sum[r] = 0.0f;
            first[r] = first_key(p, t, row0 + r);
            end[r] = end_key(p, t, row0 + r);
        }

        Walk<1> walk(p, t, t.lo);
        if (run == PLAIN && walk.at < walk.end) load<BM>(sm_q, q, t.m0, t.sq, vector);
        for (; walk.at < walk.end; walk.next(p, t)) {
            const int k0 = walk.at * BN;
            load<BN>(sm_kv, k, k0, t.sk, vector);
            copies_wait<0>();
            __syncthreads();

            float s[ROWS][KEYS];
#pragma unroll
            for (int i = 0; i < ROWS * KEYS; i++) s[i / KEYS][i % KEYS] = 0.0f;
#pragma unroll 1
            for (int d0 = 0; d0 < D; d0 += 32) {
                float part[ROWS][KEYS];
#pragma unroll
                for (int i = 0; i < ROWS * KEYS; i++) part[i / KEYS][i % KEYS] = 0.0f;
#pragma unroll
                for (int d = 0; d < 32; d += 4) {
                    if (D % 32 != 0 && d0 + d >= D) break;
                    float4 b[KEYS];
#pragma unroll
                    for (int j = 0; j < KEYS; j++) b[j] = *(const float4*)(sm_kv + (column + 8 * j) * STRIDE + d0 + d);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        const float4 a = *(const float4*)(sm_q + (local + r) * STRIDE + d0 + d);
#pragma unroll
                        for (int j = 0; j < KEYS; j++)
                            part[r][j] += a.x * b[j].x + a.y * b[j].y + (a.z * b[j].z + a.w * b[j].w);
                    }
                }
#pragma unroll
                for (int i = 0; i < ROWS * KEYS; i++) s[i / KEYS][i % KEYS] += part[i / KEYS][i % KEYS];
            }

#if MASK || SOFTCAP || ALIBI
            const bool masked = p.mask && !walk.is_plain();
#endif
            float factor[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float highest = m[r];
#pragma unroll
                for (int j = 0; j < KEYS; j++) s[r][j] = score_scaled(s[r][j], p.scale);
#if MASK || SOFTCAP || ALIBI
                int rows[KEYS], keys[KEYS];
#pragma unroll
                for (int j = 0; j < KEYS; j++) {
                    rows[j] = row0 + r;
                    keys[j] = k0 + column + 8 * j;
                }
                bias(s[r], p, t, masked, rows, keys);
#endif
#pragma unroll
                for (int j = 0; j < KEYS; j++) {
                    const int key = k0 + column + 8 * j;
                    if (key < first[r] || key >= end[r]) s[r][j] = NEG_INF;
                    highest = fmaxf(highest, s[r][j]);
                }
#pragma unroll
                for (int lane = 1; lane < 8; lane *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, lane));
                const float subtract = finite_max(highest);
                factor[r] = run >= UPWARD ? 1.0f : expf(m[r] - subtract);
                m[r] = highest;
                float tile_sum = 0.0f;
#pragma unroll
                for (int j = 0; j < KEYS; j++) {
                    const float weight = run >= UPWARD ? presence(s[r][j]) : expf(s[r][j] - subtract);
                    tile_sum += weight;
                    sm_p[(local + r) * P_STRIDE + column + 8 * j] = weight;
                }
                sum[r] = sum[r] * factor[r] + tile_sum;
            }
            __syncthreads(); // K has been read

            load<BN>(sm_kv, v, k0, t.sk, vector);
            copies_wait<0>();
            __syncthreads();
            if (run != PLAIN) {
                for (int i = threadIdx.x; i < BN * STRIDE; i += THREADS) sm_kv[i] = cleaned(sm_kv[i], run);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < RUNS; i++) {
                const int c = 32 * i + 4 * column;
                if (D % 32 != 0 && c >= D) continue;
                float part[ROWS][4];
#pragma unroll
                for (int j = 0; j < 4 * ROWS; j++) part[j / 4][j % 4] = 0.0f;
#pragma unroll
                for (int key = 0; key < BN; key++) {
                    const float4 b = *(const float4*)(sm_kv + key * STRIDE + c);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        const float weight = sm_p[(local + r) * P_STRIDE + key];
                        part[r][0] += weight * b.x;
                        part[r][1] += weight * b.y;
                        part[r][2] += weight * b.z;
                        part[r][3] += weight * b.w;
                    }
                }
#pragma unroll
                for (int j = 0; j < 4 * ROWS; j++) {
                    float& x = o[j / 4][i][j % 4];
                    x = x * factor[j / 4] + part[j / 4][j % 4];
                }
            }
            __syncthreads(); // V and the weights have been read
        }

        bool finite = true;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2) sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], lane);
            const int row = row0 + r;
            if (row >= t.sq) continue;
            const Finish f = finish(m[r], sum[r], p.sinks, t.h);
            const bool partial = p.splits > 1;
            float* out = partial ? partial_values(p, result_row(p, t, row), t.split) : (float*)p.o + o_offset(p, t, row);
            const float times = partial ? 1.0f : f.factor;
#pragma unroll
            for (int i = 0; i < 4 * RUNS; i++) {
                const int c = 32 * (i / 4) + 4 * column + i % 4;
                const float x = o[r][i / 4][i % 4];
                if (c >= D) continue;
                out[c] = run >= UPWARD ? counted(out[c], x, run) : x * times;
                finite = finite && x * 0.0f == 0.0f;
            }
            if (column != 0 || run >= UPWARD) continue;
            if (partial) *partial_stats(p, result_row(p, t, row), t.split) = make_float2(m[r], sum[r]);
            else store_lse(p, t, row, f.lse);
        }
        return __syncthreads_and(finite) != 0;
    };
    if (!rows(Yes(), PLAIN)) {
        for (int run = CLEAN; run != DONE; run = run == CLEAN ? UPWARD : run + 1) rows(No(), run);
    }
    if (p.splits > 1) {
        const Tile t = tile_of(p, blockIdx.x);
        if (t.m0 < t.sq) merge<TYPE_F32>(p, t, min(t.sq - t.m0, BM));
    }
}
