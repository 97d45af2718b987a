// Matrices, barriers and simdgroup functions as calls that the optimiser cannot see into, and kernels with
// arguments that it does not know: the program as an Apple GPU's compiler sees it, for the registers
// pass, which only asks what stays in memory.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
void threadgroup_barrier(mem_flags) __attribute__((convergent));
void simdgroup_barrier(mem_flags) __attribute__((convergent));

#define MSL_LANES_FN(name)                                                                         \
  template <class T> __attribute__((convergent)) T simd_##name(T);                                 \
  template <class T> __attribute__((convergent)) T quad_##name(T);
MSL_LANES_FN(sum)
MSL_LANES_FN(product)
MSL_LANES_FN(min)
MSL_LANES_FN(max)
MSL_LANES_FN(broadcast_first)
#undef MSL_LANES_FN
#define MSL_LANES_FN(name)                                                                         \
  template <class T> __attribute__((convergent)) T simd_##name(T, ushort);                         \
  template <class T> __attribute__((convergent)) T quad_##name(T, ushort);
MSL_LANES_FN(shuffle)
MSL_LANES_FN(shuffle_xor)
MSL_LANES_FN(shuffle_up)
MSL_LANES_FN(shuffle_down)
MSL_LANES_FN(broadcast)
#undef MSL_LANES_FN
bool simd_all(bool) __attribute__((convergent));
bool simd_any(bool) __attribute__((convergent));

// A lane's part of a matrix is a vector of 64, as in the code that Apple's compiler makes.
template <class T> struct msl_wide;
template <> struct msl_wide<float> { typedef float type __attribute__((ext_vector_type(64))); };
template <> struct msl_wide<half> { typedef half type __attribute__((ext_vector_type(64))); };
template <> struct msl_wide<bfloat> { typedef ushort type __attribute__((ext_vector_type(64))); };

template <class T> struct vec<T, 64> {
  typename msl_wide<T>::type msl_all;
  MSL_INLINE T &operator[](int i) { return reinterpret_cast<T *>(&msl_all)[i]; }
  MSL_INLINE const T &operator[](int i) const { return reinterpret_cast<const T *>(&msl_all)[i]; }
};

template <class V, class T> __attribute__((convergent)) V msl_fill(T, bool diagonal);
template <class V> __attribute__((convergent)) V msl_load(const void *, ulong, ulong, ulong, bool);
template <class V> __attribute__((convergent)) void msl_store(V, void *, ulong, ulong, ulong, bool);
template <class D, class A, class B, class C> __attribute__((convergent)) D msl_multiply(A, B, C);

template <class T, int Cols, int Rows = Cols> struct simdgroup_matrix {
  typedef vec<T, 64> storage_type;
  typedef typename msl_wide<T>::type msl_type;
  simdgroup_matrix() = default;
  MSL_INLINE explicit simdgroup_matrix(T diagonal) { msl_e.msl_all = msl_fill<msl_type>(diagonal, true); }
  MSL_INLINE storage_type &thread_elements() { return msl_e; }
  MSL_INLINE const storage_type &thread_elements() const { return msl_e; }
  storage_type msl_e;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Cols, int Rows = Cols>
MSL_FN simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, Cols, Rows> m;
  m.msl_e.msl_all = msl_fill<typename msl_wide<T>::type>(v, false);
  return m;
}
template <class T>
MSL_FN void simdgroup_load(simdgroup_matrix<T, 8, 8> &d, const T *src, ulong per_row = 8,
                           ulong2 origin = ulong2(0), bool transpose = false) {
  d.msl_e.msl_all = msl_load<typename msl_wide<T>::type>(src, per_row, origin.x, origin.y, transpose);
}
template <class T>
MSL_FN void simdgroup_store(const simdgroup_matrix<T, 8, 8> &a, T *dst, ulong per_row = 8,
                            ulong2 origin = ulong2(0), bool transpose = false) {
  msl_store(a.msl_e.msl_all, dst, per_row, origin.x, origin.y, transpose);
}
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                                          const simdgroup_matrix<B, 8, 8> &b,
                                          const simdgroup_matrix<C, 8, 8> &c) {
  d.msl_e.msl_all =
      msl_multiply<typename msl_wide<D>::type>(a.msl_e.msl_all, b.msl_e.msl_all, c.msl_e.msl_all);
}

} // namespace metal

namespace msl_rt {

static inline void count_exp2() {}

template <auto F, uint Site, uint Bytes, uint Align> void *threadgroup_var();

// Calls a kernel with arguments from nowhere.
template <class P> P unknown();
template <class P> struct Argument {
  MSL_INLINE static P get() { return unknown<P>(); }
};
template <class T> struct Argument<metal::vec<T, 2>> {
  MSL_INLINE static metal::vec<T, 2> get() { return metal::vec<T, 2>(unknown<T>(), unknown<T>()); }
};
template <class T> struct Argument<metal::vec<T, 3>> {
  MSL_INLINE static metal::vec<T, 3> get() {
    return metal::vec<T, 3>(unknown<T>(), unknown<T>(), unknown<T>());
  }
};
template <auto F> struct Entry;
template <class... P, void (*F)(P...)> struct Entry<F> {
  MSL_INLINE static void call() { [[clang::always_inline]] F(Argument<P>::get()...); }
};

} // namespace msl_rt
