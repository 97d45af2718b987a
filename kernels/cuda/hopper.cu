// Attention forward for Hopper, head dims up to 256. The host puts hopper_ptx.cu before this text.
//
// One producer warpgroup (one thread of it issues bulk tensor copies) and WGS consumer warpgroups
// of 64 query rows each. K and V pass through rings of STAGES tiles. A consumer issues the next
// tile's QK^T, then this tile's PV, and does the next tile's softmax while PV runs. Key tiles go
// from the last to the first, so that masked tiles of a causal problem come first.
//
// Shared memory: Q [PANELS][BM][64] (later O), K [STAGES][PANELS][BN][64], V likewise, all in the
// 128-byte swizzle; columns past D are zero.

// What the host defines: D head dim, BN keys a tile, WGS consumer warpgroups, STAGES,
// REGS_PRODUCER, REGS_CONSUMER; F16; and what follows, each off by default.
#ifndef RIGHT // keys after a row's position + right are hidden
#define RIGHT 0
#endif
#ifndef LEFT // keys before a row's position - left are hidden
#define LEFT 0
#endif
#ifndef MASK // 1 bf16, 2 f16, 3 f32: added to the scores; 4 bytes: nonzero attends
#define MASK 0
#endif
#ifndef CLASSES // a byte a tile: 0 skipped, 1 masked, 2 free of mask
#define CLASSES 0
#endif
#ifndef SCORE_MOD // softcap or ALiBi (or a scale that is not positive): scores are scaled first
#define SCORE_MOD 0
#endif
#ifndef VARLEN // packed sequences
#define VARLEN 0
#endif
#ifndef PINGPONG
#define PINGPONG (D <= 128)
#endif
#ifndef RESCALE_FIRST // rescale O before its product is issued, under QK^T
#define RESCALE_FIRST (D > 128)
#endif
#ifndef LAZY // rescale O only when a row's maximum has grown by more than 2^LAZY; 0: always
#define LAZY 0
#endif

#define BM (64 * WGS)
#define PANELS ((D + 63) / 64)
#define THREADS (128 * (WGS + 1))
#define LIST_CAP 1024

struct Params {
    int batch, heads, kv_group;      // kv_group: query heads for each key/value head
    int sq, sk;                      // the longest, if packed
    int q_off;                       // position of query row 0 among the keys
    int left, right;                 // keys before and after a position that are seen
    int tiles_m, tiles, section;     // query tiles; all tiles; heads that share the L2 cache
    int bottom_right;                // packed: each sequence's offset is its sk - sq
    float scale, scale_log2;         // scale * log2(e)
    float softcap;                   // 0: none
    float inv_scale;                 // 1 / scale
    const float* sinks;              // [heads] or null
    const float* slopes;             // [heads] or null (ALiBi)
    float* lse;                      // or null
    const void* mask;                // columns contiguous
    const u8* classes;               // [tiles_m, ceil(sk / BN)]
    const int* cu_q;                 // packed: [batch + 1]
    const int* cu_k;
    u16* o;                          // written directly where rows are packed or none is visible
    i64 o_strides[3];                // batch, head, row; in elements
    i64 lse_strides[2];              // batch, head
    i64 mask_strides[3];             // batch, head, row
};

#define NEG_INF __int_as_float(0xff800000)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

struct Tile {
    int b, h, m0;        // batch, head, first row
    int sq, sk, q_off;   // of the sequence
    int q_start, k_start;
    int lo, hi;          // key tiles [lo, hi)
};

DEV Tile tile_of(const Params& p, int index) {
    Tile t;
    int per = p.section * p.tiles_m;
    int s = index / per, r = index - s * per;
    int first = s * p.section;
    int in = min(p.section, p.batch * p.heads - first);
    int m = r / in;
    int bh = first + (r - m * in);
    t.b = bh / p.heads;
    t.h = bh - t.b * p.heads;
    t.m0 = (p.tiles_m - 1 - m) * BM;
#if VARLEN
    t.q_start = p.cu_q[t.b];
    t.k_start = p.cu_k[t.b];
    t.sq = p.cu_q[t.b + 1] - t.q_start;
    t.sk = p.cu_k[t.b + 1] - t.k_start;
    t.q_off = p.bottom_right ? t.sk - t.sq : p.q_off;
#else
    t.q_start = t.k_start = 0;
    t.sq = p.sq;
    t.sk = p.sk;
    t.q_off = p.q_off;
#endif
    t.lo = 0;
    t.hi = (t.sk + BN - 1) / BN;
    int last = min(t.m0 + BM, t.sq) - 1;
#if RIGHT
    int end = last + t.q_off + p.right + 1; // keys that the last row sees
    t.hi = min(t.hi, end <= 0 ? 0 : (end + BN - 1) / BN);
#endif
#if LEFT
    t.lo = max(0, (t.m0 + t.q_off - p.left) / BN);
#endif
    if (t.m0 >= t.sq) t.hi = t.lo;
    return t;
}

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

struct Ring {
    int stage;
    u32 phase;
    DEV_MEMBER void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

#define TILE_BYTES (PANELS * BN * 128)
#define Q_BYTES (PANELS * BM * 128)

struct Shared {
    u64 q_full, q_empty;
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
#if CLASSES
    int list_len;
    u16 list[LIST_CAP]; // tile | 0x8000 if masked
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
              const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_o,
              const __grid_constant__ Params p) {
    extern __shared__ u8 raw[];
    u32 base = (smem_u32(raw) + 1023) & ~1023u;
    u8* raw_aligned = raw + (base - smem_u32(raw));
    const u32 sm_q = base, sm_k = base + Q_BYTES, sm_v = sm_k + STAGES * TILE_BYTES;
    Shared* sh = (Shared*)(raw_aligned + Q_BYTES + 2 * STAGES * TILE_BYTES);
    const u32 q_full = smem_u32(&sh->q_full), q_empty = smem_u32(&sh->q_empty);
    const u32 k_full = smem_u32(sh->k_full), k_empty = smem_u32(sh->k_empty);
    const u32 v_full = smem_u32(sh->v_full), v_empty = smem_u32(sh->v_empty);

    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        prefetch_map(&map_q);
        prefetch_map(&map_k);
        prefetch_map(&map_v);
        prefetch_map(&map_o);
        bar_init(q_full, 1);
        bar_init(q_empty, WGS);
        for (int s = 0; s < STAGES; s++) {
            bar_init(k_full + 8 * s, 1);
            bar_init(v_full + 8 * s, 1);
            bar_init(k_empty + 8 * s, 4 * WGS);
            bar_init(v_empty + 8 * s, 4 * WGS);
        }
        bar_init_fence();
    }
    __syncthreads();

    if (group == 0) {
        // ---- producer ----
        regs_give<REGS_PRODUCER>();
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            Ring rk = {0, 1}, rv = {0, 1};
            u32 q_phase = 1;
            for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
                const Tile t = tile_of(p, index);
                const int kv_head = t.h / p.kv_group;
                const int kv_batch = VARLEN ? 0 : t.b;
                int n = t.hi - t.lo;
                auto load = [&](const TensorMap* map, u32 dst, u32 full, int tile) {
                    bar_expect(full, TILE_BYTES);
#pragma unroll
                    for (int c = 0; c < PANELS; c++)
                        tma_load(dst + c * BN * 128, map, full, c * 64, t.k_start + tile * BN,
                                 kv_head, kv_batch);
                };
                auto load_q = [&]() {
                    bar_expect(q_full, Q_BYTES);
#pragma unroll
                    for (int c = 0; c < PANELS; c++)
                        tma_load(sm_q + c * BM * 128, &map_q, q_full, c * 64, t.q_start + t.m0,
                                 t.h, kv_batch);
                };
#if CLASSES
                bar_wait(q_empty, q_phase);
                q_phase ^= 1;
                int len = 0;
                const u8* row = p.classes + (i64)(t.m0 / BM) * ((p.sk + BN - 1) / BN);
                for (int at = t.hi - 1; at >= t.lo; at -= 32) {
                    int tile = at - lane;
                    u32 c = tile >= t.lo ? row[tile] : 0;
                    u32 some = __ballot_sync(~0u, c != 0);
                    if (c != 0) {
                        int slot = len + __popc(some & ((1u << lane) - 1));
                        sh->list[slot] = (u16)(tile | (c == 1 ? 0x8000 : 0));
                    }
                    len += __popc(some);
                }
                if (lane == 0) sh->list_len = len;
                __syncwarp();
                n = len;
                if (lane == 0) {
                    if (n > 0) load_q();
                    else bar_arrive(q_full);
                }
#define TILE_AT(i) (sh->list[i] & 0x7fff)
#else
                if (n <= 0) continue;
#define TILE_AT(i) (t.hi - 1 - (i))
#endif
                if (lane == 0) {
                    for (int i = 0; i <= n && n > 0; i++) {
                        if (i < n) {
                            bar_wait(k_empty + 8 * rk.stage, rk.phase);
                            load(&map_k, sm_k + rk.stage * TILE_BYTES, k_full + 8 * rk.stage,
                                 TILE_AT(i));
                            rk.next();
                        }
#if !CLASSES
                        if (i == 0) {
                            bar_wait(q_empty, q_phase);
                            q_phase ^= 1;
                            load_q();
                        }
#endif
                        if (i > 0) {
                            bar_wait(v_empty + 8 * rv.stage, rv.phase);
                            load(&map_v, sm_v + rv.stage * TILE_BYTES, v_full + 8 * rv.stage,
                                 TILE_AT(i - 1));
                            rv.next();
                        }
                    }
                }
                __syncwarp();
            }
        }
        return;
    }

    // ---- consumers ----
    regs_take<REGS_CONSUMER>();
    const int wg = group - 1;
    const int tid = threadIdx.x - 128 * group;
    const int lane = tid & 31;
    const bool signal = lane == 0;
    const u32 own_q = sm_q + wg * 64 * 128;
    const u64 desc_q = smem_desc(own_q, 16);
    const u64 desc_k = smem_desc(sm_k, 16);
    const u64 desc_v = smem_desc(sm_v, BN * 128);
    const int row_in = wg * 64 + (tid >> 5) * 16 + (lane >> 2); // and + 8
    const int col_in = 2 * (lane & 3);
#if SCORE_MOD
    const float sc = 1.0f; // scores are in log2 units already
#else
    const float sc = p.scale_log2;
#endif
    Ring rk = {0, 0}, rv = {0, 0};
    u32 q_phase = 0;
#if PINGPONG
    if (wg == WGS - 1) named_arrive(1, 256);
#endif

    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const Tile t = tile_of(p, index);
        int n = t.hi - t.lo;
#if CLASSES
        bar_wait(q_full, q_phase);
        q_phase ^= 1;
        n = sh->list_len;
#endif
        u16* o_rows = p.o + (i64)(VARLEN ? 0 : t.b) * p.o_strides[0] + (i64)t.h * p.o_strides[1] +
                      (i64)t.q_start * p.o_strides[2];
        float* lse_rows = p.lse + (i64)(VARLEN ? 0 : t.b) * p.lse_strides[0] +
                          (i64)t.h * p.lse_strides[1] + t.q_start;
        if (n <= 0) {
            // No key is visible to any row.
            for (int i = tid; i < 64 * (D / 8); i += 128) {
                int r = t.m0 + wg * 64 + i / (D / 8);
                if (r < t.sq)
                    *(uint4*)(o_rows + r * p.o_strides[2] + i % (D / 8) * 8) =
                        make_uint4(0, 0, 0, 0);
            }
            int r = t.m0 + wg * 64 + tid;
            if (p.lse && tid < 64 && r < t.sq) {
                float s = p.sinks ? p.sinks[t.h] : NEG_INF;
                lse_rows[r] = s;
            }
#if CLASSES
            if (tid == 0) bar_arrive(q_empty);
#endif
            continue;
        }

        float o[D / 2];
        float s[BN / 2];
        u32 pr[BN / 4];
        float m[2] = {NEG_INF, NEG_INF}, l[2] = {0.0f, 0.0f}, alpha[2] = {1.0f, 1.0f};
        const int row0 = t.m0 + row_in;
#if SCORE_MOD
        const float slope = p.slopes ? p.slopes[t.h] * LOG2E : 0.0f;
        const float cap_in = p.softcap != 0.0f ? 2.0f * LOG2E * p.scale / p.softcap : 0.0f;
        const float cap_out = p.softcap * LOG2E;
#endif
#if MASK
        const i64 mask_base = (i64)t.b * p.mask_strides[0] + (i64)t.h * p.mask_strides[1] +
                              (i64)t.q_start * p.mask_strides[2];
#endif

        auto issue_qk = [&](int stage) {
            const u64 kd = desc_k + (u64)(stage * (TILE_BYTES >> 4));
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                const int at = (k / 4), in = (k % 4) * 2;
                wgmma_ss<BN, 0>(s, desc_q + (u64)(at * (BM * 8) + in),
                                kd + (u64)(at * (BN * 8) + in), k > 0);
            }
        };
        auto issue_pv = [&](int stage, bool first) {
            const u64 vd = desc_v + (u64)(stage * (TILE_BYTES >> 4));
#pragma unroll
            for (int k = 0; k < BN / 16; k++)
                wgmma_rs<D>(o, pr[4 * k], pr[4 * k + 1], pr[4 * k + 2], pr[4 * k + 3],
                            vd + (u64)(k * 128), k > 0 || !first);
        };
        // What happens to scores before the softmax, for key tile `tile`.
        auto modify = [&](int tile, bool masked) {
            const int c0 = tile * BN + col_in;
#if SCORE_MOD
#pragma unroll
            for (int j = 0; j < BN / 2; j++) {
                float x = s[j];
                if (p.softcap != 0.0f) {
                    // c tanh(x scale / c) in log2 units
                    float e = exp2_fast(x * cap_in);
                    x = cap_out - 2.0f * cap_out * rcp_fast(e + 1.0f);
                } else {
                    x = x * p.scale_log2;
                }
                if (p.slopes) {
                    int col = c0 + 8 * (j / 4) + (j & 1);
                    int pos = row0 + ((j >> 1) & 1) * 8 + t.q_off;
                    x -= slope * fabsf((float)(pos - col));
                }
                s[j] = x;
            }
#endif
            if (!masked) return;
#if MASK
#if SCORE_MOD
            const float unit = LOG2E;
#else
            const float unit = p.inv_scale;
#endif
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = min(row0 + 8 * half, t.sq - 1);
                const i64 at = mask_base + (i64)r * p.mask_strides[2] + c0;
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int col = 8 * j + e;
                        float& x = s[4 * j + 2 * half + e];
                        if (c0 + col < t.sk) {
#if MASK == 4
                            if (!((const u8*)p.mask)[at + col]) x = NEG_INF;
#else
#if MASK == 1
                            float v = bf16_to_f32(((const u16*)p.mask)[at + col]);
#elif MASK == 2
                            float v = f16_to_f32(((const u16*)p.mask)[at + col]);
#else
                            float v = ((const float*)p.mask)[at + col];
#endif
                            x += v == NEG_INF ? v : fmaxf(v * unit, -3.0e38f);
#endif
                        }
                    }
                }
            }
#endif
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int last = t.sk - 1;
#if RIGHT
                last = min(last, row0 + 8 * half + t.q_off + p.right);
#endif
                last -= c0;
#if LEFT
                const int first = row0 + 8 * half + t.q_off - p.left - c0;
#endif
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& x = s[4 * j + 2 * half + e];
                        bool keep = 8 * j + e <= last;
#if LEFT
                        keep = keep && 8 * j + e >= first;
#endif
                        x = keep ? x : NEG_INF;
                    }
                }
            }
        };
        // Scores to weights; m, l and alpha follow.
        auto softmax = [&](bool masked) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float a = s[2 * half], b = s[2 * half + 1];
#pragma unroll
                for (int j = 1; j < BN / 8; j++) {
                    a = fmaxf(a, s[4 * j + 2 * half]);
                    b = fmaxf(b, s[4 * j + 2 * half + 1]);
                }
                a = fmaxf(a, b);
                a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
                a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
                const float old = m[half];
#if LAZY
                const float grown = (a - old) * sc > (float)LAZY ? a : old;
                const float now = grown;
#else
                const float now = fmaxf(old, a);
#endif
                m[half] = now;
                float off = now * sc;
                if (masked) {
                    off = now == NEG_INF ? 0.0f : off;
                    alpha[half] = exp2_fast(old * sc - off);
                } else {
                    alpha[half] = exp2_fast((old - now) * sc);
                }
#if MASK && MASK != 4
                // A mask of huge finite values: the fused product would lose the difference.
                if (__any_sync(~0u, fabsf(off) > 4096.0f)) {
                    const float mm = now == NEG_INF ? 0.0f : now;
#pragma unroll
                    for (int j = 0; j < BN / 8; j++) {
                        s[4 * j + 2 * half] = (s[4 * j + 2 * half] - mm) * sc;
                        s[4 * j + 2 * half + 1] = (s[4 * j + 2 * half + 1] - mm) * sc;
                    }
                } else
#endif
                {
#pragma unroll
                    for (int j = 0; j < BN / 8; j++) {
                        s[4 * j + 2 * half] = __fmaf_rn(s[4 * j + 2 * half], sc, -off);
                        s[4 * j + 2 * half + 1] =
                            __fmaf_rn(s[4 * j + 2 * half + 1], sc, -off);
                    }
                }
                float x = 0.0f, y = 0.0f;
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    s[4 * j + 2 * half] = exp2_fast(s[4 * j + 2 * half]);
                    s[4 * j + 2 * half + 1] = exp2_fast(s[4 * j + 2 * half + 1]);
                    x += s[4 * j + 2 * half];
                    y += s[4 * j + 2 * half + 1];
                }
                l[half] = l[half] * alpha[half] + (x + y);
            }
        };
        auto pack = [&]() {
#pragma unroll
            for (int c = 0; c < BN / 16; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    pr[4 * c + i] = pack2(s[8 * c + 2 * i], s[8 * c + 2 * i + 1]);
            }
        };
        auto rescale = [&]() {
#if LAZY
            if (!__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#endif
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                o[4 * j] *= alpha[0];
                o[4 * j + 1] *= alpha[0];
                o[4 * j + 2] *= alpha[1];
                o[4 * j + 3] *= alpha[1];
            }
        };

        // The first tile.
#if CLASSES
        int entry = sh->list[0];
        const int tile0 = entry & 0x7fff;
#else
        const int tile0 = t.hi - 1;
        bar_wait(q_full, q_phase);
        q_phase ^= 1;
#endif
        bar_wait(k_full + 8 * rk.stage, rk.phase);
        wgmma_fence();
        issue_qk(rk.stage);
        wgmma_commit();
        wgmma_wait<0>();
        pin(s);
        if (signal) bar_arrive(k_empty + 8 * rk.stage);
        rk.next();
#pragma unroll
        for (int j = 0; j < D / 2; j++) o[j] = 0.0f;
        modify(tile0, true);
        softmax(true);
        pack();

        // Issues QK^T of `tile` and PV of the tile before it, and does the softmax of `tile`.
        auto step = [&](int tile, auto masked) {
            bar_wait(k_full + 8 * rk.stage, rk.phase);
#if PINGPONG
            named_sync(1 + wg, 256);
#endif
            wgmma_fence();
            issue_qk(rk.stage);
            wgmma_commit();
#if RESCALE_FIRST
            rescale();
#endif
            bar_wait(v_full + 8 * rv.stage, rv.phase);
            wgmma_fence();
            issue_pv(rv.stage, false);
            wgmma_commit();
#if PINGPONG
            named_arrive(1 + (wg + 1) % WGS, 256);
#endif
            wgmma_wait<1>();
            pin(s);
            if (signal) bar_arrive(k_empty + 8 * rk.stage);
            rk.next();
            modify(tile, masked.value);
            softmax(masked.value);
            pin(s);
            after(l[0] + l[1]);
            wgmma_wait<0>();
            pin(s);
            pin(o);
            if (signal) bar_arrive(v_empty + 8 * rv.stage);
            rv.next();
            pack();
#if !RESCALE_FIRST
            rescale();
#endif
        };
#if CLASSES
        for (int i = 1; i < n; i++) {
            entry = sh->list[i];
            if (entry & 0x8000) step(entry & 0x7fff, Yes());
            else step(entry, No());
        }
#elif MASK
        for (int tile = t.hi - 2; tile >= t.lo; tile--) step(tile, Yes());
#else
        int tile = t.hi - 2;
        // Tiles from free_hi on hide keys from some row; so do those before free_lo.
#if RIGHT
        const int free_hi = (t.m0 + wg * 64 + t.q_off + p.right + 1) / BN;
        for (; tile >= max(t.lo, free_hi); tile--) step(tile, Yes());
#endif
#if LEFT
        const int past = min(t.m0 + wg * 64 + 64, t.sq) - 1 + t.q_off - p.left;
        const int free_lo = max(t.lo, past <= 0 ? 0 : (past + BN - 1) / BN);
#else
        const int free_lo = t.lo;
#endif
#pragma unroll 1
        for (; tile >= free_lo; tile--) step(tile, No());
#if LEFT
        for (; tile >= t.lo; tile--) step(tile, Yes());
#endif
#endif
#if RESCALE_FIRST
        rescale();
#endif
        bar_wait(v_full + 8 * rv.stage, rv.phase);
        wgmma_fence();
        issue_pv(rv.stage, false);
        wgmma_commit();

        float inv[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = l[half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            float top = m[half] * sc, f = 1.0f;
            if (p.sinks) {
                const float sink = p.sinks[t.h] * LOG2E;
                const float now = fmaxf(top, sink);
                f = top == NEG_INF ? 0.0f : exp2_fast(top - now);
                sum = sum * f + exp2_fast(sink - now);
                top = now;
            }
            inv[half] = sum > 0.0f ? f / sum : 0.0f;
            const int r = row0 + 8 * half;
            if (p.lse && (lane & 3) == 0 && r < t.sq)
                lse_rows[r] = sum > 0.0f ? (top + log2_fast(sum)) * LN2 : NEG_INF;
        }
        wgmma_wait<0>();
        pin(o);
        if (signal) bar_arrive(v_empty + 8 * rv.stage);
        rv.next();

        // O takes Q's place: every warp of this group has read its rows of Q.
        named_sync(8 + wg, 128);
        {
            const int r = (tid >> 5) * 16 + (lane & 15); // of the group's 64
            const u32 at = own_q + r * 128;
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                const int chunk = (c & 3) * 2 + (lane >> 4);
                stmatrix4(at + (c / 4) * BM * 128 + ((chunk ^ (r & 7)) << 4),
                          pack2(o[8 * c] * inv[0], o[8 * c + 1] * inv[0]),
                          pack2(o[8 * c + 2] * inv[1], o[8 * c + 3] * inv[1]),
                          pack2(o[8 * c + 4] * inv[0], o[8 * c + 5] * inv[0]),
                          pack2(o[8 * c + 6] * inv[1], o[8 * c + 7] * inv[1]));
            }
        }
#if VARLEN
        named_sync(8 + wg, 128);
        for (int i = tid; i < 64 * (D / 8); i += 128) {
            const int r = i / (D / 8), c = i % (D / 8);
            if (t.m0 + wg * 64 + r < t.sq)
                *(uint4*)(o_rows + (i64)(t.m0 + wg * 64 + r) * p.o_strides[2] + c * 8) =
                    *(const uint4*)(raw_aligned + wg * 64 * 128 + (c / 8) * BM * 128 + r * 128 +
                                    (((c & 7) ^ (r & 7)) << 4));
        }
        named_sync(8 + wg, 128);
        if (tid == 0) bar_arrive(q_empty);
#else
        fence_async_smem();
        named_sync(8 + wg, 128);
        if (tid == 0) {
            if (t.m0 + wg * 64 < t.sq) {
#pragma unroll
                for (int c = 0; c < PANELS; c++)
                    tma_store(&map_o, own_q + c * BM * 128, c * 64, t.m0 + wg * 64, t.h, t.b);
            }
            tma_store_wait_read();
            bar_arrive(q_empty);
        }
#endif
    }
}
