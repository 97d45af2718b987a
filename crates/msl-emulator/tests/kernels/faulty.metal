// Each kernel here has one fault, on the line that says FAULT and its name.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant bool wanted [[function_constant(0)]];

kernel void read_past_end(
    device const float* in [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  out[i] = in[i + 1];  // FAULT read_past_end
}

kernel void write_before_start(device float* out [[buffer(0)]], int i [[thread_position_in_grid]]) {
  out[i - 1] = 1.0;  // FAULT write_before_start
}

kernel void write_const(device const float* in [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  device float* sneaky = (device float*)in;
  sneaky[i] = 2.0;  // FAULT write_const
}

kernel void too_much_memory(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup float tile[8193];
  tile[i] = 1.0;
  out[i] = tile[i];
}

kernel void missing_barrier(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  tile[t] = t;
  out[t] = tile[63 - t];  // FAULT missing_barrier
}

// A simdgroup_barrier does not order two simdgroups.
kernel void wrong_barrier(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  tile[t] = t;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[t] = tile[63 - t];  // FAULT wrong_barrier
}

// The barrier is there, but orders no threadgroup memory.
kernel void wrong_flags(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  tile[t] = t;
  threadgroup_barrier(mem_flags::mem_none);
  out[t] = tile[63 - t];  // FAULT wrong_flags
}

kernel void overwrite(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  for (int step = 0; step < 2; step++) {
    tile[t] = step;  // FAULT overwrite
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[t] = tile[(t + 1) % 64];
  }
}

// A tile is written by lanes and loaded as a matrix with no simdgroup_barrier between.
kernel void matrix_race(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  tile[2 * t] = t;      // FAULT early_writes
  tile[2 * t + 1] = t;
  simdgroup_float8x8 m;
  simdgroup_load(m, tile);  // FAULT matrix_race
  simdgroup_store(m, out);
}

kernel void device_race(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  out[t / 2] = t;  // FAULT device_race
}

kernel void grid_race(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  out[t] = 1.0;  // FAULT grid_race
}

kernel void divergent_barrier(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  if (t < 40) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // FAULT divergent_barrier
  }
  out[t] = t;
}

kernel void two_barriers(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  if (t < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // FAULT two_barriers first
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // FAULT two_barriers second
  }
  out[t] = t;
}

kernel void divergent_sum(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  float v = t;
  if (t % 32 < 16) {
    v = simd_sum(v);  // FAULT divergent_sum
  }
  out[t] = v;
}

kernel void divergent_load(
    device const float* in [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint t [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 m;
  if (t != 9) {
    simdgroup_load(m, in);  // FAULT divergent_load
  }
  threadgroup_barrier(mem_flags::mem_none);
  out[t] = t;
}

kernel void early_return(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  if (t == 3) {
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // FAULT early_return
  out[t] = t;
}

kernel void lanes_disagree(
    device const float* in [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint t [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 m;
  simdgroup_load(m, in + t);  // FAULT lanes_disagree
  simdgroup_store(m, out);
}

// The reference is older than what the matrix holds.
kernel void old_reference(
    device const float* in [[buffer(0)]],
    device float* out [[buffer(1)]],
    uint t [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 m;
  thread auto& e = m.thread_elements();
  simdgroup_load(m, in);
  if (t == 5) {
    e[0] = 3.0;
  }
  simdgroup_store(m, out);  // FAULT old_reference
}

kernel void unwritten(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  if (t < 32) {
    tile[t] = t;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tile[t] += 1.0;  // FAULT unwritten
  out[t] = tile[t];
}

kernel void tile_overrun(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float first[63];
  threadgroup float second[64];
  first[t] = t;  // FAULT tile_overrun
  second[t] = t;
  out[t] = first[t] + second[t];
}

kernel void matrix_overrun(device const half* in [[buffer(0)]], device half* out [[buffer(1)]]) {
  simdgroup_half8x8 m;
  simdgroup_load(m, in, 16, ulong2(8, 1));  // FAULT matrix_overrun
  simdgroup_store(m, out);
}

kernel void misaligned(device const char* in [[buffer(0)]], device float4* out [[buffer(1)]]) {
  device const float* f = (device const float*)(in + 2);
  out[0] = float4(f[0]);  // FAULT misaligned
}

float helper(device const float* p, uint i) {
  return p[i];  // FAULT in_helper
}

template <typename T, int N>
[[kernel]] void in_helper(device const T* in [[buffer(0)]], device T* out [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  out[i] = helper(in, i + N);
}

template [[host_name("in_helper_float")]] [[kernel]] decltype(in_helper<float, 7>) in_helper<float, 7>;

kernel void unset_constant(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  out[i] = wanted ? 1.0 : 2.0;
}

[[max_total_threads_per_threadgroup(64)]] kernel void small_groups(
    device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  out[i] = i;
}
