// What a query tile of attention is made of: its geometry, which keys its rows see, and its products with
// V.

// Geometry of a kernel: query rows of a tile, keys of a chunk, simdgroups.
template <typename T, int D_, int BQ_, int C_, int NSG_>
struct Geometry {
    static constant constexpr int D = D_;
    static constant constexpr int BQ = BQ_;
    static constant constexpr int C = C_;
    static constant constexpr int NSG = NSG_;
    // Rows of threadgroup tiles are padded by 16 bytes against bank conflicts.
    static constant constexpr int LDQ = D + 16 / int(sizeof(T));
    static constant constexpr int LDS = C + 4;
    // P takes the place of S where its elements are as wide.
    static constant constexpr bool IN_PLACE = sizeof(T) == 4;
    static constant constexpr int LDP = IN_PLACE ? LDS : C + 8;
    // Columns whose products are summed before they join the others: f32 has bits to lose in a long
    // chain of additions.
    static constant constexpr int RUN = sizeof(T) == 4 ? 32 : D;
    // Blocks of Q along D that each simdgroup keeps in registers for all chunks: all or none.
    static constant constexpr bool HOLDS_Q = BQ == 32 && D * int(sizeof(T)) <= 128;
    static constant constexpr int HELD = HOLDS_Q ? D / 8 : 1;
    static constant constexpr int ROW_BLOCKS = BQ / 8;
    static constant constexpr int KEY_BLOCKS = C / 8 / NSG;
    static constant constexpr int COLUMN_BLOCKS = (D / 8 + NSG - 1) / NSG;
    // Whether the simdgroups' last blocks of columns may lie past D.
    static constant constexpr bool RAGGED_COLUMNS = D / 8 % NSG != 0;
    static constant constexpr int ROWS = BQ / NSG;
    static constant constexpr int LANES = 32 / ROWS;
    static constant constexpr int CELLS = C / LANES;
    // The tile that classes are computed over.
    static constant constexpr int CLASS_BQ = CLASS_ROWS_AT(D);
    static constant constexpr int CLASS_BK = CLASS_KEYS_AT(D);
    static_assert(CLASS_BK % CELLS == 0 && C % CLASS_BK == 0, "a lane's cells lie in one class tile");
    // Floats that hold the tile of Q.
    static constant constexpr int Q_WORDS = BQ * LDQ * int(sizeof(T)) / 4;
    static_assert(Q_WORDS >= BQ + NSG, "the results of a pass take the place of Q");
};

// Which keys the rows of a tile see. Positions are 64-bit: offset plus row may pass 2^31.
struct Bounds {
    long offset;
    int window;
    int window_right;
    int keys;
};

METAL_FUNC bool sees(thread const Bounds& b, long row, long key) {
    const long p = row + b.offset;
    return (!do_causal || key <= score_last_key(p, 0))
        && (b.window < 0 || key >= score_first_key(p, b.window - 1))
        && (b.window_right < 0 || key <= score_last_key(p, b.window_right));
}

// First and one past the last key that row `low` opens and row `high` closes: (first, last) row of a
// tile bounds the keys that some row sees, (last, first) those that every row sees.
METAL_FUNC int2 key_range(thread const Bounds& b, long low, long high) {
    int start = 0, end = b.keys;
    if (b.window >= 0) { start = score_first_seen(low + b.offset, b.window - 1, b.keys); }
    if (do_causal) { end = score_end_seen(high + b.offset, 0, b.keys); }
    if (b.window_right >= 0) { end = min(end, score_end_seen(high + b.offset, b.window_right, b.keys)); }
    return int2(start, end);
}

template <typename T, bool is_bool>
METAL_FUNC float mask_cell(device const uchar* mask, long index) {
    if (is_bool) { return score_if_seen(0.0f, mask[index] != 0); }
    if (mask_dtype == 1) { return reinterpret_cast<device const float*>(mask)[index]; }
    if (mask_dtype == 2) { return float(reinterpret_cast<device const half*>(mask)[index]); }
    if (mask_dtype == 3) { return float(reinterpret_cast<device const bfloat*>(mask)[index]); }
    return float(reinterpret_cast<device const T*>(mask)[index]);
}

// The operands of one tile, moved to its head and sequence.
template <typename T>
struct Operands {
    device const T* q;
    KvRows<T> k;
    KvRows<T> v;
    device T* o;
    device const uchar* mask;
    device const uchar* blk;
    // Class tiles of a row of them.
    long blk_across;
    device float* lse;
    long mask_base;
    long mask_stride;
    float sink;
    float slope;
};

// Class of the class tile at column `t` of the row of class tiles at `first`; any other byte is mixed.
METAL_FUNC int class_of(device const uchar* blk, long first, long t) {
    const uchar kind = blk[first + t];
    return kind == CLASS_SKIP || kind == CLASS_FREE ? kind : CLASS_MIXED;
}

// Classes of the class tiles of the chunk at k0, two bits each; 0 where all of them are skipped.
template <typename G>
METAL_FUNC int chunk_classes(device const uchar* blk, long across, int q0, int k0) {
    const long first = long(q0 / G::CLASS_BQ) * across;
    int classes = 0;
    UNROLL for (int t = 0; t < G::C / G::CLASS_BK; ++t) {
        const int at = k0 / G::CLASS_BK + t;
        if (at < across) { classes |= class_of(blk, first, at) << (2 * t); }
    }
    return classes;
}

// Whether row `row` of the tile at q0 sees `key`.
template <typename T, typename G, bool is_bool>
METAL_FUNC bool sees_cell(
    thread const Operands<T>& at, thread const Bounds& bounds, int q0, int row, int key) {
    if (key >= bounds.keys || !sees(bounds, q0 + row, key)) { return false; }
    if (has_blk) {
        const int kind = class_of(at.blk, long(q0 / G::CLASS_BQ) * at.blk_across, key / G::CLASS_BK);
        if (kind != CLASS_MIXED) { return kind == CLASS_FREE; }
    }
    return !has_mask
        || !score_cell_hides(mask_cell<T, is_bool>(at.mask, at.mask_base + long(row) * at.mask_stride + key));
}

// The accumulators of O that a simdgroup holds: all rows with every NSG-th block of columns.
template <typename G>
struct Accumulators {
    simdgroup_matrix<float, 8, 8> block[G::ROW_BLOCKS][G::COLUMN_BLOCKS];
};

// First column of a simdgroup's block `j`; a block at or past D does not exist.
template <typename G>
METAL_FUNC int block_column(int j, ushort sg) { return (j * G::NSG + sg) * 8; }
template <typename G>
METAL_FUNC bool no_block(int column) { return G::RAGGED_COLUMNS && column >= G::D; }

// O += P V for the chunk at k0. Zero times NaN or infinity is NaN, so a careful pass takes the elements
// of V that are not finite as zero.
template <bool careful, typename T, typename G>
METAL_FUNC void add_values(
    thread Accumulators<G>& o, thread const Operands<T>& at, int k0, int keys, threadgroup const T* p_tile, Cell cell, ushort sg) {
    // Rolled: unrolled, the loop outgrows the instruction cache.
    NO_UNROLL for (int kb = 0; kb < G::C / 8; ++kb) {
        const int key = k0 + kb * 8;
        const int there = keys - key;
        if (there <= 0) { break; }
        simdgroup_matrix<T, 8, 8> p_block[G::ROW_BLOCKS];
        UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
            simdgroup_load(p_block[rb], p_tile + rb * 8 * G::LDP + kb * 8, G::LDP);
        }
        UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
            const int column = block_column<G>(j, sg);
            if (no_block<G>(column)) { break; }
            simdgroup_matrix<T, 8, 8> v_block;
            load_block<T, false>(v_block, at.v, key, column, align_k ? 8 : there, cell);
            if (careful) {
                UNROLL for (ushort e = 0; e < 2; ++e) {
                    const T v = v_block.thread_elements()[e];
                    v_block.thread_elements()[e] = isfinite(float(v)) ? v : T(0.0f);
                }
            }
            UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                simdgroup_multiply_accumulate(o.block[rb][j], p_block[rb], v_block, o.block[rb][j]);
            }
        }
    }
}

// Adds the elements of V that are not finite to the rows that see them, which a careful pass has left
// out: a weight is above zero, so that NaN stays NaN and an infinity keeps its sign.
template <typename T, typename G, bool is_bool>
METAL_FUNC void add_infinite_values(
    thread Accumulators<G>& o, thread const Operands<T>& at, thread const Bounds& bounds, int2 range, int q0, int rows, Cell cell, ushort sg) {
    NO_UNROLL for (int key = range.x; key < range.y; ++key) {
        device const T* v_row = kv_row(at.v, key) + cell.col;
        bool infinite = false;
        UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
            const int column = block_column<G>(j, sg);
            if (no_block<G>(column)) { break; }
            infinite |= !isfinite(float(v_row[column])) || !isfinite(float(v_row[column + 1]));
        }
        if (!infinite) { continue; }
        uint seen = 0;
        NO_UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
            const int r = rb * 8 + cell.row;
            if (r < rows && sees_cell<T, G, is_bool>(at, bounds, q0, r, key)) { seen |= 1u << rb; }
        }
        UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
            const int column = block_column<G>(j, sg);
            if (no_block<G>(column)) { break; }
            UNROLL for (ushort e = 0; e < 2; ++e) {
                const float v = float(v_row[column + e]);
                if (isfinite(v)) { continue; }
                UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    if ((seen >> rb & 1) != 0) { o.block[rb][j].thread_elements()[e] += v; }
                }
            }
        }
    }
}

// A score that came out infinite or NaN though Q and K are finite is computed again in a range that
// holds it; one that no f32 holds after scaling becomes the largest that does, with room for a bias.
template <typename T>
METAL_FUNC float finite_score(
    float s, float limit, threadgroup const T* q_row, device const T* k_row, int dim) {
    if (!isfinite(s)) {
        float sum = 0.0f;
        NO_UNROLL for (int d = 0; d < dim; ++d) {
            sum += (float(q_row[d]) * 0x1p-70f) * (float(k_row[d]) * 0x1p-70f);
        }
        if (!isfinite(sum)) { return s; }
        s = sum * 0x1p70f * 0x1p70f;
    }
    return clamp(s, -limit, limit);
}
