// The producer warpgroup of hopper.cu: copies of Q, K and V, the list of key tiles, and the cleaning of V.

// The warps before it copy, or list.
#define CLEANING_WARP (CLASSES || PAGED ? 2 : 1)

// Entry `i` of the key tiles of a query tile, last tile first.
#if CLASSES
#define TILE_AT(i) (m.sh->list[rq.slot()][i] & 0x3ff)
#else
#define TILE_AT(i) (t.hi - 1 - (i))
#endif

// The last warp cleans V in runs after the first, between its copy and the consumers. Until then it waits at a named
// barrier: to poll a memory barrier takes issue slots from the consumers.
DEV void clean_values(const Memory& m, int lane) {
    named_sync(BAR_PARKED, 128 * WGS + 32);
    int run = PLAIN;
    u32 cleaned = 0;
    while (run != DONE) {
        while (run != PLAIN) {
            const u32 slot = (m.sh->v_at + cleaned) % STAGES;
            const bool there = bar_test(m.v_raw + 8 * slot, cleaned / STAGES & 1);
            if (__any_sync(~0u, there)) {
                bar_wait(m.v_raw + 8 * slot, cleaned / STAGES & 1);
                u8* tile = m.raw + (m.v - m.base) + slot * TILE_BYTES;
                if (clean_halves<F16>(tile, TILE_BYTES, lane, 32, run)) m.sh->needed.count = 1;
                fence_async_smem();
                __syncwarp();
                if (lane == 0) bar_arrive(m.v_full + 8 * slot);
                cleaned++;
            } else if (__any_sync(~0u, bar_test(m.verdict + 8 * run, 0))) {
                break;
            }
        }
        run = next_run(m, run);
    }
}

#if CLASSES
// The second warp lists the key tiles of a query tile, one tile ahead.
DEV void list_key_tiles(const Memory& m, const Params& p, const Share& share, int lane) {
    Ring<QBUF> rq = {QBUF};
    for (int run = PLAIN; run != DONE; run = next_run(m, run)) {
        for (int turn = 0; share.has(turn); turn++) {
            const Tile t = share.tile_at(turn);
            const u32 b = rq.slot();
            for (int w = 0; w < WGS; w++) bar_wait(m.q_empty + 8 * (b * WGS + w), rq.phase());
            const int len = list_tiles(m.sh->list[b], m.sh->list_from[b], m.sh->list_to[b], p, t, lane);
            if (lane == 0) m.sh->list_len[b] = len;
            bar_arrive(m.listed + 8 * b);
            rq.next();
        }
    }
}
#endif

// Copies a key tile of K or V to `dst`, by the lanes that LOADING names.
#if PAGED
#define LOADING true
// A lane has every 32nd of the boxes, so that all look up their pages at once. Boxes past the last key are left out, and
// so are the entries of the table that would name their pages.
DEV void load_kv(const TensorMap* map, u32 dst, u32 full, const KvHead& kv, int tile, int lane) {
    const int box = kv.box(), first = tile * BN;
    const int boxes = (min(BN, kv.keys - first) + box - 1) / box;
    if (lane == 0) bar_expect(full, boxes * box * PANELS * 128);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < boxes * PANELS; i += 32) {
        const int c = i % PANELS, r = i / PANELS * box;
        tma_load(dst + (c * BN + r) * 128, map, full, c * 64, kv.row(first + r), kv.head, kv.page(first + r));
    }
}
#else
#define LOADING (lane == 0)
DEV void load_kv(const TensorMap* map, u32 dst, u32 full, const KvHead& kv, int tile, int) {
    bar_expect(full, TILE_BYTES);
#pragma unroll 1
    for (int c = 0; c < PANELS; c++)
        tma_load(dst + c * BN * 128, map, full, c * 64, kv.row(tile), kv.head, kv.batch);
}
#endif

// Gives every consumer its tile, and its rows of Q if the tile sees keys.
DEV void load_q(const Memory& m, const Params& p, const TensorMap* map, const Ring<QBUF>& rq, const Tile& t, int n) {
#pragma unroll 1
    for (int w = 0; w < WGS; w++) {
        const u32 full = m.q_full + 8 * (rq.slot() * WGS + w);
        bar_wait(m.q_empty + 8 * (rq.slot() * WGS + w), rq.phase());
        m.sh->tile[rq.slot() * WGS + w] = t;
        if (n == 0) {
            bar_arrive(full);
            continue;
        }
        bar_expect(full, PANELS * 8192);
#pragma unroll 1
        for (int c = 0; c < PANELS; c++)
            tma_load(m.q + rq.slot() * Q_BYTES + c * BM * 128 + w * 8192, map, full, c * 64, t.q_start + t.m0 + w * 64,
                     t.h, batch_of_rows(p, t));
    }
}

// A warp copies Q and K, V, or all of them, for all runs: V of a tile after K of the next.
template <bool KEYS, bool VALUES>
DEV void load_tiles(const Memory& m, const Params& p, const Share& share, const TensorMap* map_q, const TensorMap* map_k,
                    const TensorMap* map_v, int lane) {
    Ring<QBUF> rq = {QBUF};
    Ring<STAGES> rk = {STAGES}, rv = {STAGES}; // slots are free at first
    for (int run = PLAIN; run != DONE; run = next_run(m, run)) {
        const u32 v_there = run == PLAIN ? m.v_full : m.v_raw;
        for (int turn = 0; share.has(turn); turn++) {
            const Tile t = share.tile_at(turn);
            const KvHead kv = kv_head_of(p, t);
            int n = t.hi - t.lo;
#if CLASSES
            // Q comes while the list is made, if its place is not the last tile's.
            if (lane == 0 && QBUF > 1) load_q(m, p, map_q, rq, t, n);
            bar_wait(m.listed + 8 * rq.slot(), rq.phase() ^ 1);
            n = m.sh->list_len[rq.slot()];
#endif
            if (LOADING) {
                for (int i = 0; i <= n; i++) {
                    if (KEYS && i < n) {
                        bar_wait(m.k_empty + 8 * rk.slot(), rk.phase());
                        load_kv(map_k, m.k + rk.slot() * TILE_BYTES, m.k_full + 8 * rk.slot(), kv, TILE_AT(i), lane);
                        rk.next();
                    }
                    if (KEYS && lane == 0 && i == 0 && !(CLASSES && QBUF > 1)) load_q(m, p, map_q, rq, t, n);
                    if (VALUES && i > 0) {
                        bar_wait(m.v_empty + 8 * rv.slot(), rv.phase());
                        load_kv(map_v, m.v + rv.slot() * TILE_BYTES, v_there + 8 * rv.slot(), kv, TILE_AT(i - 1), lane);
                        rv.next();
                    }
                }
            }
            __syncwarp();
            rq.next();
        }
    }
}
