// Attention forward for Hopper at head dim 512. The host puts before this text what hopper.cu
// has before it.
//
// A cluster of two CTAs takes 128 query rows, 64 each, and reads every key tile once: each CTA
// issues every other copy, to both. In a CTA the first consumer warpgroup computes the scores, the
// softmax and columns 0 to 255 of O; the second computes columns 256 to 511 from weights that the
// first puts in shared memory. A tile of K is eight slots of 8 KB, 64 keys x 64 columns each; a tile
// of V eight slots of 16 keys x 256 columns, left and right half in turn. A slot is filled again as
// soon as both CTAs have read it.
//
// Shared memory: Q [8][64][64] (later O), K, V, the weights [PBUF][64][64], barriers.
//
// The host gives D = 512, BN = 64, WGS = 2 (BM = 128 is of a cluster) and options; arguments, section,
// left and right as hopper.cu has them, but that the map of V has five dims, (64, rows, 8, heads,
// batch), and a box of 64 columns, 16 rows and 4 of the third. Threads: 384; grid: 2 Params.tiles;
// dynamic shared bytes: 218,288, with CLASSES 220,368.

#define THREADS 384
#define SLOT_BYTES 8192
#define SLOTS 16 // K 0 to 7, V 8 to 15
#define Q_BYTES 65536
#define P_BYTES 8192
#ifndef PBUF
#define PBUF 2
#endif
#ifndef LAG // panels of QK^T in flight when one is released
#define LAG 1
#endif

// Named barriers.
#define BAR_FREE 1  // and + 1: weights were read
#define BAR_STORE 3 // and + 1: within a group

// Elements of O a thread that are saved to shared memory during the softmax of a run after the first, where
// registers are short.
#define PARKED 8

struct Shared {
    u64 q_full;
    u64 full[SLOTS], empty[SLOTS];
    u64 v_raw[8]; // as `full` of V, before it is cleaned
    u64 p_full[PBUF]; // weights and their factors are there
    u64 done;         // so are the last factors
    float alpha[PBUF][64];
    float inv[64];
    RunsNeeded needed; // the same in both CTAs
    float parked[PARKED][128];
#if CLASSES
    u64 list_full;
    int list_len, list_from[2], list_to[2];
    u16 list[LIST_CAP];
#endif
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
              const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_o,
              const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 raw[];
    const u32 sm_q = smem_u32(raw), ring = sm_q + Q_BYTES, sm_p = ring + SLOTS * SLOT_BYTES;
    Shared* sh = (Shared*)(raw + Q_BYTES + SLOTS * SLOT_BYTES + PBUF * P_BYTES);
    const u32 q_full = smem_u32(&sh->q_full);
    const u32 full = smem_u32(sh->full), empty = smem_u32(sh->empty), v_raw = smem_u32(sh->v_raw);
    const u32 p_full = smem_u32(sh->p_full), done = smem_u32(&sh->done);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int rank = blockIdx.x & 1;

    if (threadIdx.x == 0) {
        prefetch_map(&map_q);
        prefetch_map(&map_k);
        prefetch_map(&map_v);
        prefetch_map(&map_o);
        bar_init(q_full, 1);
        for (int s = 0; s < SLOTS; s++) {
            bar_init(full + 8 * s, 1);
            bar_init(empty + 8 * s, 8); // four warps of either CTA
        }
        for (int c = 0; c < 8; c++) bar_init(v_raw + 8 * c, 1);
        sh->needed = RunsNeeded{0, 0, 0};
        for (int b = 0; b < PBUF; b++) bar_init(p_full + 8 * b, 128);
        bar_init(done, 128);
#if CLASSES
        bar_init(smem_u32(&sh->list_full), 32);
#endif
        bar_init_fence();
    }
    cluster_sync();
    wait_for_kernel_before();

    const Tile t = tile_of(p, blockIdx.x / 2);
    const int m0 = t.m0 + rank * 64;
    int n = t.hi - t.lo;

    // Ends the cluster's run `run`. A CTA's shared memory must outlive the other's copies and arrivals.
    auto next_run = [&](int run) {
        __syncwarp();
        cluster_sync();
        return __shfl_sync(~0u, run_after(run, sh->needed), 0);
    };

    if (group == 0) {
        // ---- producer ----
        regs_give<40>();
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
        if (warp == 0) {
#if CLASSES
            n = list_tiles(sh->list, sh->list_from, sh->list_to, p, t, threadIdx.x);
            if (threadIdx.x == 0) sh->list_len = n;
            __syncwarp();
            bar_arrive(smem_u32(&sh->list_full));
#define TILE_AT(i) (sh->list[i] & 0x3ff)
#else
#define TILE_AT(i) (t.hi - 1 - (i))
#endif
            for (int run = PLAIN, turns = 0; run != DONE; run = next_run(run), turns++) {
                if (lane == 0 && n > 0) {
                    const KvHead kv = kv_head_of(p, t);
                    // Slot s for the tile of parity `phase`, which `there` waits for; the CTA whose turn it is
                    // issues the copy.
                    auto arm = [&](int s, u32 phase, u32 there) {
                        bar_wait(empty + 8 * s, phase ^ 1);
                        bar_expect(there, SLOT_BYTES);
                        return (s & 1) == rank;
                    };
                    const u32 v_there = run == PLAIN ? full + 64 : v_raw;
                    const int before = turns * n; // tiles of the runs before
                    auto load_k = [&](int i) {
                        const int row = kv.row(TILE_AT(i));
                        for (int c = 0; c < 8; c++) {
                            if (arm(c, (before + i) & 1, full + 8 * c))
                                tma_load_multicast(ring + c * SLOT_BYTES, &map_k, full + 8 * c, c * 64,
                                                   row, kv.head, kv.batch, 3);
                        }
                    };
                    // Rows 16 (c / 2) on of the left half (c even) or the right.
                    auto load_v = [&](int i) {
                        const int row = kv.row(TILE_AT(i));
                        for (int c = 0; c < 8; c++) {
                            if (arm(8 + c, (before + i) & 1, v_there + 8 * c))
                                tma_load5_multicast(ring + (8 + c) * SLOT_BYTES, &map_v,
                                                    v_there + 8 * c, 0, row + (c / 2) * 16,
                                                    (c & 1) * 4, kv.head, kv.batch, 3);
                        }
                    };
                    bar_expect(q_full, Q_BYTES);
                    for (int c = 0; c < 8; c++)
                        tma_load(sm_q + c * 8192, &map_q, q_full, c * 64, t.q_start + m0, t.h, batch_of_rows(p, t));
                    load_k(0);
                    for (int i = 0; i < n; i++) {
                        if (i + 1 < n) load_k(i + 1);
                        load_v(i);
                    }
                }
            }
            return;
        }
#if CLASSES
        bar_wait(smem_u32(&sh->list_full), 0);
        n = sh->list_len;
#endif
        int tiles = 0; // cleaned
        for (int run = PLAIN; run != DONE; run = next_run(run)) {
            if (warp > 1 || run == PLAIN) continue;
            // The second warp cleans V in runs after the first, between its copy and the consumers.
            for (int i = 0; i < n; i++, tiles++) {
                for (int c = 0; c < 8; c++) {
                    bar_wait(v_raw + 8 * c, tiles & 1);
                    u8* slot = raw + Q_BYTES + (8 + c) * SLOT_BYTES;
                    if (clean_halves<F16>(slot, SLOT_BYTES, lane, 32, run)) sh->needed.count = 1;
                    fence_async_smem();
                    __syncwarp();
                    if (lane == 0) bar_arrive(full + 8 * (8 + c));
                }
            }
        }
        return;
    }

    regs_take<232>();
    const int thread = threadIdx.x - 128 * group;
    const bool signal = (thread & 31) < 2; // a lane for each CTA
#if CLASSES
    bar_wait(smem_u32(&sh->list_full), 0);
    n = sh->list_len;
#endif
    auto release = [&](int s) {
        if (signal) bar_arrive_cluster(empty + 8 * s, thread & 1);
    };
    // V: 2,048 bytes to the next 64 columns.
    const u64 desc_k = smem_desc(ring, 16), desc_v = smem_desc(ring + 8 * SLOT_BYTES, 2048);
    int run = PLAIN;
    for (int turns = 0; run != DONE; run = next_run(run), turns++) {
        // Opaque, so that values computed from it are not kept in registers from run to run.
        int tid = thread;
        asm volatile("" : "+r"(tid));
        const int lane = tid & 31, warp = tid >> 5;
        if (run >= EXACT) {
            // The output of earlier runs is read again and merged into.
            if (tid == 0) tma_store_wait();
            named_sync(BAR_STORE + group - 1, 128);
        }
        const int before = turns * n; // tiles of the runs before
        float o[128];
#pragma unroll
        for (int j = 0; j < 128; j++) o[j] = 0.0f;
        auto rescale = [&](float a, float b) {
            if (!__any_sync(~0u, a != 1.0f || b != 1.0f)) return;
#pragma unroll
            for (int j = 0; j < 32; j++) {
                o[4 * j] *= a;
                o[4 * j + 1] *= a;
                o[4 * j + 2] *= b;
                o[4 * j + 3] *= b;
            }
        };
        float inv[2];
        bool over[2] = {false, false};
        // Waits for tile i's keys 16 c to 16 c + 15 in slot s of V.
        auto wait_v = [&](int s, int c, int i) {
            bar_wait(full + 8 * s, (before + i) & 1);
#if VARLEN
            if (i > 0 || t.hi * BN - t.sk <= 48 - 16 * c) return;
            clear_rows<4, 16>(raw + Q_BYTES + s * SLOT_BYTES, t.sk - (t.hi - 1) * BN - 16 * c, tid);
            fence_async_smem();
            named_sync(BAR_STORE + group - 1, 128);
#endif
        };

        if (n > 0 && group == 1) {
            // ---- scores, softmax, the left half ----
            const u64 desc_q = smem_desc(sm_q, 16);
            const float sc = score_unit(p);
            float s[32];
            Softmax soft = softmax_start();
            u32 pr[16];

            // QK^T of tile i; all slots but the last are released.
            auto issue_qk = [&](int i) {
                // Opaque, so that 64 descriptors are not kept in registers from tile to tile.
                u64 qd = desc_q, kd = desc_k;
                asm volatile("" : "+l"(qd), "+l"(kd));
#pragma unroll
                for (int c = 0; c < 8; c++) {
                    bar_wait(full + 8 * c, (before + i) & 1);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        wgmma_ss<64, 0>(s, qd + (u64)(c * 512 + 2 * k), kd + (u64)(c * 512 + 2 * k),
                                        c + k > 0);
                    wgmma_commit();
                    if (c >= LAG) {
                        wgmma_wait<LAG>();
                        release(c - LAG);
                    }
                }
            };
            // Weights and factors of tile i for the second group.
            auto hand_over = [&](int i) {
                const int b = (before + i) & (PBUF - 1);
                named_sync(BAR_FREE + b, 256);
                const int r = warp * 16 + (lane & 15);
                const u32 at = sm_p + b * P_BYTES + r * 128;
#pragma unroll
                for (int c = 0; c < 4; c++)
                    stmatrix4(at + (((2 * c + (lane >> 4)) ^ (r & 7)) << 4), pr[4 * c], pr[4 * c + 1],
                              pr[4 * c + 2], pr[4 * c + 3]);
                if ((lane & 3) == 0) {
                    sh->alpha[b][warp * 16 + (lane >> 2)] = soft.alpha[0];
                    sh->alpha[b][warp * 16 + (lane >> 2) + 8] = soft.alpha[1];
                }
                fence_async_smem();
            };
            auto pack = [&]() {
#pragma unroll
                for (int c = 0; c < 16; c++) pr[c] = pack2(s[2 * c], s[2 * c + 1]);
            };
            auto scores = [&](int i) {
#if CLASSES
                const int entry = sh->list[i];
                const int tile = entry & 0x3ff;
                const bool masked = entry >> (10 + rank) & 1;
#else
                const int tile = t.hi - 1 - i;
#if MASK
                const bool masked = true;
#else
                const bool masked = hides_keys(p, t, m0, tile);
#endif
#endif
                if (run != PLAIN) {
                    // Runs after the first need more registers: they take them while no product is in flight, and
                    // values that depend on the opaque zero are computed for each tile instead of kept.
                    wgmma_wait<0>();
                    pin(o);
                    int zero = 0;
                    asm volatile("" : "+r"(zero));
                    const Params& later = params_at(p, zero);
                    const Rows again = rows_of(later, t, rank * 64, tid + zero);
                    volatile float* parked = &sh->parked[0][tid];
#pragma unroll
                    for (int j = 0; j < PARKED; j++) parked[j * 128] = o[j];
                    modify<64>(s, later, again, tile, true, run, cells_of(later, again, tile));
                    softmax<64>(s, soft, score_unit(later), tile_unit(later, true), masked, true, run);
#pragma unroll
                    for (int j = 0; j < PARKED; j++) o[j] = parked[j * 128];
                    return;
                }
                const Rows rows = rows_of(p, t, rank * 64, tid);
                if (masked) modify<64>(s, p, rows, tile, true, PLAIN, cells_of(p, rows, tile));
                else modify<64>(s, p, rows, tile, false, PLAIN);
                softmax<64>(s, soft, sc, tile_unit(p, masked), masked, true, PLAIN);
            };
            auto issue_pv = [&](int i) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    wait_v(8 + 2 * c, c, i);
                    wgmma_fence();
                    wgmma_rs<256>(o, pr[4 * c], pr[4 * c + 1], pr[4 * c + 2], pr[4 * c + 3],
                                  desc_v + (u64)(c * 1024), true);
                    wgmma_commit();
                }
            };
            auto release_v = [&]() {
#pragma unroll
                for (int c = 0; c < 4; c++) release(8 + 2 * c);
            };
            auto release_k = [&]() {
#pragma unroll
                for (int c = 8 - LAG; c < 8; c++) release(c);
            };

            bar_wait(q_full, turns & 1);
            issue_qk(0);
            wgmma_wait<0>();
            pin(s);
            release_k();
            scores(0);
            pack();
            hand_over(0);
#pragma unroll 1
            for (int i = 1; i < n; i++) {
                issue_qk(i);
                // Only now, so that the other group's products do not come before these.
                bar_arrive(p_full + 8 * ((before + i - 1) & (PBUF - 1)));
                issue_pv(i - 1);
                wgmma_wait<4>();
                pin(s);
                release_k();
                scores(i);
                pin(s);
                hold_until(soft.l[0] + soft.l[1]);
                wgmma_wait<0>();
                pin(s);
                pin(o);
                release_v();
                pack();
                hand_over(i);
                rescale(soft.alpha[0], soft.alpha[1]);
            }
            bar_arrive(p_full + 8 * ((before + n - 1) & (PBUF - 1)));
            issue_pv(n - 1);
            finish(inv, over, soft, p, sc, t, rows_of(p, t, rank * 64, tid), run);
            if ((lane & 3) == 0) {
                sh->inv[warp * 16 + (lane >> 2)] = inv[0];
                sh->inv[warp * 16 + (lane >> 2) + 8] = inv[1];
            }
            bar_arrive(done);
            wgmma_wait<0>();
            pin(o);
            release_v();
        } else if (n > 0) {
            // ---- the right half ----
            for (int b = 0; b < PBUF && turns == 0; b++) named_arrive(BAR_FREE + b, 256);
            const u64 desc_p = smem_desc(sm_p, 16);
            const int r = warp * 16 + (lane >> 2);
#pragma unroll 1
            for (int i = 0; i < n; i++) {
                const int b = (before + i) & (PBUF - 1);
                bar_wait(p_full + 8 * b, (before + i) / PBUF & 1);
                if (i > 0) rescale(sh->alpha[b][r], sh->alpha[b][r + 8]);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    wait_v(9 + 2 * c, c, i);
                    wgmma_fence();
                    wgmma_ss<256, 1>(o, desc_p + (u64)(b * (P_BYTES >> 4) + 2 * c),
                                     desc_v + (u64)(c * 1024 + 512), true);
                    wgmma_commit();
                    if (c > 0) {
                        wgmma_wait<1>();
                        release(7 + 2 * c);
                    }
                }
                wgmma_wait<0>();
                pin(o);
                release(15);
                // The weights of the tile PBUF later, if there is one, take the place of these.
                named_arrive(BAR_FREE + b, 256);
            }
            bar_wait(done, turns & 1);
            inv[0] = sh->inv[r];
            inv[1] = sh->inv[r + 8];
            // The first group marks failed rows by a factor that is NaN.
            over[0] = inv[0] != inv[0];
            over[1] = inv[1] != inv[1];
        }

        if (n <= 0) {
            if (group == 1) write_unseen(p, t, m0, 64, tid);
        } else {
            // O takes Q's place: panels 0 to 3 are the first group's, 4 to 7 the second's.
            const int half = group - 1;
            const u32 own = sm_q + half * 4 * 8192;
            const int r = warp * 16 + (lane & 15);
            named_sync(BAR_STORE + half, 128);
            u32 zeros[2] = {0, 0};
#pragma unroll
            for (int c = 0; c < 16; c++) {
                const int chunk = (c & 3) * 2 + (lane >> 4);
                u32 word[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    word[i] = pack2(o[8 * c + 2 * i] * inv[i & 1], o[8 * c + 2 * i + 1] * inv[i & 1]);
                    test_finite(zeros[i & 1], word[i]);
                }
                stmatrix4(own + (c / 4) * 8192 + r * 128 + ((chunk ^ (r & 7)) << 4), word[0], word[1], word[2],
                          word[3]);
            }
            const int row = m0 + warp * 16 + (lane >> 2);
            const bool in[2] = {row < t.sq, row + 8 < t.sq};
            const bool bad = (in[0] && !over[0] && zeros[0] != 0) || (in[1] && !over[1] && zeros[1] != 0);
            const bool failed = group == 1 && ((in[0] && over[0]) || (in[1] && over[1]));
            for (int cta = 0; cta < 2; cta++) {
                store_cluster_if(run == PLAIN && bad, smem_u32(&sh->needed.clean), cta, 1);
                store_cluster_if(failed, smem_u32(&sh->needed.exact), cta, 1);
            }
            fence_async_smem();
            named_sync(BAR_STORE + half, 128);
            if (run >= EXACT) {
                merge_rows<256, 64>(p, t, m0, half * 256, raw + half * 4 * 8192, tid, run);
            } else if (VARLEN) {
                for (int i = tid; i < 64 * 32; i += 128) {
                    const int row = i / 32, c = i % 32;
                    if (m0 + row < t.sq)
                        *(uint4*)(output_row(p, t, m0 + row) + half * 256 + c * 8) =
                            *(const uint4*)(raw + half * 4 * 8192 + (c / 8) * 8192 + row * 128 +
                                            (((c & 7) ^ (row & 7)) << 4));
                }
            } else if (tid == 0 && m0 < t.sq) {
#pragma unroll
                for (int c = 0; c < 4; c++)
                    tma_store(&map_o, own + c * 8192, half * 256 + c * 64, m0, t.h, t.b);
                tma_store_commit();
                tma_store_wait_read();
            }
        }
    }
}
