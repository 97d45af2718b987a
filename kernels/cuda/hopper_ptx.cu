// Hopper primitives: barriers, bulk tensor copies, warpgroup matrix instructions. sm_90a only.
// No #include: the host puts this text before a kernel's own.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef long long int64_t; // in the text of Params

#define DEV [[maybe_unused]] static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__

#define HOPPER // to score_prelude.cu

#ifndef F16
#define F16 0
#endif
#if F16
#define WGMMA_T "f16"
#else
#define WGMMA_T "bf16"
#endif

// A CUtensorMap, passed by value.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

DEV u32 smem_u32(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// ---- mbarriers -----------------------------------------------------------------------------

DEV void bar_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

DEV void bar_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEV void bar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

DEV void bar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrives on the barrier at the same offset in CTA `cta` of the cluster.
DEV void bar_arrive_cluster(u32 bar, u32 cta) {
    asm volatile(
        "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(bar),
        "r"(cta)
        : "memory");
}

DEV void bar_wait(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
    } while (!done);
}

// Whether the phase of that parity has ended. Does not wait.
DEV bool bar_test(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

DEV void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Named barriers 1..15 among `threads` threads.
DEV void named_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEV void named_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEV void store_if(bool condition, u32 at, u32 value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.shared.u32 [%1], %2;\n}" ::"r"(
                     (u32)condition),
                 "r"(at), "r"(value)
                 : "memory");
}

// As `store_if`, to the same offset of CTA `cta` of the cluster.
DEV void store_cluster_if(bool condition, u32 at, u32 cta, u32 value) {
    asm volatile(
        "{\n.reg .pred p;\n.reg .b32 a;\nsetp.ne.u32 p, %0, 0;\nmapa.shared::cluster.u32 a, %1, %2;\n"
        "@p st.shared::cluster.u32 [a], %3;\n}" ::"r"((u32)condition),
        "r"(at), "r"(cta), "r"(value)
        : "memory");
}

// ---- bulk tensor copies --------------------------------------------------------------------

DEV void tma_load(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// One box of a map of five dimensions.
DEV void tma_load5_multicast(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3,
                             int c4, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(mask)
        : "memory");
}

// To the same offset of every CTA in `mask`; each one's barrier at that offset counts the bytes.
DEV void tma_load_multicast(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3,
                            u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(mask)
        : "memory");
}

DEV void tma_store(const TensorMap* map, u32 src, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

DEV void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

DEV void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

DEV void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

DEV void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What ordinary stores put in shared memory becomes visible to copies and matrix instructions.
DEV void fence_async_smem() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- kernels one after another --------------------------------------------------------------

// Waits until the kernel before has ended and what it wrote can be read, and lets the one after start,
// which waits likewise. Without programmatic dependent launches neither does anything.
DEV void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- registers and arithmetic --------------------------------------------------------------

template <int N>
DEV void regs_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
DEV void regs_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEV float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEV float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats to two 16-bit elements, `lo` in the low half.
DEV u32 pack2(float lo, float hi) {
    u32 d;
#if F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#endif
    return d;
}

DEV float bf16_to_f32(u16 x) {
    return __uint_as_float((u32)x << 16);
}

DEV float f16_to_f32(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEV void stmatrix4(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- warpgroup matrix instructions ---------------------------------------------------------

DEV void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEV void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
DEV void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving what makes or uses these registers across this point.
template <int N>
DEV void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps the wait that follows behind the arithmetic that `sum` results from. ptxas would move the wait up, before work
// that should overlap the product, but moves nothing past a warp barrier; the mask of this one depends on `sum`, which
// is never negative.
DEV void hold_until(float sum) {
    __syncwarp(sum < 0.0f ? 1u : ~0u);
}

// Descriptor of a tile of 128-byte rows with the 128-byte swizzle: eight rows to the next eight are
// 1,024 bytes; `lead` bytes to the next 64 columns (read only where the tile is transposed).
DEV u64 smem_desc(u32 addr, u32 lead) {
    return (u64)((addr & 0x3FFFF) >> 4) | ((u64)(lead >> 4) << 16) | ((u64)(1024 >> 4) << 32) |
           ((u64)1 << 62);
}

#define WG_S0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define WG_S1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define WG_S2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define WG_S3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define WG_S4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define WG_S5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define WG_S6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define WG_S7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define WG_S8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define WG_S9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define WG_S10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define WG_S11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define WG_S12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define WG_S13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define WG_S14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define WG_S15 "%120,%121,%122,%123,%124,%125,%126,%127"
#define WG_T1 WG_S0
#define WG_T2 WG_T1 "," WG_S1
#define WG_T3 WG_T2 "," WG_S2
#define WG_T4 WG_T3 "," WG_S3
#define WG_T5 WG_T4 "," WG_S4
#define WG_T6 WG_T5 "," WG_S5
#define WG_T7 WG_T6 "," WG_S6
#define WG_T8 WG_T7 "," WG_S7
#define WG_T9 WG_T8 "," WG_S8
#define WG_T10 WG_T9 "," WG_S9
#define WG_T11 WG_T10 "," WG_S10
#define WG_T12 WG_T11 "," WG_S11
#define WG_T13 WG_T12 "," WG_S12
#define WG_T14 WG_T13 "," WG_S13
#define WG_T15 WG_T14 "," WG_S14
#define WG_T16 WG_T15 "," WG_S15
#define WG_E(d, b) \
    "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), \
        "+f"(d[b + 5]), "+f"(d[b + 6]), "+f"(d[b + 7])
#define WG_O1(d) WG_E(d, 0)
#define WG_O2(d) WG_O1(d), WG_E(d, 8)
#define WG_O3(d) WG_O2(d), WG_E(d, 16)
#define WG_O4(d) WG_O3(d), WG_E(d, 24)
#define WG_O5(d) WG_O4(d), WG_E(d, 32)
#define WG_O6(d) WG_O5(d), WG_E(d, 40)
#define WG_O7(d) WG_O6(d), WG_E(d, 48)
#define WG_O8(d) WG_O7(d), WG_E(d, 56)
#define WG_O9(d) WG_O8(d), WG_E(d, 64)
#define WG_O10(d) WG_O9(d), WG_E(d, 72)
#define WG_O11(d) WG_O10(d), WG_E(d, 80)
#define WG_O12(d) WG_O11(d), WG_E(d, 88)
#define WG_O13(d) WG_O12(d), WG_E(d, 96)
#define WG_O14(d) WG_O13(d), WG_E(d, 104)
#define WG_O15(d) WG_O14(d), WG_E(d, 112)
#define WG_O16(d) WG_O15(d), WG_E(d, 120)

// G groups of 8 accumulators: N = 16 G columns. The numbers after are the operands that follow.
#define WG_SS(G, N, i0, i1, i2)                                                              \
    if constexpr (COLS == N)                                                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." WGMMA_T "." WGMMA_T    \
                     " {" WG_T##G "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, %" "" WG_NEXT_##G ";\n}" \
                     : WG_O##G(d)                                                            \
                     : "l"(a), "l"(b), "r"((int)acc), "n"(TB));
#define WG_RS(G, N, i0, i1, i2, i3, i4, i5)                                                  \
    if constexpr (COLS == N)                                                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." WGMMA_T "." WGMMA_T    \
                     " {" WG_T##G "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4           \
                     ", p, 1, 1, 1;\n}"                                                      \
                     : WG_O##G(d)                                                            \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"((int)acc));

#define WG_NEXT_1 "11"
#define WG_NEXT_2 "19"
#define WG_NEXT_3 "27"
#define WG_NEXT_4 "35"
#define WG_NEXT_5 "43"
#define WG_NEXT_6 "51"
#define WG_NEXT_7 "59"
#define WG_NEXT_8 "67"
#define WG_NEXT_9 "75"
#define WG_NEXT_10 "83"
#define WG_NEXT_11 "91"
#define WG_NEXT_12 "99"
#define WG_NEXT_13 "107"
#define WG_NEXT_14 "115"
#define WG_NEXT_15 "123"
#define WG_NEXT_16 "131"

// d (+)= A B: A 64 x 16 from shared memory, B 16 x COLS (TB: stored with the columns contiguous).
template <int COLS, int TB>
DEV void wgmma_ss(float (&d)[COLS / 2], u64 a, u64 b, bool acc) {
    WG_SS(1, 16, 8, 9, 10)
    WG_SS(2, 32, 16, 17, 18)
    WG_SS(3, 48, 24, 25, 26)
    WG_SS(4, 64, 32, 33, 34)
    WG_SS(5, 80, 40, 41, 42)
    WG_SS(6, 96, 48, 49, 50)
    WG_SS(7, 112, 56, 57, 58)
    WG_SS(8, 128, 64, 65, 66)
    WG_SS(9, 144, 72, 73, 74)
    WG_SS(10, 160, 80, 81, 82)
    WG_SS(11, 176, 88, 89, 90)
    WG_SS(12, 192, 96, 97, 98)
    WG_SS(13, 208, 104, 105, 106)
    WG_SS(14, 224, 112, 113, 114)
    WG_SS(15, 240, 120, 121, 122)
    WG_SS(16, 256, 128, 129, 130)
}

// d (+)= A B: A from registers, B 16 x COLS with the columns contiguous.
template <int COLS>
DEV void wgmma_rs(float (&d)[COLS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool acc) {
    WG_RS(1, 16, 8, 9, 10, 11, 12, 13)
    WG_RS(2, 32, 16, 17, 18, 19, 20, 21)
    WG_RS(3, 48, 24, 25, 26, 27, 28, 29)
    WG_RS(4, 64, 32, 33, 34, 35, 36, 37)
    WG_RS(5, 80, 40, 41, 42, 43, 44, 45)
    WG_RS(6, 96, 48, 49, 50, 51, 52, 53)
    WG_RS(7, 112, 56, 57, 58, 59, 60, 61)
    WG_RS(8, 128, 64, 65, 66, 67, 68, 69)
    WG_RS(9, 144, 72, 73, 74, 75, 76, 77)
    WG_RS(10, 160, 80, 81, 82, 83, 84, 85)
    WG_RS(11, 176, 88, 89, 90, 91, 92, 93)
    WG_RS(12, 192, 96, 97, 98, 99, 100, 101)
    WG_RS(13, 208, 104, 105, 106, 107, 108, 109)
    WG_RS(14, 224, 112, 113, 114, 115, 116, 117)
    WG_RS(15, 240, 120, 121, 122, 123, 124, 125)
    WG_RS(16, 256, 128, 129, 130, 131, 132, 133)
}
