// The output of a finished query tile of hopper.cu.

// Writes the group's 64 rows of O to where its rows of Q were, and notes rows that another run is to do again.
DEV void stage_output(const Consumer& c, Work& w, const Tile& t, const Rows& rows, const float (&inv)[2], const bool (&over)[2],
                      int run) {
    const int tid = c.late_tid();
    const int r = (tid >> 5) * 16 + (tid & 15); // of the group's 64
    const u32 at = w.q + r * 128;
    u32 zeros[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int chunk = (i & 3) * 2 + ((tid >> 4) & 1);
        u32 word[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            word[j] = pack2(w.o[8 * i + 2 * j] * inv[j & 1], w.o[8 * i + 2 * j + 1] * inv[j & 1]);
            test_finite(zeros[j & 1], word[j]);
        }
        stmatrix4(at + (i / 4) * BM * 128 + ((chunk ^ (r & 7)) << 4), word[0], word[1], word[2], word[3]);
    }
    // Predicated stores, not branches: past a branch that ptxas takes to part a warp, it keeps no descriptor in
    // uniform registers.
    const bool in[2] = {rows.row < t.sq, rows.row + 8 < t.sq};
    store_if(run == PLAIN && ((in[0] && !over[0] && zeros[0] != 0) || (in[1] && !over[1] && zeros[1] != 0)),
             smem_u32(&c.m.sh->needed.clean), 1);
    store_if((in[0] && over[0]) || (in[1] && over[1]), smem_u32(&c.m.sh->needed.exact), 1);
}

// Stores the staged rows by ordinary stores: with VARLEN, where tiles may hold rows of another sequence, and in runs that
// merge into what earlier runs stored.
DEV void store_rows(const Consumer& c, const Tile& t, int tid, int run) {
    const u8* own = c.m.raw + c.rq.slot() * Q_BYTES + c.wg * 64 * 128;
    if (run >= EXACT)
        merge_rows<D, BM>(c.p, t, t.m0 + c.wg * 64, 0, own, tid, run);
    else
        for (int i = tid; i < 64 * (D / 8); i += 128) {
            const int r = i / (D / 8), chunk = i % (D / 8);
            if (t.m0 + c.wg * 64 + r < t.sq)
                *(uint4*)(output_row(c.p, t, t.m0 + c.wg * 64 + r) + chunk * 8) =
                    *(const uint4*)(own + (chunk / 8) * BM * 128 + r * 128 + (((chunk & 7) ^ (r & 7)) << 4));
        }
}

// Stores them by a bulk copy.
DEV void store_tile(const Consumer& c, const Work& w, const Tile& t, const TensorMap* map_o) {
    if (c.tid != 0) return;
    if (t.m0 + c.wg * 64 < t.sq) {
#pragma unroll
        for (int i = 0; i < PANELS; i++) tma_store(map_o, w.q + i * BM * 128, i * 64, t.m0 + c.wg * 64, t.h, t.b);
    }
    tma_store_commit();
}
