// Ways of writing that large kernels use: loaders as classes, fragments, macros for unrolling.
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

using namespace metal;

#define UNROLL _Pragma("clang loop unroll(full)")
#define FOR_UNROLL(x) UNROLL for (x)

constant bool align_rows [[function_constant(200)]];
constant int row_stride [[function_constant(201)]];
constant constexpr int TILE_ROWS = 8;
constant float weights[4] = {0.25, 0.5, 0.75, 1.0};

struct Args {
  int rows;
  int cols;
  float scale;
  ulong strides[2];
};

template <typename T>
struct Limits {
  static constexpr constant T lowest = -metal::numeric_limits<T>::infinity();
};

template <typename T, int Rows, int Cols, int Threads>
struct Loader {
  static constant constexpr const int per_thread = Rows * Cols / Threads;
  const device T* src;
  threadgroup T* dst;
  const int ld;
  const short start;

  METAL_FUNC Loader(const device T* s, threadgroup T* d, int stride, ushort tid) thread
      : src(s), dst(d), ld(stride), start(tid * per_thread) {}

  METAL_FUNC void load(short limit) const thread {
    FOR_UNROLL(short i = 0; i < per_thread; i++) {
      const short at = start + i;
      const short r = at / Cols, c = at % Cols;
      dst[at] = r < limit ? src[r * ld + c] : T(0);
    }
  }
  METAL_FUNC void next() thread { src += Cols; }
};

template <typename T>
struct Frag {
  typedef metal::vec<T, 2> frag_type;
  typedef metal::simdgroup_matrix<T, 8, 8> mat_type;

  template <typename U>
  METAL_FUNC static constexpr void mma(
      thread frag_type& d, thread vec<U, 2>& a, thread vec<U, 2>& b, thread frag_type& c) {
    mat_type dm, cm;
    metal::simdgroup_matrix<U, 8, 8> am, bm;
    reinterpret_cast<thread vec<U, 2>&>(am.thread_elements()) = a;
    reinterpret_cast<thread vec<U, 2>&>(bm.thread_elements()) = b;
    reinterpret_cast<thread frag_type&>(cm.thread_elements()) = c;
    simdgroup_multiply_accumulate(dm, am, bm, cm);
    d = reinterpret_cast<thread frag_type&>(dm.thread_elements());
  }
  METAL_FUNC static constexpr short2 coord(ushort lane) {
    const short qid = lane / 4;
    return short2{short((qid & 2) * 2 + (lane % 2) * 2), short((qid & 4) + (lane / 2) % 4)};
  }
};

// out = scale * A * A^T for one tile of 8 rows, then a softmax over its rows.
template <typename T, typename AccumT = float>
kernel void gram_softmax(
    const device T* a [[buffer(0)]],
    device T* out [[buffer(1)]],
    const constant Args* args [[buffer(2)]],
    const device float* bias [[buffer(3), function_constant(align_rows)]],
    uint lane [[thread_index_in_simdgroup]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint3 lid [[thread_position_in_threadgroup]]) {
  (void)lid;
  ulong3 wide{tid.x, tid.y, tid.z};
  a += wide.x * args->strides[0];
  out += wide.x * args->strides[1];

  threadgroup T tile[TILE_ROWS * 8];
  Loader<T, TILE_ROWS, 8, 32> loader(a, tile, row_stride, lane);
  const short2 at = Frag<AccumT>::coord(lane);
  typename Frag<AccumT>::frag_type sum = {0, 0};
  for (int k = 0; k < args->cols; k += 8) {
    loader.load(align_rows ? TILE_ROWS : short(args->rows));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    metal::vec<T, 2> af, bf;
    af.x = tile[at.y * 8 + at.x];
    af.y = tile[at.y * 8 + at.x + 1];
    bf = metal::vec<T, 2>(tile[at.x * 8 + at.y], tile[(at.x + 1) * 8 + at.y]);
    Frag<AccumT>::mma(sum, af, bf, sum);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    loader.next();
  }
  sum *= args->scale * M_LOG2E_F * weights[3];
  if (align_rows) {
    sum += float2(bias[at.x], bias[at.x + 1]) * M_LOG2E_F;
  }
  AccumT top = Limits<AccumT>::lowest;
  UNROLL
  for (short i = 0; i < 2; i++) {
    top = max(top, sum[i]);
  }
  top = max(top, simd_shuffle_xor(top, ushort(1)));
  top = max(top, simd_shuffle_xor(top, ushort(8)));
  sum = fast::exp2(sum - top);
  AccumT total = sum.x + sum.y;
  total += simd_shuffle_xor(total, 1);
  total += simd_shuffle_xor(total, 8);
  const AccumT inverse = total == 0 ? AccumT(0) : 1.0 / total;
  if (at.y < args->rows) {
    out[at.y * 8 + at.x] = static_cast<T>(sum.x * inverse);
    out[at.y * 8 + at.x + 1] = T(sum[1] * inverse);
  }
}

typedef decltype(gram_softmax<float>) gram_softmax_t;

template [[host_name("gram_softmax_f32")]] kernel gram_softmax_t gram_softmax<float>;
template [[host_name("gram_softmax_f16")]] [[kernel]] decltype(gram_softmax<half>) gram_softmax<half>;
template [[host_name("gram_softmax_bf16")]] [[kernel]] decltype(gram_softmax<bfloat>) gram_softmax<bfloat>;

// Bytes cast to vectors, a dynamic threadgroup buffer cast to two types, four-wide rows.
kernel void cast_rows(
    constant Args& args,
    device const char* src,
    device char* dst,
    threadgroup half* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort tiisg [[thread_index_in_simdgroup]],
    ushort3 ntg [[threads_per_threadgroup]]) {
  threadgroup half4* shared4 = (threadgroup half4*)shared;
  threadgroup float* sums = (threadgroup float*)(shared + 4 * 32);
  device const float4* row = (device const float4*)((device const char*)src + group.x * args.strides[0]);
  const half4 v = (half4)row[tiisg];
  shared4[tiisg] = v;
  sums[tiisg] = dot((float4)v, float4(1.0f));
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const float all = simd_sum(sums[(tiisg + 1) % ntg.x]);
  device half4* o = (device half4*)(dst + group.x * args.strides[1]);
  o[tiisg] = shared4[31 - tiisg] * (half)(1.0f / all);
}
