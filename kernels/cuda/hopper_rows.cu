// Finished rows of O: their address, the test for finite elements, and the merge of a later run.

// The first element of O's row `row` of a tile.
DEV u16* output_row(const Params& p, const Tile& t, int row) {
    return (u16*)p.o + (i64)batch_of_rows(p, t) * p.o_strides[0] + (i64)t.h * p.o_strides[1] +
           (i64)(t.q_start + row) * p.o_strides[2];
}

DEV float half_to_f32(u16 x) { return F16 ? f16_to_f32(x) : bf16_to_f32(x); }

DEV bool is_finite(u16 x) { return (x & 0x7fff) < (F16 ? 0x7c00 : 0x7f80); }

// Adds zero times two finished elements of O to `zeros`: NaN once one is not finite.
DEV void test_finite(u32& zeros, u32 pair) {
#if F16
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
#endif
}

// Merges a run after CLEAN into 64 rows of O from `row` on, columns from `column` on: its WIDTH columns are staged in
// panels of ROWS rows. The run EXACT replaces rows in which the speculation failed; the runs that count put infinities
// and NaN where a row sees some.
template <int WIDTH, int ROWS>
DEV void merge_rows(const Params& p, const Tile& t, int row, int column, const u8* staged, int tid, int run) {
#pragma unroll 1
    for (int i = tid; i < 64 * WIDTH; i += 128) {
        const int r = i / WIDTH, c = i % WIDTH;
        if (row + r >= t.sq) return;
        const u16 x = *(const u16*)(staged + (c / 64) * ROWS * 128 + r * 128 + ((c / 8 % 8 ^ (r & 7)) << 4) + c % 8 * 2);
        u16* to = output_row(p, t, row + r) + column + c;
        if (run == EXACT) {
            if (!is_finite(*to)) *to = x;
        } else {
            *to = (u16)pack2(counted(half_to_f32(*to), half_to_f32(x), run), 0.0f);
        }
    }
}

// Which further runs the rows and elements found so far need.
struct RunsNeeded {
    u32 clean; // an element of O is not finite
    u32 exact; // the speculation failed in a row
    u32 count; // an element of V is not finite
};

DEV int run_after(int run, const volatile RunsNeeded& needed) {
    if (run == PLAIN) return needed.clean ? CLEAN : needed.exact ? EXACT : DONE;
    if (run == CLEAN && needed.exact) return EXACT;
    if (run <= EXACT) return needed.count ? UPWARD : DONE;
    return run + 1;
}

// O and log-sum-exp of `rows` rows from `row` on that see no key, by the 128 threads of a group.
DEV void write_unseen(const Params& p, const Tile& t, int row, int rows, int tid) {
    tid = opaque(tid);
    u16* o = (u16*)p.o + (i64)batch_of_rows(p, t) * p.o_strides[0] + (i64)t.h * p.o_strides[1] +
             (i64)t.q_start * p.o_strides[2];
    float* lse = p.lse + (i64)batch_of_rows(p, t) * p.lse_strides[0] + (i64)t.h * p.lse_strides[1] +
                 t.q_start;
#pragma unroll 1
    for (int i = tid; i < rows * (D / 8); i += 128) {
        const int r = row + i / (D / 8);
        if (r < t.sq)
            *(uint4*)(o + r * p.o_strides[2] + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    if (p.lse && tid < rows && row + tid < t.sq)
        lse[row + tid] = NEG_INF;
}

#if VARLEN
// Zeroes rows [first, ROWS) of V, by the 128 threads of a group. They are another sequence's, past its length, or what
// was there before: their weights are 0, but 0 times NaN or infinity is NaN.
template <int WIDTH, int ROWS>
DEV void clear_rows(u8* panels, int first, int tid) {
    first = max(first, 0);
    for (int i = tid; i < WIDTH * (ROWS - first) * 8; i += 128) {
        const int row = first + i / 8 % (ROWS - first), panel = i / 8 / (ROWS - first);
        *(uint4*)(panels + (panel * ROWS + row) * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
}
#endif
