#include <metal_stdlib>
#include <metal_simdgroup>
using namespace metal;

constant bool negate [[function_constant(0)]];
constant float bias [[function_constant(1)]];
constant int steps [[function_constant(2)]];
constant bool has_steps = is_function_constant_defined(steps);
constant int steps_or_one = has_steps ? steps : 1;

struct Params {
  float a;
  uint n;
  int64_t strides[3];
};

kernel void saxpy(
    device const float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant Params& p [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  if (i >= p.n) {
    return;
  }
  y[i] = p.a * x[i] + y[i];
}

// Function constants, an optional buffer, a derived constant.
kernel void constants(
    device float* out [[buffer(0)]],
    device const float* extra [[buffer(1), function_constant(negate)]],
    uint i [[thread_position_in_grid]]) {
  float v = bias;
  for (int s = 0; s < steps_or_one; s++) {
    v += 1.0;
  }
  if (negate) {
    v = -v + extra[i];
  }
  out[i] = v;
}

// Sum of a row through simd_sum and threadgroup memory.
[[max_total_threads_per_threadgroup(256)]] kernel void row_sum(
    device const float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    uint row [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint size [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint sgs [[simdgroups_per_threadgroup]]) {
  threadgroup float partial[32];
  float s = 0;
  for (uint i = tid; i < n; i += size) {
    s += x[row * n + i];
  }
  s = simd_sum(s);
  if (lane == 0) {
    partial[sg] = s;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    s = lane < sgs ? partial[lane] : 0.0f;
    s = simd_sum(s);
    if (lane == 0) {
      out[row] = s;
    }
  }
}

// The same with a tree in threadgroup memory that the host sizes.
kernel void row_max(
    device const half* x [[buffer(0)]],
    device half* out [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    threadgroup half* tile [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort3 at [[thread_position_in_threadgroup]],
    ushort3 size [[threads_per_threadgroup]]) {
  half best = -INFINITY;
  for (uint i = at.x; i < n; i += size.x) {
    best = max(best, x[group.x * n + i]);
  }
  tile[at.x] = best;
  for (ushort half_size = size.x / 2; half_size > 0; half_size /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (at.x < half_size) {
      tile[at.x] = max(tile[at.x], tile[at.x + half_size]);
    }
  }
  if (at.x == 0) {
    out[group.x] = tile[0];
  }
}

// Every simd function once, a word each.
kernel void simd_functions(device uint* out [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  device uint* o = out + lane * 24;
  o[0] = simd_sum(lane);
  o[1] = simd_max(lane * 3);
  o[2] = simd_min(lane + 5);
  o[3] = simd_shuffle_xor(lane, 5);
  o[4] = simd_shuffle(lane, ushort(31 - lane));
  o[5] = simd_broadcast(lane, 7);
  o[6] = simd_shuffle_up(lane, 2);
  o[7] = simd_shuffle_down(lane, 2);
  o[8] = simd_prefix_inclusive_sum(lane);
  o[9] = simd_prefix_exclusive_sum(lane);
  o[10] = simd_all(lane < 32) ? 1 : 0;
  o[11] = simd_any(lane == 40) ? 1 : 0;
  o[12] = uint(simd_vote::vote_t(simd_ballot((lane & 1) == 1)));
  o[13] = quad_sum(lane);
  o[14] = quad_shuffle_xor(lane, 1);
  o[15] = simd_or(1u << lane);
  o[16] = uint(simd_product(lane == 3 ? 2.0 : 1.0));
  float4 v = simd_shuffle_xor(float4(lane, 1.0, 2.0, 3.0), 1);
  o[17] = uint(v.x + v.w);
  o[18] = simd_shuffle_and_fill_down(lane, 100u, 4);
  o[19] = simd_broadcast_first(lane + 9);
  o[20] = simd_xor(lane);
  o[21] = quad_max(lane);
  o[22] = simd_is_first() ? 1 : 0;
  o[23] = simd_and(lane | 64u);
}

// Vectors, swizzles, conversions, bit casts, half and bfloat arithmetic.
template <typename T>
T widen(T a, T b) {
  return a * b + T(1);
}

kernel void vectors(device float4* out [[buffer(0)]], device const half4* h [[buffer(1)]]) {
  float4 a = float4(h[0]);
  a.xy = a.yx;
  a.zw += float2(1.0, 2.0);
  out[0] = a.wzyx * 2.0 + float4(a.xy, 0.5h, 1);
  out[1] = clamp(a, 0.0, 2.5);
  out[2] = float4(as_type<uint>(1.0f) >> 23, float(bfloat(1.00390625f)), float(bfloat(3.3333333f)), exp2(3.0));
  out[3] = select(a, float4(9), a > float4(1.5));
  out[3] += 1.0;
  bfloat b = bfloat(1.5f);
  b += bfloat(0.25f);
  half x = 0.333h;
  out[4] = float4(float(widen(b, b)), float(widen(x, x)), fast::exp2(0.5), precise::tanh(0.5));
  out[5] = float4(dot(a, a), rsqrt(4.0), float(isnan(NAN)), float(isinf(-INFINITY)));
  half4x4 m = half4x4(2.0h);
  out[6] = float4(m * half4(1, 2, 3, 4));
  packed_float3 p = packed_float3(float3(1, 2, 3));
  out[7] = float4(float3(p), float(numeric_limits<half>::max()));
}

kernel void count_atomic(
    device atomic_uint* total [[buffer(0)]],
    device atomic_float* sum [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  threadgroup atomic_uint local;
  if (i % 64 == 0) {
    atomic_store_explicit(&local, 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&local, 1u, memory_order_relaxed);
  atomic_fetch_add_explicit(sum, 0.5f, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i % 64 == 0) {
    uint n = atomic_load_explicit(&local, memory_order_relaxed);
    atomic_fetch_add_explicit(total, n, memory_order_relaxed);
  }
}
