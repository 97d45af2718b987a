// C = A * B with 32x32 tiles and four simdgroups, each with a 16x16 quarter.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

struct Shape {
  uint m, n, k;
};

constant uint TILE = 32;
constant uint PAD = 8;

template <typename T, int BK>
[[kernel, max_total_threads_per_threadgroup(128)]] void matmul(
    const device T* a [[buffer(0)]],
    const device T* b [[buffer(1)]],
    device float* c [[buffer(2)]],
    constant Shape& shape [[buffer(3)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  constexpr int LDA = BK + 8;
  threadgroup T as[TILE * LDA];
  threadgroup T bs[BK][TILE + PAD];

  const uint row0 = group.y * TILE, col0 = group.x * TILE;
  const uint sr = (sg / 2) * 16, sc = (sg % 2) * 16;
  simdgroup_matrix<float, 8, 8> acc[2][2];
#pragma clang loop unroll(full)
  for (ushort i = 0; i < 2; i++) {
    for (ushort j = 0; j < 2; j++) {
      acc[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0);
    }
  }
  for (uint k0 = 0; k0 < shape.k; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = tid; e < TILE * BK; e += 128) {
      uint r = e / BK, k = e % BK;
      as[r * LDA + k] =
          row0 + r < shape.m && k0 + k < shape.k ? a[ulong(row0 + r) * shape.k + k0 + k] : T(0);
    }
    for (uint e = tid; e < BK * TILE; e += 128) {
      uint k = e / TILE, col = e % TILE;
      bs[k][col] = k0 + k < shape.k && col0 + col < shape.n ? b[ulong(k0 + k) * shape.n + col0 + col] : T(0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
    for (ushort kk = 0; kk < BK; kk += 8) {
      simdgroup_matrix<T, 8, 8> am[2], bm[2];
      for (ushort i = 0; i < 2; i++) {
        simdgroup_load(am[i], as + (sr + 8 * i) * LDA + kk, LDA);
        simdgroup_load(bm[i], &bs[kk][sc + 8 * i], TILE + PAD);
      }
      simdgroup_barrier(mem_flags::mem_none);
      for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
          simdgroup_multiply_accumulate(acc[i][j], am[i], bm[j], acc[i][j]);
        }
      }
    }
  }
  // Element by element, through the lane map.
  const ushort lane = tid % 32;
  const ushort qid = lane / 4;
  const ushort fr = (qid & 4) + (lane / 2) % 4, fc = (qid & 2) * 2 + (lane % 2) * 2;
  for (ushort i = 0; i < 2; i++) {
    for (ushort j = 0; j < 2; j++) {
      thread auto& e = acc[i][j].thread_elements();
      for (ushort v = 0; v < 2; v++) {
        uint r = row0 + sr + 8 * i + fr, col = col0 + sc + 8 * j + fc + v;
        if (r < shape.m && col < shape.n) {
          c[ulong(r) * shape.n + col] = e[v];
        }
      }
    }
  }
}

#define instantiate(name, type, bk) \
  template [[host_name("matmul_" #name "_bk" #bk)]] [[kernel]] decltype(matmul<type, bk>) matmul<type, bk>;

instantiate(half, half, 16)
instantiate(bfloat, bfloat, 16)
instantiate(float, float, 16)
instantiate(float, float, 32)

// The elements are changed by their lanes between operations; loads and stores are transposed.
kernel void scale_and_transpose(
    device const half* a [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_half8x8 m;
  simdgroup_load(m, a, 8, ulong2(0, 0), true);
  m.thread_elements()[0] *= 2.0h;
  m.thread_elements()[1] *= 2.0h;
  simdgroup_float8x8 one(1.0f);
  simdgroup_float8x8 d;
  simdgroup_multiply(d, m, one);
  d.thread_elements()[0] += 1.0;
  simdgroup_multiply(d, d, one);
  simdgroup_store(d, out, 8, ulong2(0, 0), true);
  simdgroup_store(d, out, 8, ulong2(0, 8));
  if (lane == 0) {
    out[128] = 7.0;
  }
}

// A matrix lives on while many operations pass: it leaves the ring and must come back.
kernel void long_lived(device const float* a [[buffer(0)]], device float* out [[buffer(1)]]) {
  simdgroup_float8x8 keep, other, sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_load(keep, a);
  for (int i = 0; i < 700; i++) {
    simdgroup_load(other, a + 64);
    simdgroup_multiply_accumulate(sum, other, other, sum);
  }
  simdgroup_multiply_accumulate(sum, keep, keep, sum);
  simdgroup_store(sum, out);
}
