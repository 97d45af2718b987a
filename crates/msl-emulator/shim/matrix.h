// simdgroup_matrix and its functions, as metal_simdgroup_matrix declares them.
#pragma once

namespace metal {

template <class T, int Cols, int Rows = Cols> struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "simdgroup_matrix is 8x8");
  typedef vec<T, 64> storage_type;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal, uint line = __builtin_LINE()) {
    msl_rt::matrix_fill(&msl_share, static_cast<float>(diagonal), true, line);
  }

  // Whoever holds the reference may write through it: the elements become the lanes' own.
  MSL_INLINE storage_type &thread_elements() {
    msl_share.id = 0;
    return msl_share.e;
  }
  MSL_INLINE const storage_type &thread_elements() const { return msl_share.e; }

  msl_rt::Share<T> msl_share;
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Cols, int Rows = Cols>
MSL_FN simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T v, uint line = __builtin_LINE()) {
  simdgroup_matrix<T, Cols, Rows> m;
  msl_rt::matrix_fill(&m.msl_share, static_cast<float>(v), false, line);
  return m;
}
template <class T, int Cols, int Rows = Cols>
MSL_FN simdgroup_matrix<T, Cols, Rows> make_diagonal_simdgroup_matrix(T v, uint line = __builtin_LINE()) {
  return simdgroup_matrix<T, Cols, Rows>(v, line);
}

#define MSL_AS(space)                                                                              \
  template <class T, int C, int R>                                                                 \
  MSL_FN void simdgroup_load(simdgroup_matrix<T, C, R> &d, const space T *src, ulong per_row = C,  \
                             ulong2 origin = ulong2(0), bool transpose = false,                    \
                             uint line = __builtin_LINE()) {                                       \
    msl_rt::matrix_load<T>(&d.msl_share, (const T *)src, per_row, origin.x, origin.y, transpose, line); \
  }
#ifdef MSL_PASS_TYPES
MSL_FOR_NAMED_SPACES(MSL_AS)
#else
MSL_AS()
#endif
#undef MSL_AS

#define MSL_AS(space)                                                                              \
  template <class T, int C, int R>                                                                 \
  MSL_FN void simdgroup_store(const simdgroup_matrix<T, C, R> &a, space T *dst, ulong per_row = C, \
                              ulong2 origin = ulong2(0), bool transpose = false,                   \
                              uint line = __builtin_LINE()) {                                      \
    msl_rt::matrix_store<T>(&a.msl_share, (T *)dst, per_row, origin.x, origin.y, transpose, line); \
  }
#ifdef MSL_PASS_TYPES
MSL_AS(MSL_DEVICE)
MSL_AS(MSL_THREADGROUP)
#else
MSL_AS()
#endif
#undef MSL_AS

template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                                          const simdgroup_matrix<B, 8, 8> &b,
                                          const simdgroup_matrix<C, 8, 8> &c,
                                          uint line = __builtin_LINE()) {
  msl_rt::matrix_multiply(&d.msl_share, &a.msl_share, &b.msl_share, &c.msl_share, line);
}

template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                               const simdgroup_matrix<B, 8, 8> &b, uint line = __builtin_LINE()) {
  const msl_rt::Share<D> *none = nullptr;
  msl_rt::matrix_multiply(&d.msl_share, &a.msl_share, &b.msl_share, none, line);
}

template <class T>
MSL_FN simdgroup_matrix<T, 8, 8> operator*(const simdgroup_matrix<T, 8, 8> &a,
                                           const simdgroup_matrix<T, 8, 8> &b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b, 0);
  return d;
}

} // namespace metal
