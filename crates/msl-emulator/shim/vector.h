// Vectors of 2, 3 and 4 elements, packed vectors, small matrices and as_type.
//
// MSL_SWIZZLES_2/3/4 hold only the swizzles that the program at hand uses: they are properties
// with a getter and, where no letter repeats, a setter.
#pragma once

namespace metal {

template <class T, int N> struct vec;

// One definition for the three lengths: FIELDS, and how a list of scalars fills them.
#define MSL_VEC_COMMON(N)                                                                          \
  static constexpr int msl_n = N;                                                                  \
  vec() = default;                                                                                 \
  constexpr vec(const vec &) = default;                                                            \
  vec &operator=(const vec &) = default;                                                           \
  MSL_FOR_NAMED_SPACES(MSL_VEC_FROM)                                                               \
  template <class U> constexpr explicit vec(const vec<U, N> &o);                                   \
  __attribute__((always_inline)) T &operator[](int i) { return (&x)[i]; }                          \
  __attribute__((always_inline)) const T &operator[](int i) const { return (&x)[i]; }              \
  MSL_VEC_BINARY(N, +) MSL_VEC_BINARY(N, -) MSL_VEC_BINARY(N, *) MSL_VEC_BINARY(N, /)              \
  MSL_VEC_BINARY(N, %) MSL_VEC_BINARY(N, &) MSL_VEC_BINARY(N, |) MSL_VEC_BINARY(N, ^)              \
  MSL_VEC_BINARY(N, <<) MSL_VEC_BINARY(N, >>)                                                      \
  MSL_VEC_COMPARE(N, ==) MSL_VEC_COMPARE(N, !=) MSL_VEC_COMPARE(N, <) MSL_VEC_COMPARE(N, >)        \
  MSL_VEC_COMPARE(N, <=) MSL_VEC_COMPARE(N, >=) MSL_VEC_COMPARE(N, &&) MSL_VEC_COMPARE(N, ||)      \
  MSL_VEC_UNARY(N, -) MSL_VEC_UNARY(N, +) MSL_VEC_UNARY(N, ~)                                      \
  MSL_FN vec<bool, N> operator_not(vec a) {                                                        \
    vec<bool, N> r;                                                                                \
    for (int i = 0; i < N; i++) r[i] = !a[i];                                                      \
    return r;                                                                                      \
  }                                                                                                \
  friend MSL_INLINE vec<bool, N> operator!(vec a) { return operator_not(a); }

#define MSL_INLINE inline __attribute__((always_inline))
#define MSL_VEC_BINARY(N, op)                                                                      \
  friend MSL_INLINE constexpr vec operator op(vec a, vec b) {                                      \
    vec r = a;                                                                                     \
    for (int i = 0; i < N; i++) r[i] = static_cast<T>(a[i] op b[i]);                               \
    return r;                                                                                      \
  }                                                                                                \
  MSL_FOR_WRITABLE_SPACES_1(MSL_VEC_ASSIGN, op)
#define MSL_VEC_ASSIGN(op, space)                                                                  \
  friend MSL_INLINE space vec &operator op##=(space vec &a, vec b) {                               \
    a.msl_put(vec(a) op b);                                                                        \
    return a;                                                                                      \
  }
#define MSL_VEC_COMPARE(N, op)                                                                     \
  friend MSL_INLINE vec<bool, N> operator op(vec a, vec b) {                                       \
    vec<bool, N> r;                                                                                \
    for (int i = 0; i < N; i++) r[i] = a[i] op b[i];                                               \
    return r;                                                                                      \
  }
#define MSL_VEC_UNARY(N, op)                                                                       \
  friend MSL_INLINE vec operator op(vec a) {                                                       \
    vec r;                                                                                         \
    for (int i = 0; i < N; i++) r[i] = static_cast<T>(op a[i]);                                    \
    return r;                                                                                      \
  }
#ifdef MSL_PASS_TYPES
#define MSL_VEC_FROM(space)                                                                        \
  template <class = void> vec(const space vec &o);                                                 \
  template <class U> explicit vec(const space vec<U, msl_n> &o);
#define MSL_FOR_WRITABLE_SPACES_1(X, a) X##_T(a, ) X##_T(a, MSL_DEVICE) X##_T(a, MSL_THREADGROUP)
#define MSL_VEC_ASSIGN_T(op, space) friend space vec &operator op##=(space vec &a, vec b);
#else
#define MSL_VEC_FROM(space)
#define MSL_FOR_WRITABLE_SPACES_1(X, a) X(a, )
#endif

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  constexpr vec(T a) : x(a), y(a) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  MSL_INLINE void msl_put(vec v) { x = v.x, y = v.y; }
  MSL_VEC_COMMON(2)
  MSL_SWIZZLES_2
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  constexpr vec(T a) : x(a), y(a), z(a) {}
  constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
  constexpr vec(vec<T, 2> a, T c) : x(a.x), y(a.y), z(c) {}
  constexpr vec(T a, vec<T, 2> b) : x(a), y(b.x), z(b.y) {}
  MSL_INLINE void msl_put(vec v) { x = v.x, y = v.y, z = v.z; }
  MSL_VEC_COMMON(3)
  MSL_SWIZZLES_3
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  constexpr vec(T a) : x(a), y(a), z(a), w(a) {}
  constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  constexpr vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  constexpr vec(vec<T, 2> a, T c, T d) : x(a.x), y(a.y), z(c), w(d) {}
  constexpr vec(T a, T b, vec<T, 2> c) : x(a), y(b), z(c.x), w(c.y) {}
  constexpr vec(T a, vec<T, 2> b, T d) : x(a), y(b.x), z(b.y), w(d) {}
  constexpr vec(vec<T, 3> a, T d) : x(a.x), y(a.y), z(a.z), w(d) {}
  constexpr vec(T a, vec<T, 3> b) : x(a), y(b.x), z(b.y), w(b.z) {}
  MSL_INLINE void msl_put(vec v) { x = v.x, y = v.y, z = v.z, w = v.w; }
  MSL_VEC_COMMON(4)
  MSL_SWIZZLES_4
};

#define MSL_VEC_CONVERT(N, ...)                                                                    \
  template <class T>                                                                               \
  template <class U>                                                                               \
  MSL_INLINE constexpr vec<T, N>::vec(const vec<U, N> &o) : __VA_ARGS__ {}
MSL_VEC_CONVERT(2, x(static_cast<T>(o.x)), y(static_cast<T>(o.y)))
MSL_VEC_CONVERT(3, x(static_cast<T>(o.x)), y(static_cast<T>(o.y)), z(static_cast<T>(o.z)))
MSL_VEC_CONVERT(4, x(static_cast<T>(o.x)), y(static_cast<T>(o.y)), z(static_cast<T>(o.z)),
                w(static_cast<T>(o.w)))
#undef MSL_VEC_CONVERT

template <class T> struct msl_is_vec : false_type {};
template <class T, int N> struct msl_is_vec<vec<T, N>> : true_type {};

// Packed vectors have the alignment of their element.
template <class T, int N> struct packed_vec {
  T msl_v[N];
  packed_vec() = default;
  packed_vec(const packed_vec &) = default;
  packed_vec &operator=(const packed_vec &) = default;
  MSL_INLINE packed_vec(vec<T, N> v) {
    for (int i = 0; i < N; i++) msl_v[i] = v[i];
  }
  MSL_INLINE operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = msl_v[i];
    return r;
  }
#define MSL_AS(space)                                                                              \
  template <class = void> packed_vec(const space packed_vec &o);
  MSL_FOR_NAMED_SPACES(MSL_AS)
#undef MSL_AS
  T &operator[](int i) { return msl_v[i]; }
  const T &operator[](int i) const { return msl_v[i]; }
};

// Column-major matrices: columns, a product with a vector and between matrices.
template <class T, int C, int R> struct matrix {
  vec<T, R> columns[C];
  matrix() = default;
  MSL_INLINE explicit matrix(T d) {
    for (int c = 0; c < C; c++)
      for (int r = 0; r < R; r++) columns[c][r] = c == r ? d : T(0);
  }
  template <class... V, class = enable_if_t<sizeof...(V) + 1 == C && (C > 1)>>
  MSL_INLINE matrix(vec<T, R> a, V... rest) : columns{a, vec<T, R>(rest)...} {}
  template <class U> MSL_INLINE explicit matrix(const matrix<U, C, R> &o) {
    for (int c = 0; c < C; c++) columns[c] = vec<T, R>(o.columns[c]);
  }
  MSL_INLINE vec<T, R> &operator[](int c) { return columns[c]; }
  MSL_INLINE const vec<T, R> &operator[](int c) const { return columns[c]; }
  friend MSL_INLINE vec<T, R> operator*(const matrix &m, vec<T, C> v) {
    vec<T, R> r = m.columns[0] * v[0];
    for (int c = 1; c < C; c++) r = r + m.columns[c] * v[c];
    return r;
  }
  template <int K> friend MSL_INLINE matrix<T, K, R> operator*(const matrix &m, const matrix<T, K, C> &o) {
    matrix<T, K, R> r;
    for (int k = 0; k < K; k++) r.columns[k] = m * o.columns[k];
    return r;
  }
};

} // namespace metal

template <class To, class From> MSL_FN constexpr To as_type(From v) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, v);
}

#define MSL_TYPES(X)                                                                               \
  X(bool) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(bfloat)    \
  X(float)
#define MSL_DECLARE(T)                                                                             \
  typedef metal::vec<T, 2> T##2;                                                                   \
  typedef metal::vec<T, 3> T##3;                                                                   \
  typedef metal::vec<T, 4> T##4;                                                                   \
  typedef metal::packed_vec<T, 2> packed_##T##2;                                                   \
  typedef metal::packed_vec<T, 3> packed_##T##3;                                                   \
  typedef metal::packed_vec<T, 4> packed_##T##4;                                                   \
  namespace metal {                                                                                \
  using ::T##2;                                                                                    \
  using ::T##3;                                                                                    \
  using ::T##4;                                                                                    \
  using ::packed_##T##2;                                                                           \
  using ::packed_##T##3;                                                                           \
  using ::packed_##T##4;                                                                           \
  }
MSL_TYPES(MSL_DECLARE)
#undef MSL_DECLARE
#define MSL_DECLARE(T)                                                                             \
  typedef metal::matrix<T, 2, 2> T##2x2;                                                           \
  typedef metal::matrix<T, 3, 3> T##3x3;                                                           \
  typedef metal::matrix<T, 4, 4> T##4x4;                                                           \
  typedef metal::matrix<T, 2, 4> T##2x4;                                                           \
  typedef metal::matrix<T, 4, 2> T##4x2;                                                           \
  namespace metal {                                                                                \
  using ::T##2x2;                                                                                  \
  using ::T##3x3;                                                                                  \
  using ::T##4x4;                                                                                  \
  using ::T##2x4;                                                                                  \
  using ::T##4x2;                                                                                  \
  }
MSL_DECLARE(half)
MSL_DECLARE(float)
#undef MSL_DECLARE

namespace metal {
using ::as_type;
using ::bfloat;
using ::half;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;

template <class T> struct make_unsigned { typedef T type; };
template <> struct make_unsigned<char> { typedef uchar type; };
template <> struct make_unsigned<signed char> { typedef uchar type; };
template <> struct make_unsigned<short> { typedef ushort type; };
template <> struct make_unsigned<int> { typedef uint type; };
template <> struct make_unsigned<long> { typedef ulong type; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
} // namespace metal
