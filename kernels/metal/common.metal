// What every kernel shares: function constants, the lane map, block loads.

using namespace metal;

constant bool align_q [[function_constant(200)]];
constant bool align_k [[function_constant(201)]];
constant bool has_mask [[function_constant(300)]];
constant bool do_causal [[function_constant(301)]];
constant bool has_sinks [[function_constant(302)]];
constant bool has_blk [[function_constant(303)]];
constant bool has_alibi [[function_constant(306)]];
constant bool has_lse [[function_constant(307)]];
constant bool is_varlen [[function_constant(308)]];
constant int mask_dtype [[function_constant(309)]];
constant bool has_window [[function_constant(311)]];
constant bool has_softcap [[function_constant(312)]];
constant bool is_paged [[function_constant(313)]];
constant bool has_key_lengths [[function_constant(314)]];
constant bool packs_queries [[function_constant(315)]];
constant int nsg [[function_constant(322)]];
constant int blk_bq [[function_constant(400)]];
constant int blk_bk [[function_constant(401)]];
constant bool has_cu_q = is_varlen || packs_queries;
constant bool has_extra = has_window || has_lse || has_cu_q || has_key_lengths;

// What score.h needs of MSL. A score that overflows is left alone: the careful pass computes it again.
#define SCORE_FN METAL_FUNC
#define SCORE_PRODUCT(a, b) ((a) * (b))
#define SCORE_FINITE(x) (x)
#define SCORE_ADDED(s, a, b) ((s) + (a) * (b))
#define SCORE_TANH precise::tanh
#define SCORE_ABS abs
#define NEG_INF (-INFINITY)

// Apple's front end leaves loops rolled, and an array of matrices that a loop variable indexes stays in
// memory: loops over such arrays are unrolled whole.
#define UNROLL _Pragma("clang loop unroll(full)")
#define NO_UNROLL _Pragma("clang loop unroll(disable)")
#define LOOP_HINT(text) _Pragma(#text)
#define UNROLL_BY(count) LOOP_HINT(clang loop unroll_count(count))

// The cell of an 8x8 matrix that a lane holds first; the second is the next column.
struct Cell {
    ushort row;
    ushort col;
};

METAL_FUNC Cell lane_cell(ushort lane) {
    const ushort quad = lane / 4;
    return Cell{ushort((quad & 4) + (lane / 2) % 4), ushort((quad & 2) * 2 + (lane % 2) * 2)};
}

// The rows of the keys or values of a head: every kernel reaches K and V through kv_row and load_block. In pages of
// 2^shift keys, `table` names the sequence's pages.
template <typename T>
struct KvRows {
    device const T* first; // key 0, or the first slot of page 0
    long stride;
    long page_stride;
    device const int* table;
    int shift;
    uint pages;
};

// Row `key`. A page that the pool does not have counts as page 0: nothing is read outside the pool.
template <typename T>
METAL_FUNC device const T* kv_row(thread const KvRows<T>& rows, long key) {
    if (!is_paged) { return rows.first + key * rows.stride; }
    const uint named = uint(rows.table[key >> rows.shift]);
    const long page = named < rows.pages ? long(named) : 0;
    return rows.first + page * rows.page_stride + (key & ((1L << rows.shift) - 1)) * rows.stride;
}

// Loads 8 columns from `column` on of the 8 rows from `key`, a multiple of 8, on. Rows from `there` on count as zero and
// are not read. Transposed, a row becomes a column.
template <typename T, bool transpose>
METAL_FUNC void load_block(
    thread simdgroup_matrix<T, 8, 8>& block, thread const KvRows<T>& rows, long key, int column, int there, Cell cell) {
    // Pages of fewer than 8 keys have the rows in several places.
    if (there >= 8 && !(is_paged && rows.shift < 3)) {
        simdgroup_load(block, kv_row(rows, key) + column, ulong(rows.stride), ulong2(0, 0), transpose);
        return;
    }
    UNROLL for (ushort e = 0; e < 2; ++e) {
        const ushort r = transpose ? ushort(cell.col + e) : cell.row;
        const ushort c = transpose ? cell.row : ushort(cell.col + e);
        block.thread_elements()[e] = int(r) < there ? kv_row(rows, key + r)[column + c] : T(0.0f);
    }
}
