// Atomics: relaxed, as MSL has them.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed = 0 };

template <class T> struct _atomic {
  T msl_value;
};
template <class T> using atomic = _atomic<T>;
typedef _atomic<int> atomic_int;
typedef _atomic<uint> atomic_uint;
typedef _atomic<bool> atomic_bool;
typedef _atomic<float> atomic_float;
typedef _atomic<ulong> atomic_ulong;

} // namespace metal

namespace msl_rt {

#ifdef MSL_CHECKED
#define MSL_ATOMIC_CHECK(p, write)                                                                 \
  check_access(worker(), reinterpret_cast<ulong>(p), sizeof(*p), write, true, false, 0, line)
#else
#define MSL_ATOMIC_CHECK(p, write) (void)line
#endif

template <class T> struct bits_of { typedef T type; };
template <> struct bits_of<float> { typedef uint type; };

template <class T> static inline T atomic_read(const T *p, uint line) {
  MSL_ATOMIC_CHECK(p, false);
  typedef typename bits_of<T>::type U;
  return __builtin_bit_cast(T, __atomic_load_n(reinterpret_cast<const U *>(p), __ATOMIC_RELAXED));
}
template <class T> static inline void atomic_write(T *p, T v, uint line) {
  MSL_ATOMIC_CHECK(p, true);
  typedef typename bits_of<T>::type U;
  __atomic_store_n(reinterpret_cast<U *>(p), __builtin_bit_cast(U, v), __ATOMIC_RELAXED);
}
template <class T> static inline bool atomic_swap_if(T *p, T *expected, T v, uint line) {
  MSL_ATOMIC_CHECK(p, true);
  typedef typename bits_of<T>::type U;
  U e = __builtin_bit_cast(U, *expected);
  const bool ok = __atomic_compare_exchange_n(reinterpret_cast<U *>(p), &e, __builtin_bit_cast(U, v), false,
                                              __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  *expected = __builtin_bit_cast(T, e);
  return ok;
}
template <class T, class F> static inline T atomic_change(T *p, T v, F f, uint line) {
  MSL_ATOMIC_CHECK(p, true);
  typedef typename bits_of<T>::type U;
  U *q = reinterpret_cast<U *>(p);
  U old = __atomic_load_n(q, __ATOMIC_RELAXED);
  for (;;) {
    const T next = f(__builtin_bit_cast(T, old), v);
    if (__atomic_compare_exchange_n(q, &old, __builtin_bit_cast(U, next), true, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED))
      return __builtin_bit_cast(T, old);
  }
}
struct Second {
  template <class T> T operator()(T, T b) const { return b; }
};
struct Difference {
  template <class T> T operator()(T a, T b) const { return static_cast<T>(a - b); }
};

} // namespace msl_rt

namespace metal {

#define MSL_RMW(space, name, F)                                                                    \
  template <class T>                                                                               \
  static inline T atomic_##name##_explicit(volatile space _atomic<T> *p, msl_nodeduce<T> v, memory_order, \
                                           uint line = __builtin_LINE()) {                         \
    return msl_rt::atomic_change((T *)&p->msl_value, v, msl_rt::F(), line);                        \
  }
#define MSL_AS(space)                                                                              \
  MSL_RMW(space, fetch_add, Sum)                                                                   \
  MSL_RMW(space, fetch_sub, Difference)                                                            \
  MSL_RMW(space, fetch_min, Min)                                                                   \
  MSL_RMW(space, fetch_max, Max)                                                                   \
  MSL_RMW(space, fetch_and, And)                                                                   \
  MSL_RMW(space, fetch_or, Or)                                                                     \
  MSL_RMW(space, fetch_xor, Xor)                                                                   \
  MSL_RMW(space, exchange, Second)                                                                 \
  template <class T>                                                                               \
  static inline T atomic_load_explicit(const volatile space _atomic<T> *p, memory_order,           \
                                       uint line = __builtin_LINE()) {                             \
    return msl_rt::atomic_read((const T *)&p->msl_value, line);                                    \
  }                                                                                                \
  template <class T>                                                                               \
  static inline void atomic_store_explicit(volatile space _atomic<T> *p, msl_nodeduce<T> v, memory_order, \
                                           uint line = __builtin_LINE()) {                         \
    msl_rt::atomic_write((T *)&p->msl_value, T(v), line);                                          \
  }                                                                                                \
  template <class T>                                                                               \
  static inline bool atomic_compare_exchange_weak_explicit(volatile space _atomic<T> *p, T *expected, \
                                                           msl_nodeduce<T> v, memory_order,        \
                                                           memory_order, uint line = __builtin_LINE()) { \
    return msl_rt::atomic_swap_if((T *)&p->msl_value, expected, T(v), line);                       \
  }
#ifdef MSL_PASS_TYPES
MSL_AS(MSL_DEVICE)
MSL_AS(MSL_THREADGROUP)
#else
MSL_AS()
#endif
#undef MSL_AS
#undef MSL_RMW

} // namespace metal
