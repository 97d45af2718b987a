// The query tile of a threadblock and the key tiles that it visits. The kernel defines BM, BN, D, MASK, PAGED (whether K and
// V lie in pages) and PACK: whether the query heads of one key/value head may share a tile, row r of it being query
// r / pack of head r % pack.

#define CLASS_ROWS CLASS_ROWS_AT(D)
#define CLASS_KEYS CLASS_KEYS_AT(D)

struct Tile {
    int b, h, kv_head;     // batch entry of Q and O, 0 where queries are packed; first head of the rows
    int kv_b;              // sequence of the block table, or batch entry of K and V, 0 where keys are packed
    int m0, rows;          // first row; rows of all tiles
    int sq, sk;            // lengths of the sequence
    i64 q_start, k_start;  // its first rows, if packed
    i64 q_off;             // position of its row 0 among its keys
    int split;
    int lo, hi;            // key tiles [lo, hi)
    int free_lo, free_hi;  // keys that every row sees
};

DEV int query_of(const Params& p, int row) { return PACK ? row / p.pack : row; }
DEV int head_of(const Params& p, const Tile& t, int row) { return PACK ? t.h + row % p.pack : t.h; }

// The bounds show a row the keys [first_key, end_key).
DEV int first_key(const Params& p, const Tile& t, int row) {
    return p.left < 0 ? 0 : score_first_seen(query_of(p, row) + t.q_off, p.left, t.sk);
}

DEV int end_key(const Params& p, const Tile& t, int row) {
    return p.right < 0 ? t.sk : score_end_seen(query_of(p, row) + t.q_off, p.right, t.sk);
}

// Longest rows first, so that short ones fill the end; heads whose keys fit the cache together.
DEV Tile tile_of(const Params& p, u32 block) {
    Tile t;
    t.split = int(block % u32(p.splits));
    const u32 index = block / u32(p.splits);
    const u32 per = u32(p.section) * u32(p.tiles_m);
    const u32 s = index / per, r = index - s * per;
    const u32 heads = u32(p.heads / p.pack);
    const u32 first = s * u32(p.section), rest = u32(p.batch) * heads - first;
    const u32 in = u32(p.section) < rest ? u32(p.section) : rest;
    const u32 m = r / in, bh = first + (r - m * in);
    t.b = int(bh / heads);
    t.h = int(bh - u32(t.b) * heads) * p.pack;
    t.kv_head = t.h / p.kv_group;
    t.m0 = (p.tiles_m - 1 - int(m)) * BM;
    t.sq = p.sq;
    t.sk = p.sk;
    t.q_start = t.k_start = 0;
    t.q_off = p.q_off;
    t.kv_b = t.b;
    if (p.key_lengths) t.sk = int(min(p.key_lengths[t.b], u32(p.sk)));
    if (p.cu_k) {
        t.k_start = p.cu_k[t.b];
        t.sk = int(p.cu_k[t.b + 1] - t.k_start);
        t.kv_b = 0;
    }
    if (p.cu_q) {
        t.q_start = p.cu_q[t.b];
        t.sq = int(p.cu_q[t.b + 1] - t.q_start);
        t.b = 0;
    }
    if (p.bottom_right) t.q_off = i64(t.sk) - t.sq;
    t.lo = t.hi = t.free_lo = t.free_hi = 0;
    t.rows = t.sq * p.pack;
    if (t.m0 >= t.rows) return t;
    const int last = (t.rows - t.m0 < BM ? t.rows : t.m0 + BM) - 1;
    t.free_lo = first_key(p, t, last);
    t.free_hi = end_key(p, t, t.m0);
    t.lo = first_key(p, t, t.m0) / BN;
    const int end = end_key(p, t, last);
    t.hi = end / BN + (end % BN != 0);
    if (t.hi < t.lo) t.hi = t.lo;
    if (p.splits > 1) {
        const int share = (t.hi - t.lo + p.splits - 1) / p.splits;
        const i64 lo = t.lo + i64(share) * t.split;
        t.lo = lo < t.hi ? int(lo) : t.hi;
        t.hi = t.hi - t.lo < share ? t.hi : t.lo + share;
    }
    return t;
}

DEV i64 row_offset(const i64 strides[3], int b, int h, int row) {
    return strides[0] * b + strides[1] * h + strides[2] * row;
}

// Rows of one head, `stride` elements apart.
template <typename T> struct HeadRows {
    static constexpr bool IN_PAGES = false;
    const T* first;
    i64 stride;
    DEV_MEMBER const T* at(int row) const { return first + stride * row; }
    DEV_MEMBER HeadRows from(int row) const { return {at(row), stride}; }
};

template <typename T> DEV HeadRows<T> q_rows(const Params& p, const Tile& t) {
    return {(const T*)p.q + row_offset(p.q_strides, t.b, t.h, 0) + p.q_strides[2] * t.q_start, p.q_strides[2]};
}

// Rows of one head in pages that the block table of a sequence names. Every row has an address: one past the last has
// the last one's, and an entry that names no page of the pool stands for page 0.
template <typename T> struct PagedRows {
    static constexpr bool IN_PAGES = true;
    const T* first; // of page 0
    i64 page_stride, stride;
    const int* table;
    u32 pages;
    int shift, before, last;
    DEV_MEMBER const T* at(int row) const {
        const int r = min(before + row, last);
        const u32 page = u32(__ldg(table + (r >> shift)));
        return first + page_stride * (page < pages ? page : 0) + stride * (r & ((1 << shift) - 1));
    }
    DEV_MEMBER PagedRows from(int row) const { return {first, page_stride, stride, table, pages, shift, before + row, last}; }
};

// The rows of K or V that the tile's heads read: every kernel on tiles reaches keys and values through this
// function, `from` (the rows of a key tile) and `at` (one of them).
#if PAGED
template <typename T> using KvRows = PagedRows<T>;
template <typename T> DEV KvRows<T> kv_rows(const Params& p, const Tile& t, const void* base, const i64 (&strides)[3]) {
    return {(const T*)base + strides[1] * t.kv_head, strides[0], strides[2], p.block_table + p.per_sequence * t.kv_b,
            u32(p.pages), p.page_shift, 0, t.sk - 1};
}
#else
template <typename T> using KvRows = HeadRows<T>;
template <typename T> DEV KvRows<T> kv_rows(const Params& p, const Tile& t, const void* base, const i64 (&strides)[3]) {
    return {(const T*)base + row_offset(strides, t.kv_b, t.kv_head, 0) + strides[2] * t.k_start, strides[2]};
}
#endif

// The row of the partial results.
DEV i64 result_row(const Params& p, const Tile& t, int row) {
    return (i64(t.b) * p.heads + head_of(p, t, row)) * p.rows + t.q_start + query_of(p, row);
}

DEV i64 o_offset(const Params& p, const Tile& t, int row) {
    return p.o_strides[0] * t.b + p.o_strides[1] * head_of(p, t, row) + p.o_strides[2] * (t.q_start + query_of(p, row));
}

DEV void store_lse(const Params& p, const Tile& t, int row, float lse) {
    if (p.lse) p.lse[p.lse_strides[0] * t.b + p.lse_strides[1] * head_of(p, t, row) + t.q_start + query_of(p, row)] = lse;
}

// Walks every STEP-th of the key tiles that are not skipped. Classes are looked up for 32 of them at once, a tile a
// lane.
template <int STEP> struct Walk {
    int at, end;
#if MASK
    int group;        // first tile of the 32 whose classes are known
    u32 live, plain;  // of those: not skipped; free of the mask

    DEV_MEMBER void look(const Params& p, const Tile& t, int from) {
        group = from;
        live = ALL_LANES;
        plain = 0;
        if (p.classes) {
            const int tile = from + STEP * int(threadIdx.x % 32);
            bool some = false, all_free = tile < end;
            if (tile < end) {
                const int last = (t.rows - t.m0 < BM ? t.rows : t.m0 + BM) - 1, last_key = (t.sk - 1) / CLASS_KEYS;
#pragma unroll 4
                for (int row = query_of(p, t.m0) / CLASS_ROWS; row <= query_of(p, last) / CLASS_ROWS; row++) {
                    const u8* classes = p.classes + i64(row) * p.classes_stride;
#pragma unroll
                    for (int key = 0; key < BN; key += CLASS_KEYS) {
                        const u8 c = classes[min((tile * BN + key) / CLASS_KEYS, last_key)];
                        some |= c != CLASS_SKIP;
                        all_free &= c == CLASS_FREE;
                    }
                }
            }
            live = __ballot_sync(ALL_LANES, some);
            plain = __ballot_sync(ALL_LANES, all_free);
        }
    }

    // Moves to the first tile from `from` on that is not skipped, or to the end.
    DEV_MEMBER void seek(const Params& p, const Tile& t, int from) {
        while (from < end) {
            if (from - group >= 32 * STEP) look(p, t, from);
            const u32 ahead = live >> ((from - group) / STEP);
            if (ahead) {
                at = from + STEP * (__ffs(int(ahead)) - 1);
                if (at < end) return;
                break;
            }
            from = group + 32 * STEP;
        }
        at = end;
    }

    DEV_MEMBER Walk(const Params& p, const Tile& t, int first) : at(first), end(t.hi), group(first) {
        look(p, t, first);
        seek(p, t, first);
    }

    // Whether the tile it stands at needs no mask.
    DEV_MEMBER bool is_plain() const { return (plain >> ((at - group) / STEP)) & 1; }
#else
    DEV_MEMBER Walk(const Params& p, const Tile& t, int first) : at(first), end(t.hi) {}
    DEV_MEMBER void seek(const Params& p, const Tile& t, int from) { at = from; }
    DEV_MEMBER bool is_plain() const { return true; }
#endif

    DEV_MEMBER void next(const Params& p, const Tile& t) { seek(p, t, at + STEP); }
};
