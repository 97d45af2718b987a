// The consumer warpgroups of hopper.cu: scores, softmax and output of 64 query rows each.

// A consumer's place in the rings, and what it tells the producer.
struct Consumer {
    const Memory& m;
    const Params& p;
    int wg, tid; // warpgroup among the consumers; thread in it
    bool signal; // whether this thread arrives for its warp
    u64 desc_k, desc_v; // of the first slots
    Ring<STAGES> rk, rv;
    Ring<QBUF> rq;
    bool storing; // O of the tile before may still be read from its buffer

    DEV_MEMBER void wait_q() const {
#if CLASSES
        bar_wait(m.listed + 8 * rq.slot(), rq.phase());
#endif
        bar_wait(m.q_full + 8 * (rq.slot() * WGS + wg), rq.phase());
    }
    DEV_MEMBER Tile tile() const { return tile_of_producer(p, m.sh->tile[rq.slot() * WGS + wg]); }
    DEV_MEMBER void release_q() {
        if (tid == 0) bar_arrive(m.q_empty + 8 * (rq.slot() * WGS + wg));
        rq.next();
    }
    // With a second buffer nobody waits for the copy of O until the next tile is under way.
    DEV_MEMBER void wait_stored() {
        if (storing && tid == 0) {
            tma_store_wait_read();
            bar_arrive(m.q_empty + 8 * ((rq.at - 1) % QBUF * WGS + wg));
        }
        storing = false;
    }
    DEV_MEMBER void wait_k() const { bar_wait(m.k_full + 8 * rk.slot(), rk.phase()); }
    DEV_MEMBER void release_k() {
        if (signal) bar_arrive(m.k_empty + 8 * rk.slot());
        rk.next();
    }
    DEV_MEMBER void release_v() {
        if (signal) bar_arrive(m.v_empty + 8 * rv.slot());
        rv.next();
    }
    // Lets `n` tiles pass that none of this group's rows sees.
    DEV_MEMBER void skip(int n) {
        for (; n > 0; n--) {
            wait_k();
            release_k();
            bar_wait(m.v_full + 8 * rv.slot(), rv.phase());
            release_v();
        }
    }
    DEV_MEMBER void sync_group() const { named_sync(GROUP_BARRIER + wg, 128); }
    // The thread's number, opaque, so that values computed from it are not kept in registers from tile to tile.
    DEV_MEMBER int late_tid() const {
        int x = tid;
        asm volatile("" : "+r"(x));
        return x;
    }
};

// A query tile in work: a thread's accumulators and state, and where its rows of Q are. Arrays are held by reference:
// in one object with them, nothing would be promoted to registers before the loops over the arrays are unrolled.
struct Work {
    float (&o)[D / 2];
    float (&s)[BN / 2];
    u32 (&weights)[BN / 4]; // pairs of 16-bit elements
    Softmax& soft;
    u32 q; // this group's rows in shared memory
    u64 desc_q;
#if VARLEN
    int foreign; // rows of V in the first tile are not the sequence's
#endif
};

// Issues S = Q K^T for the tile of K in slot `stage`.
template <bool FIRST_RUN> DEV void issue_qk(const Consumer& c, Work& w, int stage) {
    const u64 kd = c.desc_k + (u64)(stage * (TILE_BYTES >> 4));
    u64 qd = w.desc_q;
    // Opaque in later runs, so that a descriptor a step is not kept in registers from tile to tile.
    if (!FIRST_RUN) asm volatile("" : "+l"(qd));
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int at = (k / 4), in = (k % 4) * 2;
        wgmma_ss<BN, 0>(w.s, qd + (u64)(at * (BM * 8) + in), kd + (u64)(at * (BN * 8) + in), k > 0);
    }
}

// Issues O += P V for the tile of V in slot `stage`.
DEV void issue_pv(const Consumer& c, Work& w, int stage) {
    const u64 vd = c.desc_v + (u64)(stage * (TILE_BYTES >> 4));
#pragma unroll
    for (int k = 0; k < BN / 16; k++)
        wgmma_rs<D>(w.o, w.weights[4 * k], w.weights[4 * k + 1], w.weights[4 * k + 2], w.weights[4 * k + 3],
                    vd + (u64)(k * 128), true);
}

// Waits for a tile of V.
DEV void wait_v(const Consumer& c, Work& w, const Tile& t) {
    bar_wait(c.m.v_full + 8 * c.rv.slot(), c.rv.phase());
#if VARLEN
    if (!w.foreign) return;
    w.foreign = 0;
    clear_rows<PANELS, BN>(c.m.raw + (c.m.v - c.m.base) + c.rv.slot() * TILE_BYTES, t.sk % BN, c.tid);
    fence_async_smem();
    c.sync_group();
#endif
}

// Rounds the weights to the 16-bit elements that P V takes.
DEV void pack_weights(Work& w) {
#pragma unroll
    for (int c = 0; c < BN / 16; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            w.weights[4 * c + i] = pack2(w.s[8 * c + 2 * i], w.s[8 * c + 2 * i + 1]);
    }
}

// Multiplies O by the softmax's factor of each row.
DEV void rescale(Work& w) {
    if (!w.soft.scaled) return;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        w.o[4 * j] *= w.soft.alpha[0];
        w.o[4 * j + 1] *= w.soft.alpha[0];
        w.o[4 * j + 2] *= w.soft.alpha[1];
        w.o[4 * j + 3] *= w.soft.alpha[1];
    }
}

// Rows of a thread in the first run: at small head dims computed again at each use, to save registers.
DEV Rows rows_now(const Consumer& c, const Tile& t, const Rows& kept) {
    return D <= 64 ? rows_of(c.p, t, c.wg * 64, c.tid) : kept;
}

// The first run's first tile: nothing overlaps its softmax.
DEV void first_tile(Consumer& c, Work& w, const Tile& t, const Rows& kept, int tile, float sc) {
    Cells cells;
#if MASK
    prefetch_mask<BN>(c.p, t, rows_now(c, t, kept), c.wg * 64, tile, c.tid);
    cells = cells_of(c.p, rows_now(c, t, kept), tile);
#endif
    c.wait_k();
    wgmma_fence();
    issue_qk<true>(c, w, c.rk.slot());
    wgmma_commit();
    wgmma_wait<0>();
    pin(w.s);
    c.release_k();
    modify<BN>(w.s, c.p, rows_now(c, t, kept), tile, true, PLAIN, cells);
    softmax<BN>(w.s, w.soft, sc, tile_unit(c.p, true), true, true, PLAIN);
    pack_weights(w);
    c.wait_stored();
}

// Every other tile of the first run: issues QK^T of `tile` and PV of the tile before it, and does the softmax of `tile`
// while PV runs.
template <typename Masked>
DEV void overlapped_tile(Consumer& c, Work& w, const Tile& t, const Rows& kept, int tile, Masked masked, float sc) {
    c.wait_k();
    wgmma_fence();
    issue_qk<true>(c, w, c.rk.slot());
    wgmma_commit();
    wait_v(c, w, t);
    wgmma_fence();
    issue_pv(c, w, c.rv.slot());
    wgmma_commit();
    Cells cells;
#if MASK
    if (masked) {
        prefetch_mask<BN>(c.p, t, rows_now(c, t, kept), c.wg * 64, tile, c.tid);
        cells = cells_of(c.p, rows_now(c, t, kept), tile);
    }
#endif
    wgmma_wait<1>();
    pin(w.s);
    c.release_k();
    if (masked) modify<BN>(w.s, c.p, rows_now(c, t, kept), tile, true, PLAIN, cells);
    else modify<BN>(w.s, c.p, rows_now(c, t, kept), tile, false, PLAIN);
    softmax<BN>(w.s, w.soft, sc, tile_unit(c.p, masked), masked, false, PLAIN);
    pin(w.s);
    hold_until(w.soft.l[0] + w.soft.l[1]);
    wgmma_wait<0>();
    pin(w.s);
    pin(w.o);
    c.release_v();
    pack_weights(w);
    rescale(w);
}

// The first run over the key tiles [lo, hi) of a query tile (entries of its list, with classes), last first.
DEV void first_run(Consumer& c, Work& w, const Tile& t, const Rows& kept, int lo, int hi, float sc) {
#if CLASSES
    int entry = c.m.sh->list[c.rq.slot()][lo];
    first_tile(c, w, t, kept, entry & 0x3ff, sc);
    // Consecutive masked tiles and consecutive other tiles each have a loop of their own, so that the latter has no code
    // for the mask.
#if D > 128 // where all registers are taken, one loop needs fewer
    for (int i = lo + 1; i < hi; i++) {
        entry = c.m.sh->list[c.rq.slot()][i];
        overlapped_tile(c, w, t, kept, entry & 0x3ff, (entry >> (10 + c.wg) & 1) != 0, sc);
    }
#else
    for (int i = lo + 1; i < hi;) {
        auto next = [&]() {
            entry = c.m.sh->list[c.rq.slot()][i];
            return (entry >> (10 + c.wg) & 1) != 0;
        };
#pragma unroll 1
        for (; i < hi && next(); i++) overlapped_tile(c, w, t, kept, entry & 0x3ff, Yes(), sc);
#pragma unroll 1
        for (; i < hi && !next(); i++) overlapped_tile(c, w, t, kept, entry & 0x3ff, No(), sc);
    }
#endif
#else
    first_tile(c, w, t, kept, hi - 1, sc);
#if MASK
    for (int tile = hi - 2; tile >= lo; tile--) overlapped_tile(c, w, t, kept, tile, Yes(), sc);
#else
    int tile = hi - 2;
    // In tiles [free_lo, free_hi) every row sees every key, so their loop compares no positions; the tiles outside do.
#if RIGHT
    const int free_hi = (score_last_key(t.m0 + c.wg * 64 + t.q_off, c.p.right) + 1) / BN;
    for (; tile >= max(lo, free_hi); tile--) overlapped_tile(c, w, t, kept, tile, Yes(), sc);
#endif
#if LEFT
    const int past = score_first_key(min(t.m0 + c.wg * 64 + 64, t.sq) - 1 + t.q_off, c.p.left);
    const int free_lo = max(lo, past <= 0 ? 0 : (past + BN - 1) / BN);
#else
    const int free_lo = lo;
#endif
#pragma unroll 1
    for (; tile >= free_lo; tile--) overlapped_tile(c, w, t, kept, tile, No(), sc);
#if LEFT
    for (; tile >= lo; tile--) overlapped_tile(c, w, t, kept, tile, Yes(), sc);
#endif
#endif
#endif
}

// A run after the first over the key tiles of a query tile: the same arithmetic, one product after another.
DEV void later_run(Consumer& c, Work& w, const Tile& t, int lo, int hi, int run) {
    c.wait_stored();
    bool first = true;
#if CLASSES
#pragma unroll 1
    for (int i = lo; i < c.m.sh->list_to[c.rq.slot()][c.wg]; i++) {
        const int entry = c.m.sh->list[c.rq.slot()][i], tile = entry & 0x3ff;
        const bool masked = first || (entry >> (10 + c.wg) & 1);
#else
#pragma unroll 1
    for (int tile = hi - 1; tile >= lo; tile--) {
        const bool masked = true;
#endif
        if (!first) {
            wait_v(c, w, t);
            wgmma_fence();
            issue_pv(c, w, c.rv.slot());
            wgmma_commit();
            wgmma_wait<0>();
            pin(w.o);
            c.release_v();
        }
        c.wait_k();
        wgmma_fence();
        issue_qk<false>(c, w, c.rk.slot());
        wgmma_commit();
        wgmma_wait<0>();
        pin(w.s);
        c.release_k();
        // Everything that depends on this zero is computed again for each tile instead of kept in registers.
        asm volatile("" ::: "memory");
        int zero = 0;
        asm volatile("" : "+r"(zero));
        const Params& later = params_at(c.p, zero);
        const Rows rows = rows_of(later, c.tile(), c.wg * 64, c.tid + zero);
#if PARKED
        volatile float* parked = &c.m.sh->parked[0][threadIdx.x - 128];
#pragma unroll
        for (int j = 0; j < PARKED; j++) parked[j * 128 * WGS] = w.o[j];
#endif
        modify<BN>(w.s, later, rows, tile, true, run, cells_of(later, rows, tile));
        softmax<BN>(w.s, w.soft, score_unit(later), tile_unit(later, true), masked, false, run);
        pack_weights(w);
#if PARKED
#pragma unroll
        for (int j = 0; j < PARKED; j++) w.o[j] = parked[j * 128 * WGS];
#endif
        rescale(w);
        first = false;
    }
}
