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
constant int nsg [[function_constant(322)]];
constant int blk_bq [[function_constant(400)]];
constant int blk_bk [[function_constant(401)]];
constant bool has_extra = has_window || has_lse || is_varlen;

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

// Row `key` of the keys or values of a head, whose rows lie `stride` elements apart: every kernel reaches K and V
// through this function. Eight rows from a multiple of 8 on lie one stride apart.
template <typename T>
METAL_FUNC device const T* kv_row(device const T* rows, long stride, long key) { return rows + key * stride; }

// Loads the 8x8 block at `src`, of which the first `rows` source rows are there and the others
// count as zero and are not read. Transposed, a source row becomes a column.
template <typename T, bool transpose>
METAL_FUNC void load_block(
    thread simdgroup_matrix<T, 8, 8>& block, device const T* src, long stride, int rows, Cell cell) {
    if (rows >= 8) {
        simdgroup_load(block, src, ulong(stride), ulong2(0, 0), transpose);
        return;
    }
    UNROLL for (ushort e = 0; e < 2; ++e) {
        const ushort r = transpose ? ushort(cell.col + e) : cell.row;
        const ushort c = transpose ? cell.row : ushort(cell.col + e);
        block.thread_elements()[e] = int(r) < rows ? src[long(r) * stride + long(c)] : T(0.0f);
    }
}
