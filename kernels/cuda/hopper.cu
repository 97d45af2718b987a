// Attention forward for Hopper, head dims up to 256. The host puts hopper_ptx.cu, careful.cu,
// hopper_tiles.cu and the files that it names before this text.
//
// One producer warpgroup (one thread of it issues bulk tensor copies) and WGS consumer warpgroups
// of 64 query rows each. K and V pass through rings of STAGES tiles. A consumer issues the next
// tile's QK^T, then this tile's PV, and does the next tile's softmax while PV runs. Key tiles go
// from the last to the first, so that masked tiles of a causal problem come first.
//
// Shared memory: Q [QBUF][PANELS][BM][64] (later O), K [STAGES][PANELS][BN][64], V likewise, all in the
// 128-byte swizzle; columns past D are zero; then struct Shared.
//
// What the host gives:
// - macros: D, BN (a multiple of 16), WGS, STAGES and QBUF (powers of two), REGS_PRODUCER,
//   REGS_CONSUMER, and hopper_tiles.cu's options;
// - arguments: four tensor maps by value and Params. A map has dims (D, rows, heads, batch), strides of
//   the same, 16-bit elements, the 128-byte swizzle, 0 where nothing is, and a box of 64 columns and
//   64 rows for Q and O, BN rows for K and V. Packed sequences: rows of all in one, batch 1, O unused;
// - threads: 128 (WGS + 1). Grid: Params.tiles, or fewer CTAs (as many as there are processors), each
//   with a share of the tiles. Params.tiles = tiles_m x batch x heads, tiles_m = ceil(sq / BM);
// - Params.section: heads that go together. K and V of that many fit well in the L2 cache; 1 where every
//   row sees every key;
// - left, right: 2^30 where nothing bounds them. q_off, left and right fit in 31 bits together;
// - dynamic shared bytes, from 1,024 on: 128 PANELS (QBUF BM + 2 STAGES BN) + 56 QBUF WGS + 56 +
//   40 STAGES + 512 WGS PARKED, and with CLASSES 8 + QBUF (12 + 8 WGS + 2 LIST_CAP) more.
// scripts/gpu-bench has the same in Python, with the tiles that each head dim and its options take.

#define THREADS (128 * (WGS + 1))
#ifndef QBUF // tiles of Q, so that a CTA with several loads the next one early
#define QBUF 1
#endif

#define BAR_PARKED 7 // named barriers: this, and 8 + w within consumer warpgroup w

// Where one is in a ring of N slots, a power of two.
template <int N>
struct Ring {
    u32 at;
    DEV_MEMBER u32 slot() const { return at % N; }
    DEV_MEMBER u32 phase() const { return at / N & 1; }
    DEV_MEMBER void next() { at++; }
};

#define TILE_BYTES (PANELS * BN * 128)
#define Q_BYTES (PANELS * BM * 128)

// Elements of O a thread that wait in shared memory while a run after the first does a softmax, where
// registers are short.
#define PARKED (D <= 64 && WGS == 4 ? 16 : D >= 192 ? 28 : 0)

struct Shared {
    Tile tile[QBUF * WGS]; // whose rows each consumer's Q is
    u64 q_full[QBUF * WGS], q_empty[QBUF * WGS];
    u64 verdict[DONE]; // all consumers have ended a run
    u64 v_raw[STAGES]; // a tile of V is there that has yet to be cleaned
    Again again;
    u32 v_at; // tiles of V in the first run
#if PARKED
    float parked[PARKED][128 * WGS];
#endif
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
#if CLASSES
    u64 listed[QBUF];
    int list_len[QBUF], list_from[QBUF][WGS], list_to[QBUF][WGS];
    u16 list[QBUF][LIST_CAP];
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
              const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_o,
              const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 raw[];
    const u32 base = smem_u32(raw);
    const u32 sm_q = base, sm_k = base + QBUF * Q_BYTES, sm_v = sm_k + STAGES * TILE_BYTES;
    Shared* sh = (Shared*)(raw + QBUF * Q_BYTES + 2 * STAGES * TILE_BYTES);
    const u32 q_full = smem_u32(sh->q_full), q_empty = smem_u32(sh->q_empty);
    const u32 verdict = smem_u32(sh->verdict), v_raw = smem_u32(sh->v_raw);
#if CLASSES
    const u32 listed = smem_u32(sh->listed);
#endif
    const u32 k_full = smem_u32(sh->k_full), k_empty = smem_u32(sh->k_empty);
    const u32 v_full = smem_u32(sh->v_full), v_empty = smem_u32(sh->v_empty);

    // The CTA's next run over its tiles, once all consumers have ended `run`. All warps ask after each.
    auto next_run = [&](int run) {
        bar_wait(verdict + 8 * run, 0);
        // One lane's reading, so that the compiler knows that a warp stays together.
        return __shfl_sync(~0u, run_after(run, sh->again), 0);
    };

    // A CTA's share of the tiles. Where it has several and keys after a row are hidden, tiles go two by
    // two, lest shares differ; but for short tiles, of which there are many.
    const bool paired = RIGHT && !LEFT && D > 64 && gridDim.x < p.tiles;
    const int indices = paired ? p.tiles / p.tiles_m * ((p.tiles_m + 1) / 2) : p.tiles;
    auto index_at = [&](int turn) {
        return (int)(blockIdx.x + (paired ? turn >> 1 : turn) * gridDim.x);
    };
    auto tile_at = [&](int turn) {
        return tile_of(p, index_at(turn), paired ? 1 + (turn & 1) : 0);
    };

    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x < 32) {
        // A barrier of each kind a lane.
        const int i = threadIdx.x;
        if (i < QBUF * WGS) {
            bar_init(q_full + 8 * i, 1);
            bar_init(q_empty + 8 * i, 1);
        }
        if (i < STAGES) {
            bar_init(k_full + 8 * i, 1);
            bar_init(v_full + 8 * i, 1);
            bar_init(v_raw + 8 * i, 1);
            bar_init(k_empty + 8 * i, 4 * WGS);
            bar_init(v_empty + 8 * i, 4 * WGS);
        }
#if CLASSES
        if (i < QBUF) bar_init(listed + 8 * i, 32);
#endif
        if (i == 0) {
            for (int run = PLAIN; run < DONE; run++) bar_init(verdict + 8 * run, WGS);
            sh->again = Again{0, 0, 0};
        }
        bar_init_fence();
    } else if (threadIdx.x == 32) {
        prefetch_map(&map_k);
        prefetch_map(&map_q);
        prefetch_map(&map_v);
        prefetch_map(&map_o);
    }
    __syncthreads();
    follow_kernel_before();

    if (group == 0) {
        // ---- producer ----
        regs_give<REGS_PRODUCER>();
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
        if (warp > CLASSES + 1) return;
        if (warp == CLASSES + 1) {
            // The last warp cleans V in runs after the first, between its copy and the consumers. Until then it
            // is parked: to ask a memory barrier again and again takes issue slots from the consumers.
            named_sync(BAR_PARKED, 128 * WGS + 32);
            int run = PLAIN;
            u32 cleaned = 0;
            while (run != DONE) {
                while (run != PLAIN) {
                    const u32 slot = (sh->v_at + cleaned) % STAGES;
                    const bool there = bar_test(v_raw + 8 * slot, cleaned / STAGES & 1);
                    if (__any_sync(~0u, there)) {
                        bar_wait(v_raw + 8 * slot, cleaned / STAGES & 1);
                        u8* tile = raw + (sm_v - base) + slot * TILE_BYTES;
                        if (clean_halves<F16>(tile, TILE_BYTES, lane, 32, run)) sh->again.count = 1;
                        fence_async_smem();
                        __syncwarp();
                        if (lane == 0) bar_arrive(v_full + 8 * slot);
                        cleaned++;
                    } else if (__any_sync(~0u, bar_test(verdict + 8 * run, 0))) {
                        break;
                    }
                }
                run = next_run(run);
            }
            return;
        }
        Ring<QBUF> rq = {QBUF};
#if CLASSES
        // The second warp is a tile ahead, with which key tiles there are to do.
        if (warp == 1) {
            for (int run = PLAIN; run != DONE; run = next_run(run)) {
                for (int turn = 0; index_at(turn) < indices; turn++) {
                    const Tile t = tile_at(turn);
                    const u32 b = rq.slot();
                    for (int w = 0; w < WGS; w++) bar_wait(q_empty + 8 * (b * WGS + w), rq.phase());
                    const int len = list_tiles(sh->list[b], sh->list_from[b], sh->list_to[b], p, t, lane);
                    if (lane == 0) sh->list_len[b] = len;
                    bar_arrive(listed + 8 * b);
                    rq.next();
                }
            }
            return;
        }
#endif
        Ring<STAGES> rk = {STAGES}, rv = {STAGES}; // slots are free at first
        for (int run = PLAIN; run != DONE; run = next_run(run)) {
            const u32 v_there = run == PLAIN ? v_full : v_raw;
            for (int turn = 0; index_at(turn) < indices; turn++) {
                const Tile t = tile_at(turn);
                const KvHead kv = kv_head_of(p, t);
                int n = t.hi - t.lo;
                auto load = [&](const TensorMap* map, u32 dst, u32 full, int tile) {
                    bar_expect(full, TILE_BYTES);
#pragma unroll 1
                    for (int c = 0; c < PANELS; c++)
                        tma_load(dst + c * BN * 128, map, full, c * 64, kv.row(tile), kv.head, kv.batch);
                };
                // What a consumer is to do, and its rows of Q if there are keys.
                auto load_q = [&](int w) {
                    const u32 full = q_full + 8 * (rq.slot() * WGS + w);
                    bar_wait(q_empty + 8 * (rq.slot() * WGS + w), rq.phase());
                    sh->tile[rq.slot() * WGS + w] = t;
                    if (n == 0) {
                        bar_arrive(full);
                        return;
                    }
                    bar_expect(full, PANELS * 8192);
#pragma unroll 1
                    for (int c = 0; c < PANELS; c++)
                        tma_load(sm_q + rq.slot() * Q_BYTES + c * BM * 128 + w * 8192, &map_q, full,
                                 c * 64, t.q_start + t.m0 + w * 64, t.h, kv.batch);
                };
                auto load_all_q = [&]() {
#pragma unroll 1
                    for (int w = 0; w < WGS; w++) load_q(w);
                };
#if CLASSES
                // Q comes while the list is made, if its place is not the last tile's.
                if (lane == 0 && QBUF > 1) load_all_q();
                bar_wait(listed + 8 * rq.slot(), rq.phase() ^ 1);
                n = sh->list_len[rq.slot()];
#define TILE_AT(i) (sh->list[rq.slot()][i] & 0x3ff)
#else
#define TILE_AT(i) (t.hi - 1 - (i))
#endif
                if (lane == 0) {
                    for (int i = 0; i <= n; i++) {
                        if (i < n) {
                            bar_wait(k_empty + 8 * rk.slot(), rk.phase());
                            load(&map_k, sm_k + rk.slot() * TILE_BYTES, k_full + 8 * rk.slot(),
                                 TILE_AT(i));
                            rk.next();
                        }
                        if (i == 0 && !(CLASSES && QBUF > 1)) load_all_q();
                        if (i > 0) {
                            bar_wait(v_empty + 8 * rv.slot(), rv.phase());
                            load(&map_v, sm_v + rv.slot() * TILE_BYTES, v_there + 8 * rv.slot(),
                                 TILE_AT(i - 1));
                            rv.next();
                        }
                    }
                }
                __syncwarp();
                rq.next();
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
    const u64 desc_k = smem_desc(sm_k, 16);
    const u64 desc_v = smem_desc(sm_v, BN * 128);
    Ring<STAGES> rk = {0}, rv = {0};
    Ring<QBUF> rq = {0};
    bool storing = false; // O of the tile before may still be read from its buffer
    auto wait_q = [&]() {
#if CLASSES
        bar_wait(listed + 8 * rq.slot(), rq.phase());
#endif
        bar_wait(q_full + 8 * (rq.slot() * WGS + wg), rq.phase());
    };
    auto told = [&]() { return tile_told(p, sh->tile[rq.slot() * WGS + wg]); };
    auto done_q = [&]() {
        if (tid == 0) bar_arrive(q_empty + 8 * (rq.slot() * WGS + wg));
        rq.next();
    };
    // With a second buffer nobody waits for the copy of O until the next tile is under way.
    auto stored = [&]() {
        if (storing && tid == 0) {
            tma_store_wait_read();
            bar_arrive(q_empty + 8 * ((rq.at - 1) % QBUF * WGS + wg));
        }
        storing = false;
    };
    auto done_k = [&]() {
        if (signal) bar_arrive(k_empty + 8 * rk.slot());
        rk.next();
    };
    auto done_v = [&]() {
        if (signal) bar_arrive(v_empty + 8 * rv.slot());
        rv.next();
    };
    // Lets `n` tiles pass that none of this group's rows sees.
    auto skip = [&](int n) {
        for (; n > 0; n--) {
            bar_wait(k_full + 8 * rk.slot(), rk.phase());
            done_k();
            bar_wait(v_full + 8 * rv.slot(), rv.phase());
            done_v();
        }
    };

    // A run over the CTA's tiles. The first is compiled apart from the others.
    auto tiles = [&](auto plain, const int run) {
        // The thread's number, opaque, lest what follows from it be kept in registers from tile to tile.
        auto late = [&]() {
            int x = tid;
            asm volatile("" : "+r"(x));
            return x;
        };
        for (int turn = 0; index_at(turn) < indices; turn++) {
            wait_q();
            const Tile t = told();
            int n = t.hi - t.lo;
#if CLASSES
            n = sh->list_len[rq.slot()];
            // Entries, not tiles; the first is done first.
            const int lo = sh->list_from[rq.slot()][wg], hi = sh->list_to[rq.slot()][wg];
            skip(hi > lo ? lo : n);
#else
            int lo, hi;
            bounds(p, t, t.m0 + wg * 64, 64, lo, hi);
            skip(hi > lo ? t.hi - hi : n);
#endif
            if (hi <= lo) {
                write_unseen(p, t, t.m0 + wg * 64, 64, late());
                stored();
                named_sync(8 + wg, 128); // all have read what they were told
                done_q();
                continue;
            }

            float o[D / 2];
            u32 pr[BN / 4];
            Soft soft = soft_start();
            const Rows kept = rows_of(p, t, wg * 64, tid);
            auto rows = [&]() { return D <= 64 ? rows_of(p, t, wg * 64, tid) : kept; };

            const u32 own_q = sm_q + rq.slot() * Q_BYTES + wg * 64 * 128;
            const u64 desc_q = smem_desc(own_q, 16);
            auto issue_qk = [&](float (&s)[BN / 2], int stage) {
                const u64 kd = desc_k + (u64)(stage * (TILE_BYTES >> 4));
                u64 qd = desc_q;
                // Opaque in later runs, lest a descriptor a step be kept in registers from tile to tile.
                if (!plain) asm volatile("" : "+l"(qd));
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    const int at = (k / 4), in = (k % 4) * 2;
                    wgmma_ss<BN, 0>(s, qd + (u64)(at * (BM * 8) + in),
                                    kd + (u64)(at * (BN * 8) + in), k > 0);
                }
            };
            auto issue_pv = [&](int stage) {
                const u64 vd = desc_v + (u64)(stage * (TILE_BYTES >> 4));
#pragma unroll
                for (int k = 0; k < BN / 16; k++)
                    wgmma_rs<D>(o, pr[4 * k], pr[4 * k + 1], pr[4 * k + 2], pr[4 * k + 3],
                                vd + (u64)(k * 128), true);
            };
#if VARLEN
            int foreign = hi * BN > t.sk; // rows of V in the first tile are of another sequence
#endif
            auto wait_v = [&]() {
                bar_wait(v_full + 8 * rv.slot(), rv.phase());
#if VARLEN
                if (!foreign) return;
                foreign = 0;
                clear_rows<PANELS, BN>(raw + (sm_v - base) + rv.slot() * TILE_BYTES, t.sk % BN, tid);
                fence_async_smem();
                named_sync(8 + wg, 128);
#endif
            };
            auto pack = [&](const float (&s)[BN / 2]) {
#pragma unroll
                for (int c = 0; c < BN / 16; c++) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        pr[4 * c + i] = pack2(s[8 * c + 2 * i], s[8 * c + 2 * i + 1]);
                }
            };
            auto rescale = [&]() {
                if (!soft.scaled) return;
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    o[4 * j] *= soft.alpha[0];
                    o[4 * j + 1] *= soft.alpha[0];
                    o[4 * j + 2] *= soft.alpha[1];
                    o[4 * j + 3] *= soft.alpha[1];
                }
            };
#pragma unroll
            for (int j = 0; j < D / 2; j++) o[j] = 0.0f;

            const float sc = score_unit(p);
            float s[BN / 2];
            if (!plain) {
                // The same arithmetic, one product after another.
                stored();
                bool first = true;
#if CLASSES
#pragma unroll 1
                for (int i = lo; i < sh->list_to[rq.slot()][wg]; i++) {
                    const int entry = sh->list[rq.slot()][i], tile = entry & 0x3ff;
                    const bool masked = first || (entry >> (10 + wg) & 1);
#else
#pragma unroll 1
                for (int tile = hi - 1; tile >= lo; tile--) {
                    const bool masked = true;
#endif
                    if (!first) {
                        wait_v();
                        wgmma_fence();
                        issue_pv(rv.slot());
                        wgmma_commit();
                        wgmma_wait<0>();
                        pin(o);
                        done_v();
                    }
                    bar_wait(k_full + 8 * rk.slot(), rk.phase());
                    wgmma_fence();
                    issue_qk(s, rk.slot());
                    wgmma_commit();
                    wgmma_wait<0>();
                    pin(s);
                    done_k();
                    // Read again, lest it be kept in registers from tile to tile.
                    asm volatile("" ::: "memory");
                    int zero = 0;
                    asm volatile("" : "+r"(zero));
                    const Params& later = params_at(p, zero);
                    const Rows rows = rows_of(later, told(), wg * 64, tid + zero);
#if PARKED
                    volatile float* parked = &sh->parked[0][threadIdx.x - 128];
#pragma unroll
                    for (int j = 0; j < PARKED; j++) parked[j * 128 * WGS] = o[j];
#endif
                    modify<BN>(s, later, rows, tile, true, run, cells_of(later, rows, tile));
                    softmax<BN>(s, soft, score_unit(later), tile_unit(later, true), masked, false, run);
                    pack(s);
#if PARKED
#pragma unroll
                    for (int j = 0; j < PARKED; j++) o[j] = parked[j * 128 * WGS];
#endif
                    rescale();
                    first = false;
                }
            } else {
                // The first tile.
#if CLASSES
                int entry = sh->list[rq.slot()][lo];
                const int tile0 = entry & 0x3ff;
#else
                const int tile0 = hi - 1;
#endif
                Cells cells;
#if MASK
                prefetch_mask<BN>(p, t, rows(), wg * 64, tile0, tid);
                cells = cells_of(p, rows(), tile0);
#endif
                bar_wait(k_full + 8 * rk.slot(), rk.phase());
                wgmma_fence();
                issue_qk(s, rk.slot());
                wgmma_commit();
                wgmma_wait<0>();
                pin(s);
                done_k();
                modify<BN>(s, p, rows(), tile0, true, PLAIN, cells);
                softmax<BN>(s, soft, sc, tile_unit(p, true), true, true, PLAIN);
                pack(s);
                stored();

                // Issues QK^T of `tile` and PV of the tile before it, and does the softmax of `tile`.
                auto step = [&](int tile, auto masked) {
                    bar_wait(k_full + 8 * rk.slot(), rk.phase());
                    wgmma_fence();
                    issue_qk(s, rk.slot());
                    wgmma_commit();
                    wait_v();
                    wgmma_fence();
                    issue_pv(rv.slot());
                    wgmma_commit();
                    Cells cells;
#if MASK
                    if (masked) {
                        prefetch_mask<BN>(p, t, rows(), wg * 64, tile, tid);
                        cells = cells_of(p, rows(), tile);
                    }
#endif
                    wgmma_wait<1>();
                    pin(s);
                    done_k();
                    if (masked) modify<BN>(s, p, rows(), tile, true, PLAIN, cells);
                    else modify<BN>(s, p, rows(), tile, false, PLAIN);
                    softmax<BN>(s, soft, sc, tile_unit(p, masked), masked, false, PLAIN);
                    pin(s);
                    after(soft.l[0] + soft.l[1]);
                    wgmma_wait<0>();
                    pin(s);
                    pin(o);
                    done_v();
                    pack(s);
                    rescale();
                };
#if CLASSES
                // Runs of one kind, each in a loop of its own.
#if D > 128 // where all registers are taken, one loop needs fewer
                for (int i = lo + 1; i < hi; i++) {
                    entry = sh->list[rq.slot()][i];
                    step(entry & 0x3ff, (entry >> (10 + wg) & 1) != 0);
                }
#else
                for (int i = lo + 1; i < hi;) {
                    auto next = [&]() {
                        entry = sh->list[rq.slot()][i];
                        return (entry >> (10 + wg) & 1) != 0;
                    };
#pragma unroll 1
                    for (; i < hi && next(); i++) step(entry & 0x3ff, Yes());
#pragma unroll 1
                    for (; i < hi && !next(); i++) step(entry & 0x3ff, No());
                }
#endif
#elif MASK
                for (int tile = hi - 2; tile >= lo; tile--) step(tile, Yes());
#else
                int tile = hi - 2;
                // Tiles from free_hi on hide keys from some row; so do those before free_lo.
#if RIGHT
                const int free_hi = (score_last_key(t.m0 + wg * 64 + t.q_off, p.right) + 1) / BN;
                for (; tile >= max(lo, free_hi); tile--) step(tile, Yes());
#endif
#if LEFT
                const int past = score_first_key(min(t.m0 + wg * 64 + 64, t.sq) - 1 + t.q_off, p.left);
                const int free_lo = max(lo, past <= 0 ? 0 : (past + BN - 1) / BN);
#else
                const int free_lo = lo;
#endif
#pragma unroll 1
                for (; tile >= free_lo; tile--) step(tile, No());
#if LEFT
                for (; tile >= lo; tile--) step(tile, Yes());
#endif
#endif
            }
            wait_v();
            wgmma_fence();
            issue_pv(rv.slot());
            wgmma_commit();

            // Read again, lest all of it be kept in registers through the loops.
            asm volatile("" ::: "memory");
            const Tile e = told();
            const int me = late();
            const Rows ends = rows_of(p, e, wg * 64, me);
            float inv[2];
            bool over[2];
            if (plain) finish(inv, over, soft, p, sc, e, ends, run);
            else finish(inv, over, soft, params_at(p, me - tid), score_unit(params_at(p, me - tid)), e, ends, run);
            wgmma_wait<0>();
            pin(o);
            done_v();
#if CLASSES
            skip(sh->list_len[rq.slot()] - sh->list_to[rq.slot()][wg]);
#else
            bounds(p, e, e.m0 + wg * 64, 64, lo, hi);
            skip(lo - e.lo);
#endif

            // O takes Q's place: every warp of this group has read its rows of Q.
            named_sync(8 + wg, 128);
            {
                int me = tid;
                asm volatile("" : "+r"(me));
                const int r = (me >> 5) * 16 + (me & 15); // of the group's 64
                const u32 at = own_q + r * 128;
                u32 zeros[2] = {0, 0};
#pragma unroll
                for (int c = 0; c < D / 16; c++) {
                    const int chunk = (c & 3) * 2 + ((me >> 4) & 1);
                    u32 word[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        word[i] = pack2(o[8 * c + 2 * i] * inv[i & 1], o[8 * c + 2 * i + 1] * inv[i & 1]);
                        test_finite(zeros[i & 1], word[i]);
                    }
                    stmatrix4(at + (c / 4) * BM * 128 + ((chunk ^ (r & 7)) << 4), word[0], word[1], word[2],
                              word[3]);
                }
                // Predicated stores, not branches: past a branch that ptxas takes to part a warp, it keeps no
                // descriptor in uniform registers.
                const bool in[2] = {ends.row < e.sq, ends.row + 8 < e.sq};
                store_if(run == PLAIN && ((in[0] && !over[0] && zeros[0] != 0) || (in[1] && !over[1] && zeros[1] != 0)),
                         smem_u32(&sh->again.clean), 1);
                store_if((in[0] && over[0]) || (in[1] && over[1]), smem_u32(&sh->again.exact), 1);
            }
            if (VARLEN || run >= EXACT) {
                named_sync(8 + wg, 128);
                const u8* own = raw + rq.slot() * Q_BYTES + wg * 64 * 128;
                if (run >= EXACT)
                    merge_rows<D, BM>(p, e, e.m0 + wg * 64, 0, own, me, run);
                else
                    for (int i = me; i < 64 * (D / 8); i += 128) {
                        const int r = i / (D / 8), c = i % (D / 8);
                        if (e.m0 + wg * 64 + r < e.sq)
                            *(uint4*)(output_row(p, e, e.m0 + wg * 64 + r) + c * 8) =
                                *(const uint4*)(own + (c / 8) * BM * 128 + r * 128 + (((c & 7) ^ (r & 7)) << 4));
                    }
                named_sync(8 + wg, 128);
                done_q();
                continue;
            }
            fence_async_smem();
            named_sync(8 + wg, 128);
            if (tid == 0) {
                if (e.m0 + wg * 64 < e.sq) {
#pragma unroll
                    for (int c = 0; c < PANELS; c++)
                        tma_store(&map_o, own_q + c * BM * 128, c * 64, e.m0 + wg * 64, e.h, e.b);
                }
                tma_store_commit();
            }
            storing = true;
            rq.next();
            if (QBUF == 1) stored();
        }
        stored();
    };
    tiles(Yes(), PLAIN);
    if (tid == 0) sh->v_at = rv.at;
    named_arrive(BAR_PARKED, 128 * WGS + 32);
    for (int run = PLAIN;;) {
        named_sync(8 + wg, 128);
        if (tid == 0) bar_arrive(verdict + 8 * run);
        run = next_run(run);
        if (run == DONE) return;
        if (run > CLEAN) {
            // What earlier runs stored is read.
            if (tid == 0) tma_store_wait();
            named_sync(8 + wg, 128);
        }
        tiles(No(), run);
    }
}
