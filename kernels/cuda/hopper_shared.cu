// Shared memory, barriers and the order of the tiles for hopper.cu.

#define THREADS (128 * (WGS + 1))
#ifndef QBUF // tiles of Q, so that a CTA with several loads the next one early
#define QBUF 1
#endif

// Named barriers: this one, and GROUP_BARRIER + w for the threads of consumer warpgroup w.
#define BAR_PARKED 7
#define GROUP_BARRIER 8

// A position in a ring of N slots, N a power of two. `phase` is the parity that the slot's barriers have then.
template <int N>
struct Ring {
    u32 at;
    DEV_MEMBER u32 slot() const { return at % N; }
    DEV_MEMBER u32 phase() const { return at / N & 1; }
    DEV_MEMBER void next() { at++; }
};

#define TILE_BYTES (PANELS * BN * 128)
#define Q_BYTES (PANELS * BM * 128)

// Elements of O a thread that are saved to shared memory during the softmax of a run after the first, where
// registers are short.
#define PARKED (D <= 64 && WGS == 4 ? 16 : D >= 192 ? 28 : 0)

struct Shared {
    Tile tile[QBUF * WGS]; // the tile that each consumer's rows of Q are of
    u64 q_full[QBUF * WGS], q_empty[QBUF * WGS];
    u64 verdict[DONE]; // all consumers have ended a run
    u64 v_raw[STAGES]; // a tile of V has arrived that has yet to be cleaned
    RunsNeeded needed;
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

// Shared memory: pointers for ordinary access, and 32-bit addresses of tiles and barriers for the instructions.
struct Memory {
    u8* raw;
    Shared* sh;
    u32 base, q, k, v;
    u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw, verdict, listed;
};

DEV Memory memory_at(u8* raw) {
    Memory m;
    m.raw = raw;
    m.base = smem_u32(raw);
    m.q = m.base;
    m.k = m.base + QBUF * Q_BYTES;
    m.v = m.k + STAGES * TILE_BYTES;
    m.sh = (Shared*)(raw + QBUF * Q_BYTES + 2 * STAGES * TILE_BYTES);
    m.q_full = smem_u32(m.sh->q_full);
    m.q_empty = smem_u32(m.sh->q_empty);
    m.verdict = smem_u32(m.sh->verdict);
    m.v_raw = smem_u32(m.sh->v_raw);
#if CLASSES
    m.listed = smem_u32(m.sh->listed);
#endif
    m.k_full = smem_u32(m.sh->k_full);
    m.k_empty = smem_u32(m.sh->k_empty);
    m.v_full = smem_u32(m.sh->v_full);
    m.v_empty = smem_u32(m.sh->v_empty);
    return m;
}

// By the first warp: a barrier of each kind a lane.
DEV void init_barriers(const Memory& m) {
    const int i = threadIdx.x;
    if (i < QBUF * WGS) {
        bar_init(m.q_full + 8 * i, 1);
        bar_init(m.q_empty + 8 * i, 1);
    }
    if (i < STAGES) {
        bar_init(m.k_full + 8 * i, 1);
        bar_init(m.v_full + 8 * i, 1);
        bar_init(m.v_raw + 8 * i, 1);
        bar_init(m.k_empty + 8 * i, 4 * WGS);
        bar_init(m.v_empty + 8 * i, 4 * WGS);
    }
#if CLASSES
    if (i < QBUF) bar_init(m.listed + 8 * i, 32);
#endif
    if (i == 0) {
        for (int run = PLAIN; run < DONE; run++) bar_init(m.verdict + 8 * run, WGS);
        m.sh->needed = RunsNeeded{0, 0, 0};
    }
    bar_init_fence();
}

// The CTA's next run over its tiles, once all consumers have ended `run`. All warps ask after each.
DEV int next_run(const Memory& m, int run) {
    bar_wait(m.verdict + 8 * run, 0);
    // One lane's reading, so that the compiler knows that a warp stays together.
    return __shfl_sync(~0u, run_after(run, m.sh->needed), 0);
}

// A CTA's share of the tiles, a turn each. Where it has several and keys after a row are hidden, tiles go in pairs
// of a long and a short one, so that all shares take the same time; not where tiles are short and many.
struct Share {
    const Params& p;
    const bool paired;
    const int indices;
    DEV_MEMBER int index_at(int turn) const {
        return (int)(blockIdx.x + (paired ? turn >> 1 : turn) * gridDim.x);
    }
    DEV_MEMBER bool has(int turn) const { return index_at(turn) < indices; }
    DEV_MEMBER Tile tile_at(int turn) const { return tile_of(p, index_at(turn), paired ? 1 + (turn & 1) : 0); }
};

DEV Share share_of(const Params& p) {
    const bool paired = RIGHT && p.right < FAR && (!LEFT || p.left >= FAR) && D > 64 && gridDim.x < p.tiles;
    return Share{p, paired, paired ? p.tiles / p.tiles_m * ((p.tiles_m + 1) / 2) : p.tiles};
}
