// Products of 16-bit matrices by mma.sync (compute capability 8.0 and later), and the tiles of shared memory that they
// read. Macros: D (a multiple of 8), BF16.

// Columns of a tile: the instructions take 16 at once. Columns from D on are zero and never stored.
#define WIDTH ((D + 15) / 16 * 16)
#define PADDED (WIDTH != D)
// Rows of shared memory hold chunks of 16 bytes. Where 8 rows fill whole bank cycles, chunks are
// swizzled; elsewhere a chunk of padding makes the row's length odd. Both keep ldmatrix free of
// conflicts.
#define CHUNKS (WIDTH / 8)
#define SWIZZLE (WIDTH % 64 == 0)
#define ROW_CHUNKS (SWIZZLE ? CHUNKS : CHUNKS + (CHUNKS + 1) % 2)
#define ROW_BYTES (16 * ROW_CHUNKS)

DEV u32 chunk_at(u32 base, int row, int chunk) {
    return base + u32(row * ROW_BYTES + 16 * (SWIZZLE ? chunk ^ (row & 7) : chunk));
}

DEV void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Half as much, in r[0] and r[1]; lanes 0 to 15 name addresses.
DEV void ldmatrix2(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

DEV void ldmatrix4_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

#if BF16
#define MMA_TYPES "bf16.bf16"
#define ELEMENT TYPE_BF16
#define ROUND f32_to_bf16
#define WIDEN bf16_to_f32
#define CVT_PAIR "cvt.rn.bf16x2.f32"
#else
#define MMA_TYPES "f16.f16"
#define ELEMENT TYPE_F16
#define ROUND f32_to_f16
#define WIDEN f16_to_f32
#define CVT_PAIR "cvt.rn.f16x2.f32"
#endif

// c += a b, of 16 x 16 and 16 x 8 elements.
DEV void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to elements, the first in the low half.
DEV u32 pack(float low, float high) {
    u32 pair;
    asm(CVT_PAIR " %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEV float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies ROWS rows from `first` on to shared memory, zeros from row `end` on, by COUNT threads, of which this is `thread`.
template <int ROWS, int COUNT, typename Rows> DEV void load(u32 to, const Rows& from, int first, int end, bool vector, int thread) {
    const Rows tile = from.from(first);
    const int there = end - first;
    if (!vector) {
#pragma unroll 1
        for (int i = thread; i < ROWS * WIDTH; i += COUNT) {
            const int row = i / WIDTH, column = i % WIDTH;
            const u16 x = row < there && !(PADDED && column >= D) ? tile.at(row)[column] : u16(0);
            const u32 at = chunk_at(to, row, column / 8) + 2 * (column % 8);
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
        }
    } else if constexpr (Rows::IN_PAGES) {
        // All addresses before the first copy, for each waits for its entry of the block table.
        constexpr int COPIES = (ROWS * CHUNKS + COUNT - 1) / COUNT;
        const u16* at[COPIES];
#pragma unroll
        for (int n = 0; n < COPIES; n++) {
            const int i = thread + n * COUNT;
            at[n] = tile.at(i / CHUNKS) + 8 * (i % CHUNKS);
        }
#pragma unroll
        for (int n = 0; n < COPIES; n++) {
            const int i = thread + n * COUNT, row = i / CHUNKS, chunk = i % CHUNKS;
            if (COPIES * COUNT != ROWS * CHUNKS && i >= ROWS * CHUNKS) break;
            copy16(chunk_at(to, row, chunk), at[n], row < there && !(PADDED && chunk >= D / 8));
        }
    } else if constexpr (COUNT % CHUNKS == 0 && ROWS % (COUNT / CHUNKS) == 0) {
        // A thread has the same chunk of every STEP-th row.
        constexpr int STEP = COUNT / CHUNKS;
        const int row = thread / CHUNKS, chunk = thread % CHUNKS;
        const u16* at = tile.at(row) + 8 * chunk;
        const bool column = !(PADDED && chunk >= D / 8);
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++, at += STEP * from.stride)
            copy16(chunk_at(to, row + i * STEP, chunk), at, column && row + i * STEP < there);
    } else {
#pragma unroll
        for (int i = thread; i < ROWS * CHUNKS; i += COUNT) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            copy16(chunk_at(to, row, chunk), tile.at(row) + 8 * chunk, row < there && !(PADDED && chunk >= D / 8));
        }
    }
}

// As `load` for the Q of a tile of BM rows, which may be of several heads.
template <int COUNT> DEV void load_q(u32 to, const HeadRows<u16>& from, const Params& p, const Tile& t, bool vector, int thread) {
    if (p.pack == 1) return load<BM, COUNT>(to, from, t.m0, t.rows, vector, thread);
#pragma unroll 1
    for (int i = thread; i < BM * CHUNKS; i += COUNT) {
        const int local = i / CHUNKS, chunk = i % CHUNKS, row = t.m0 + local;
        const bool in = row < t.rows && !(PADDED && chunk >= D / 8);
        const u16* at = from.first + p.q_strides[2] * query_of(p, row) + p.q_strides[1] * (head_of(p, t, row) - t.h) + 8 * chunk;
        if (vector) {
            copy16(chunk_at(to, local, chunk), in ? at : from.first, in);
        } else {
            for (int c = 0; c < 8; c++) {
                const u16 x = in ? at[c] : u16(0);
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(chunk_at(to, local, chunk) + 2 * c), "h"(x) : "memory");
            }
        }
    }
}

// The address that a lane names to ldmatrix for 16 rows and 16 columns from `row` and `column` on: of A, or of a V that
// is transposed on the way; and of K. `further` then goes to other blocks, with what the compiler knows beforehand.
DEV u32 a_at(u32 base, int row, int column) {
    const int lane = threadIdx.x % 32;
    return chunk_at(base, row + lane % 16, column / 8 + lane / 16);
}
DEV u32 b_at(u32 base, int row, int column) {
    const int lane = threadIdx.x % 32;
    return chunk_at(base, row + lane % 8 + 8 * (lane / 16), column / 8 + lane / 8 % 2);
}

// `rows` is a multiple of 8 and `blocks` counts 16 columns. With the swizzle, a step over 16 columns flips bits of the
// address within 128 bytes: the block that `at` is of begins a row, or, with WN > 1, 64 columns.
DEV u32 further(u32 at, int rows, int blocks) {
    return (SWIZZLE ? (at ^ u32(32 * (blocks % 4))) + u32(128 * (blocks / 4)) : at + u32(32 * blocks)) + u32(rows * ROW_BYTES);
}
