// simdgroup_matrix and its functions, as metal_simdgroup_matrix declares them.
#pragma once

namespace msl_rt {
template <class T> struct element_type;
template <> struct element_type<float> { static constexpr uint value = ELEMENT_FLOAT; };
template <> struct element_type<half> { static constexpr uint value = ELEMENT_HALF; };
template <> struct element_type<bfloat> { static constexpr uint value = ELEMENT_BFLOAT; };
} // namespace msl_rt

namespace metal {

template <class T, int Cols, int Rows = Cols> struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "simdgroup_matrix is 8x8");
  typedef vec<T, 2> storage_type;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal, uint line = __builtin_LINE()) {
    msl_rt::Operand o;
    msl_rt::matrix_fill(&o, static_cast<float>(diagonal), true, line);
    msl_put(o);
  }

  // Whoever holds the reference may write through it: the elements become the lanes' own.
  MSL_INLINE storage_type &thread_elements() {
    msl_id = 0;
    return msl_e;
  }
  MSL_INLINE const storage_type &thread_elements() const { return msl_e; }

  MSL_INLINE msl_rt::Operand msl_operand() const {
    msl_rt::Operand o;
    o.e[0] = static_cast<float>(msl_e.x);
    o.e[1] = static_cast<float>(msl_e.y);
    o.id = msl_id;
    return o;
  }
  MSL_INLINE void msl_put(const msl_rt::Operand &o) {
    msl_e = storage_type(static_cast<T>(o.e[0]), static_cast<T>(o.e[1]));
    msl_id = o.id;
  }

  storage_type msl_e;
  mutable uint msl_id = 0;
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Cols, int Rows = Cols>
MSL_FN simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T v, uint line = __builtin_LINE()) {
  simdgroup_matrix<T, Cols, Rows> m;
  msl_rt::Operand o;
  msl_rt::matrix_fill(&o, static_cast<float>(v), false, line);
  m.msl_put(o);
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
    msl_rt::Operand o;                                                                             \
    msl_rt::matrix_load<T>(&o, (const T *)src, per_row, origin.x, origin.y, transpose, line);      \
    d.msl_put(o);                                                                                  \
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
    msl_rt::Operand o = a.msl_operand();                                                           \
    msl_rt::matrix_store<T>(&o, (T *)dst, per_row, origin.x, origin.y, transpose, line);           \
    a.msl_id = o.id;                                                                               \
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
  msl_rt::Operand oa = a.msl_operand(), ob = b.msl_operand(), oc = c.msl_operand(), od;
  msl_rt::matrix_multiply(&od, &oa, &ob, &oc, msl_rt::element_type<D>::value, line);
  a.msl_id = oa.id;
  b.msl_id = ob.id;
  c.msl_id = oc.id;
  d.msl_put(od);
}

template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                               const simdgroup_matrix<B, 8, 8> &b, uint line = __builtin_LINE()) {
  msl_rt::Operand oa = a.msl_operand(), ob = b.msl_operand(), od;
  msl_rt::matrix_multiply(&od, &oa, &ob, nullptr, msl_rt::element_type<D>::value, line);
  a.msl_id = oa.id;
  b.msl_id = ob.id;
  d.msl_put(od);
}

template <class T>
MSL_FN simdgroup_matrix<T, 8, 8> operator*(const simdgroup_matrix<T, 8, 8> &a,
                                           const simdgroup_matrix<T, 8, 8> &b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b, 0);
  return d;
}

} // namespace metal
