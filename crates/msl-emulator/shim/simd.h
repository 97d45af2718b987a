// simd_* and quad_* functions: lanes exchange values through their simdgroup.
#pragma once

namespace msl_rt {

// Leaves this lane's value where the others find it, waits, and gives all 32 of them.
template <class T> static inline const T *simd_exchange(T v, uint line) {
  static_assert(sizeof(T) <= 16, "a simdgroup exchanges values of at most 16 bytes");
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  T *all = reinterpret_cast<T *>(s->exchange[me->sync & 1u]);
  all[me->lane] = v;
  simd_sync(w, OP_SIMD, line);
  return all;
}

// As above, but the last lane to come folds the values and all get the result.
template <class T, class F> static inline T simd_fold(T v, F fold, uint line) {
  static_assert(sizeof(T) <= 16, "a simdgroup exchanges values of at most 16 bytes");
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint parity = me->sync & 1u;
  T *all = reinterpret_cast<T *>(s->exchange[parity]);
  T *result = reinterpret_cast<T *>(s->result[parity]);
  all[me->lane] = v;
  if (simd_sync(w, OP_SIMD, line)) {
    T tree[MSL_LANES];
    uint n = s->count;
    for (uint i = 0; i < n; i++) tree[i] = all[i];
    for (; n > 1; n = (n + 1) / 2) {
      for (uint i = 0; i < n / 2; i++) tree[i] = fold(tree[2 * i], tree[2 * i + 1]);
      if (n & 1u) tree[n / 2] = tree[n - 1];
    }
    *result = tree[0];
  }
  return *result;
}

static inline uint my_lane() { return worker()->lane->lane; }
static inline uint lane_count() { return worker()->lane->simd->count; }
template <class T> static inline T pick(const T *all, uint i) {
  return all[i < lane_count() ? i : my_lane()];
}

struct Sum {
  template <class T> T operator()(T a, T b) const { return static_cast<T>(a + b); }
};
struct Product {
  template <class T> T operator()(T a, T b) const { return static_cast<T>(a * b); }
};
struct Min {
  template <class T> T operator()(T a, T b) const { return metal::min(a, b); }
};
struct Max {
  template <class T> T operator()(T a, T b) const { return metal::max(a, b); }
};
struct And {
  template <class T> T operator()(T a, T b) const { return static_cast<T>(a & b); }
};
struct Or {
  template <class T> T operator()(T a, T b) const { return static_cast<T>(a | b); }
};
struct Xor {
  template <class T> T operator()(T a, T b) const { return static_cast<T>(a ^ b); }
};

template <class T, class F> static inline T simd_scan(T v, F fold, T unit, bool inclusive, uint line) {
  const T *all = simd_exchange(v, line);
  const uint end = my_lane() + (inclusive ? 1u : 0u);
  T r = unit;
  for (uint i = 0; i < end; i++) r = fold(r, all[i]);
  return r;
}
template <class T, class F> static inline T quad_fold(T v, F fold, uint line) {
  const T *all = simd_exchange(v, line);
  const uint q = my_lane() & ~3u;
  return fold(fold(pick(all, q), pick(all, q + 1)), fold(pick(all, q + 2), pick(all, q + 3)));
}

} // namespace msl_rt

#define MSL_LINE uint line = __builtin_LINE()

namespace metal {

struct simd_vote {
  typedef ulong vote_t;
  vote_t msl_bits;
  explicit simd_vote(vote_t v = 0) : msl_bits(v) {}
  explicit operator vote_t() const { return msl_bits; }
  bool all() const { return __builtin_popcountl(msl_bits) == static_cast<int>(msl_rt::lane_count()); }
  bool any() const { return msl_bits != 0; }
};

template <class T> static inline T simd_shuffle(T v, ushort i, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), i);
}
template <class T> static inline T simd_broadcast(T v, ushort i, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), i);
}
template <class T> static inline T simd_broadcast_first(T v, MSL_LINE) {
  return msl_rt::simd_exchange(v, line)[0];
}
template <class T> static inline T simd_shuffle_xor(T v, ushort m, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), msl_rt::my_lane() ^ m);
}
template <class T> static inline T simd_shuffle_down(T v, ushort d, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), msl_rt::my_lane() + d);
}
template <class T> static inline T simd_shuffle_up(T v, ushort d, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), msl_rt::my_lane() - d);
}
template <class T> static inline T simd_shuffle_rotate_down(T v, ushort d, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), (msl_rt::my_lane() + d) % 32u);
}
template <class T> static inline T simd_shuffle_rotate_up(T v, ushort d, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), (msl_rt::my_lane() + 32u - d % 32u) % 32u);
}
template <class T> static inline T simd_shuffle_and_fill_down(T v, T fill, ushort d, MSL_LINE) {
  const T *all = msl_rt::simd_exchange(v, line);
  const uint i = msl_rt::my_lane() + d;
  return i < msl_rt::lane_count() ? all[i] : fill;
}
template <class T> static inline T simd_shuffle_and_fill_up(T v, T fill, ushort d, MSL_LINE) {
  const T *all = msl_rt::simd_exchange(v, line);
  const uint i = msl_rt::my_lane();
  return i >= d ? all[i - d] : fill;
}

#define MSL_FOLD(name, F)                                                                          \
  template <class T> static inline T simd_##name(T v, MSL_LINE) {                                  \
    return msl_rt::simd_fold(v, msl_rt::F(), line);                                                \
  }                                                                                                \
  template <class T> static inline T quad_##name(T v, MSL_LINE) {                                  \
    return msl_rt::quad_fold(v, msl_rt::F(), line);                                                \
  }
MSL_FOLD(sum, Sum)
MSL_FOLD(product, Product)
MSL_FOLD(min, Min)
MSL_FOLD(max, Max)
MSL_FOLD(and, And)
MSL_FOLD(or, Or)
MSL_FOLD(xor, Xor)
#undef MSL_FOLD

#define MSL_SCAN(name, F, unit)                                                                    \
  template <class T> static inline T simd_prefix_inclusive_##name(T v, MSL_LINE) {                 \
    return msl_rt::simd_scan(v, msl_rt::F(), static_cast<T>(unit), true, line);                    \
  }                                                                                                \
  template <class T> static inline T simd_prefix_exclusive_##name(T v, MSL_LINE) {                 \
    return msl_rt::simd_scan(v, msl_rt::F(), static_cast<T>(unit), false, line);                   \
  }
MSL_SCAN(sum, Sum, 0)
MSL_SCAN(product, Product, 1)
#undef MSL_SCAN

static inline bool simd_all(bool v, MSL_LINE) { return msl_rt::simd_fold<uint>(v, msl_rt::And(), line) != 0; }
static inline bool simd_any(bool v, MSL_LINE) { return msl_rt::simd_fold<uint>(v, msl_rt::Or(), line) != 0; }
static inline simd_vote simd_ballot(bool v, MSL_LINE) {
  const uint bit = v ? 1u << msl_rt::my_lane() : 0u;
  return simd_vote(msl_rt::simd_fold<uint>(bit, msl_rt::Or(), line));
}
static inline simd_vote simd_active_threads_mask() {
  const uint n = msl_rt::lane_count();
  return simd_vote(n == 32 ? 0xfffffffful : (1ul << n) - 1ul);
}
static inline bool simd_is_first() { return msl_rt::my_lane() == 0; }
static inline bool simd_is_helper_thread() { return false; }

template <class T> static inline T quad_shuffle(T v, ushort i, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), (msl_rt::my_lane() & ~3u) + (i & 3u));
}
template <class T> static inline T quad_broadcast(T v, ushort i, MSL_LINE) {
  return quad_shuffle(v, i, line);
}
template <class T> static inline T quad_shuffle_xor(T v, ushort m, MSL_LINE) {
  return msl_rt::pick(msl_rt::simd_exchange(v, line), msl_rt::my_lane() ^ (m & 3u));
}
template <class T> static inline T quad_shuffle_down(T v, ushort d, MSL_LINE) {
  const uint i = msl_rt::my_lane();
  return msl_rt::pick(msl_rt::simd_exchange(v, line), (i & 3u) + d < 4u ? i + d : i);
}
template <class T> static inline T quad_shuffle_up(T v, ushort d, MSL_LINE) {
  const uint i = msl_rt::my_lane();
  return msl_rt::pick(msl_rt::simd_exchange(v, line), (i & 3u) >= d ? i - d : i);
}
static inline bool quad_all(bool v, MSL_LINE) { return quad_and<uint>(v, line) != 0; }
static inline bool quad_any(bool v, MSL_LINE) { return quad_or<uint>(v, line) != 0; }

} // namespace metal
