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
//   64 rows for Q and O, BN rows for K and V. Packed rows: those of all sequences in one, batch 1. VARLEN: O unused.
//   PAGED: K and V have dims (D, page size, heads, pages) and a box of the largest power of two of rows that divides
//   both a page and BN;
// - threads: 128 (WGS + 1). Grid: Params.tiles, or fewer CTAs (as many as there are processors), each
//   with a share of the tiles. Params.tiles = tiles_m x batch x heads, tiles_m = ceil(sq / BM);
// - Params.section: heads that go together. K and V of that many fit well in the L2 cache; 1 where every
//   row sees every key;
// - left, right: 2^30 where nothing bounds them. q_off, left and right fit in 31 bits together;
// - dynamic shared bytes, from 1,024 on: 128 PANELS (QBUF BM + 2 STAGES BN) + 56 QBUF WGS + 56 +
//   40 STAGES + 512 WGS PARKED, and with CLASSES 8 + QBUF (12 + 8 WGS + 2 LIST_CAP) more.
// The host's side is src/backend/cuda/{table,params,maps}.rs.

// The consumers' work on one query tile in run `run`; FIRST_RUN is compiled apart from the others.
template <bool FIRST_RUN> DEV void query_tile(Consumer& c, const TensorMap* map_o, const int run) {
    const Memory& m = c.m;
    c.wait_q();
    const Tile t = c.tile();
    int n = t.hi - t.lo;
#if CLASSES
    n = m.sh->list_len[c.rq.slot()];
    // Entries, not tiles; the first is done first.
    const int lo = m.sh->list_from[c.rq.slot()][c.wg], hi = m.sh->list_to[c.rq.slot()][c.wg];
    c.skip(hi > lo ? lo : n);
#else
    int lo, hi;
    bounds(c.p, t, t.m0 + c.wg * 64, 64, lo, hi);
    c.skip(hi > lo ? t.hi - hi : n);
#endif
    if (hi <= lo) {
        write_unseen(c.p, t, t.m0 + c.wg * 64, 64, c.late_tid());
        c.wait_stored();
        c.sync_group(); // all have read the tile that they were given
        c.release_q();
        return;
    }

    float o[D / 2], s[BN / 2];
    u32 weights[BN / 4];
    Softmax soft = softmax_start();
    const Rows kept = rows_of(c.p, t, c.wg * 64, c.tid);
    const u32 own_q = m.q + c.rq.slot() * Q_BYTES + c.wg * 64 * 128;
    Work w = {o, s, weights, soft, own_q, smem_desc(own_q, 16)};
#if VARLEN
    w.foreign = hi * BN > t.sk;
#endif
#pragma unroll
    for (int j = 0; j < D / 2; j++) w.o[j] = 0.0f;

    const float sc = score_unit(c.p);
    if (FIRST_RUN) first_run(c, w, t, kept, lo, hi, sc);
    else later_run(c, w, t, lo, hi, run);
    wait_v(c, w, t);
    wgmma_fence();
    issue_pv(c, w, c.rv.slot());
    wgmma_commit();

    // The tile is read again, so that none of it is kept in registers through the loops.
    asm volatile("" ::: "memory");
    const Tile e = c.tile();
    const int tid = c.late_tid();
    const Rows ends = rows_of(c.p, e, c.wg * 64, tid);
    float inv[2];
    bool over[2];
    if (FIRST_RUN) {
        finish(inv, over, w.soft, c.p, sc, e, ends, run);
    } else {
        const Params& later = params_at(c.p, tid - c.tid);
        finish(inv, over, w.soft, later, score_unit(later), e, ends, run);
    }
    wgmma_wait<0>();
    pin(w.o);
    c.release_v();
#if CLASSES
    c.skip(m.sh->list_len[c.rq.slot()] - m.sh->list_to[c.rq.slot()][c.wg]);
#else
    bounds(c.p, e, e.m0 + c.wg * 64, 64, lo, hi);
    c.skip(lo - e.lo);
#endif

    // O takes Q's place: every warp of this group has read its rows of Q.
    c.sync_group();
    stage_output(c, w, e, ends, inv, over, run);
    if (VARLEN || run >= EXACT) {
        c.sync_group();
        store_rows(c, e, tid, run);
        c.sync_group();
        c.release_q();
        return;
    }
    fence_async_smem();
    c.sync_group();
    store_tile(c, w, e, map_o);
    c.storing = true;
    c.rq.next();
    if (QBUF == 1) c.wait_stored();
}

// A run over the CTA's tiles.
template <bool FIRST_RUN> DEV void run_tiles(Consumer& c, const Share& share, const TensorMap* map_o, const int run) {
    for (int turn = 0; share.has(turn); turn++) query_tile<FIRST_RUN>(c, map_o, run);
    c.wait_stored();
}

DEV void consume(const Memory& m, const Params& p, const Share& share, const TensorMap* map_o, int group) {
    const int tid = threadIdx.x - 128 * group;
    Consumer c = {m, p, group - 1, tid, (tid & 31) == 0, smem_desc(m.k, 16), smem_desc(m.v, BN * 128), {0}, {0}, {0}, false};
    run_tiles<true>(c, share, map_o, PLAIN);
    if (c.tid == 0) m.sh->v_at = c.rv.at;
    named_arrive(BAR_PARKED, 128 * WGS + 32);
    for (int run = PLAIN;;) {
        c.sync_group();
        if (c.tid == 0) bar_arrive(m.verdict + 8 * run);
        run = next_run(m, run);
        if (run == DONE) return;
        if (run > CLEAN) {
            // The output of earlier runs is read again and merged into.
            if (c.tid == 0) tma_store_wait();
            c.sync_group();
        }
        run_tiles<false>(c, share, map_o, run);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
              const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_o,
              const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 raw[];
    const Memory m = memory_at(raw);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x < 32) {
        init_barriers(m);
    } else if (threadIdx.x == 32) {
        prefetch_map(&map_k);
        prefetch_map(&map_q);
        prefetch_map(&map_v);
        prefetch_map(&map_o);
    }
    __syncthreads();
    wait_for_kernel_before();
    const Share share = share_of(p);

    if (group == 0) {
        regs_give<REGS_PRODUCER>();
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
        if (warp > CLEANING_WARP) return;
        if (warp == CLEANING_WARP) {
            clean_values(m, lane);
            return;
        }
#if CLASSES
        if (warp == 1) {
            list_key_tiles(m, p, share, lane);
            return;
        }
#endif
#if PAGED
        // Copies of single pages are many: a second warp has those of V.
        if (warp == 0) load_tiles<true, false>(m, p, share, &map_q, &map_k, &map_v, lane);
        else load_tiles<false, true>(m, p, share, &map_q, &map_k, &map_v, lane);
#else
        load_tiles<true, true>(m, p, share, &map_q, &map_k, &map_v, lane);
#endif
        return;
    }
    regs_take<REGS_CONSUMER>();
    consume(m, p, share, &map_o, group);
}
