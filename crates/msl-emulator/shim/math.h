// Mathematics, relational and integer functions of metal_stdlib, with fast:: and precise::.
//
// Both namespaces compute the same values here: the error that Apple's fast functions may have
// is not modelled.
#pragma once

namespace msl_rt {
static inline void count_exp2();
MSL_FN float exp2_counted(float x) {
  count_exp2();
  return __builtin_exp2f(x);
}
MSL_FN float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
MSL_FN float fmin(float a, float b) { return a != a ? b : (b < a ? b : a); }
MSL_FN float fmax(float a, float b) { return a != a ? b : (a < b ? b : a); }
MSL_FN float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x != x ? 0.0f : x); }
MSL_FN float fract(float x) {
  float f = x - __builtin_floorf(x);
  return f < 0x1.fffffep-1f ? f : 0x1.fffffep-1f;
}
MSL_FN float saturate(float x) { return fmin(fmax(x, 0.0f), 1.0f); }
MSL_FN float exp10(float x) { return __builtin_powf(10.0f, x); }
MSL_FN float degrees(float x) { return x * 57.295779513082322865f; }
MSL_FN float radians(float x) { return x * 0.017453292519943295f; }
MSL_FN float sinpi(float x) { return __builtin_sinf(3.14159265358979323846f * x); }
MSL_FN float cospi(float x) { return __builtin_cosf(3.14159265358979323846f * x); }
MSL_FN float divide(float a, float b) { return a / b; }
MSL_FN float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
MSL_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_FN float mix(float a, float b, float t) { return a + (b - a) * t; }
MSL_FN float smoothstep(float a, float b, float x) {
  float t = saturate((x - a) / (b - a));
  return t * t * (3.0f - 2.0f * t);
}
} // namespace msl_rt

// One, two and three argument functions over float, half, bfloat and their vectors.
#define MSL_MATH1(name, f)                                                                         \
  MSL_FN float name(float a) { return f(a); }                                                      \
  MSL_FN half name(half a) { return static_cast<half>(f(static_cast<float>(a))); }                 \
  MSL_FN bfloat name(bfloat a) { return bfloat(f(static_cast<float>(a))); }                        \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> a) {                                   \
    vec<T, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r[i] = name(a[i]);                                                 \
    return r;                                                                                      \
  }
#define MSL_MATH2(name, f)                                                                         \
  MSL_FN float name(float a, float b) { return f(a, b); }                                          \
  MSL_FN half name(half a, half b) {                                                               \
    return static_cast<half>(f(static_cast<float>(a), static_cast<float>(b)));                     \
  }                                                                                                \
  MSL_FN bfloat name(bfloat a, bfloat b) {                                                         \
    return bfloat(f(static_cast<float>(a), static_cast<float>(b)));                                \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> a, metal::msl_nodeduce<vec<T, N>> b) {                           \
    vec<T, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r[i] = name(a[i], b[i]);                                           \
    return r;                                                                                      \
  }
#define MSL_MATH3(name, f)                                                                         \
  MSL_FN float name(float a, float b, float c) { return f(a, b, c); }                              \
  MSL_FN half name(half a, half b, half c) {                                                       \
    return static_cast<half>(                                                                      \
        f(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)));                   \
  }                                                                                                \
  MSL_FN bfloat name(bfloat a, bfloat b, bfloat c) {                                               \
    return bfloat(f(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)));         \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> a, metal::msl_nodeduce<vec<T, N>> b,                             \
                        metal::msl_nodeduce<vec<T, N>> c) {                                        \
    vec<T, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r[i] = name(a[i], b[i], c[i]);                                     \
    return r;                                                                                      \
  }
#define MSL_MATH_ALL()                                                                             \
  MSL_MATH1(exp, __builtin_expf)                                                                   \
  MSL_MATH1(exp2, msl_rt::exp2_counted)                                                            \
  MSL_MATH1(exp10, msl_rt::exp10)                                                                  \
  MSL_MATH1(log, __builtin_logf)                                                                   \
  MSL_MATH1(log2, __builtin_log2f)                                                                 \
  MSL_MATH1(log10, __builtin_log10f)                                                               \
  MSL_MATH1(sqrt, __builtin_sqrtf)                                                                 \
  MSL_MATH1(rsqrt, msl_rt::rsqrt)                                                                  \
  MSL_MATH1(sin, __builtin_sinf)                                                                   \
  MSL_MATH1(cos, __builtin_cosf)                                                                   \
  MSL_MATH1(tan, __builtin_tanf)                                                                   \
  MSL_MATH1(asin, __builtin_asinf)                                                                 \
  MSL_MATH1(acos, __builtin_acosf)                                                                 \
  MSL_MATH1(atan, __builtin_atanf)                                                                 \
  MSL_MATH1(sinh, __builtin_sinhf)                                                                 \
  MSL_MATH1(cosh, __builtin_coshf)                                                                 \
  MSL_MATH1(tanh, __builtin_tanhf)                                                                 \
  MSL_MATH1(asinh, __builtin_asinhf)                                                               \
  MSL_MATH1(acosh, __builtin_acoshf)                                                               \
  MSL_MATH1(atanh, __builtin_atanhf)                                                               \
  MSL_MATH1(sinpi, msl_rt::sinpi)                                                                  \
  MSL_MATH1(cospi, msl_rt::cospi)                                                                  \
  MSL_MATH1(fabs, __builtin_fabsf)                                                                 \
  MSL_MATH1(floor, __builtin_floorf)                                                               \
  MSL_MATH1(ceil, __builtin_ceilf)                                                                 \
  MSL_MATH1(round, __builtin_roundf)                                                               \
  MSL_MATH1(rint, __builtin_rintf)                                                                 \
  MSL_MATH1(trunc, __builtin_truncf)                                                               \
  MSL_MATH1(fract, msl_rt::fract)                                                                  \
  MSL_MATH1(saturate, msl_rt::saturate)                                                            \
  MSL_MATH1(sign, msl_rt::sign)                                                                    \
  MSL_MATH1(degrees, msl_rt::degrees)                                                              \
  MSL_MATH1(radians, msl_rt::radians)                                                              \
  MSL_MATH2(pow, __builtin_powf)                                                                   \
  MSL_MATH2(powr, __builtin_powf)                                                                  \
  MSL_MATH2(atan2, __builtin_atan2f)                                                               \
  MSL_MATH2(fmod, __builtin_fmodf)                                                                 \
  MSL_MATH2(copysign, __builtin_copysignf)                                                         \
  MSL_MATH2(fmin, msl_rt::fmin)                                                                    \
  MSL_MATH2(fmax, msl_rt::fmax)                                                                    \
  MSL_MATH2(step, msl_rt::step)                                                                    \
  MSL_MATH2(divide, msl_rt::divide)                                                                \
  MSL_MATH3(fma, msl_rt::fma)                                                                      \
  MSL_MATH3(mix, msl_rt::mix)                                                                      \
  MSL_MATH3(smoothstep, msl_rt::smoothstep)                                                        \
  MSL_MATH1(abs, __builtin_fabsf)                                                                  \
  MSL_MATH2(min, msl_rt::fmin)                                                                     \
  MSL_MATH2(max, msl_rt::fmax)

namespace metal {
MSL_MATH_ALL()

#define MSL_INT(T)                                                                                 \
  MSL_FN constexpr T min(T a, T b) { return b < a ? b : a; }                                       \
  MSL_FN constexpr T max(T a, T b) { return a < b ? b : a; }                                       \
  MSL_FN constexpr T abs(T a) { return a < T(0) ? static_cast<T>(-a) : a; }                        \
  MSL_FN constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                        \
  MSL_FN constexpr T absdiff(T a, T b) { return a < b ? static_cast<T>(b - a) : static_cast<T>(a - b); } \
  MSL_FN T popcount(T a) {                                                                         \
    return static_cast<T>(__builtin_popcountl(static_cast<make_unsigned_t<T>>(a)));                \
  }                                                                                                \
  MSL_FN T clz(T a) {                                                                              \
    ulong u = static_cast<make_unsigned_t<T>>(a);                                                  \
    return static_cast<T>(u ? __builtin_clzl(u) - (64 - 8 * static_cast<int>(sizeof(T)))           \
                            : 8 * static_cast<int>(sizeof(T)));                                    \
  }                                                                                                \
  MSL_FN T ctz(T a) {                                                                              \
    ulong u = static_cast<make_unsigned_t<T>>(a);                                                  \
    return static_cast<T>(u ? __builtin_ctzl(u) : 8 * static_cast<int>(sizeof(T)));                \
  }                                                                                                \
  MSL_FN T rotate(T a, T by) {                                                                     \
    typedef make_unsigned_t<T> U;                                                                  \
    const int bits = 8 * static_cast<int>(sizeof(T));                                              \
    const int s = static_cast<int>(static_cast<U>(by)) & (bits - 1);                               \
    return static_cast<T>(s ? static_cast<U>(static_cast<U>(a) << s | static_cast<U>(a) >> (bits - s)) \
                            : static_cast<U>(a));                                                  \
  }                                                                                                \
  MSL_FN T reverse_bits(T a) {                                                                     \
    return static_cast<T>(__builtin_bitreverse64(static_cast<make_unsigned_t<T>>(a)) >>            \
                          (64 - 8 * sizeof(T)));                                                   \
  }
MSL_INT(char)
MSL_INT(uchar)
MSL_INT(short)
MSL_INT(ushort)
MSL_INT(int)
MSL_INT(uint)
MSL_INT(long)
MSL_INT(ulong)
#undef MSL_INT

MSL_FN int mulhi(int a, int b) { return static_cast<int>((static_cast<long>(a) * b) >> 32); }
MSL_FN uint mulhi(uint a, uint b) {
  return static_cast<uint>((static_cast<ulong>(a) * b) >> 32);
}
MSL_FN int mul24(int a, int b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
MSL_FN uint mul24(uint a, uint b) { return (a & 0xffffffu) * (b & 0xffffffu); }

MSL_FN float clamp(float x, float lo, float hi) { return fmin(fmax(x, lo), hi); }
MSL_FN half clamp(half x, half lo, half hi) { return fmin(fmax(x, lo), hi); }
MSL_FN bfloat clamp(bfloat x, bfloat lo, bfloat hi) { return fmin(fmax(x, lo), hi); }
template <class T, int N>
MSL_FN vec<T, N> clamp(vec<T, N> x, msl_nodeduce<vec<T, N>> lo, msl_nodeduce<vec<T, N>> hi) {
  return min(max(x, lo), hi);
}

MSL_FN float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
MSL_FN half ldexp(half x, int e) { return static_cast<half>(__builtin_ldexpf(x, e)); }

#define MSL_TEST(name, f)                                                                          \
  MSL_FN bool name(float a) { return f(a); }                                                       \
  MSL_FN bool name(half a) { return f(static_cast<float>(a)); }                                    \
  MSL_FN bool name(bfloat a) { return f(static_cast<float>(a)); }                                  \
  template <class T, int N> MSL_FN vec<bool, N> name(vec<T, N> a) {                                \
    vec<bool, N> r;                                                                                \
    for (int i = 0; i < N; i++) r[i] = name(a[i]);                                                 \
    return r;                                                                                      \
  }
MSL_TEST(isnan, __builtin_isnan)
MSL_TEST(isinf, __builtin_isinf)
MSL_TEST(isfinite, __builtin_isfinite)
MSL_TEST(signbit, __builtin_signbit)
#undef MSL_TEST

template <class T> MSL_FN T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
MSL_FN bool any(bool a) { return a; }
MSL_FN bool all(bool a) { return a; }
template <int N> MSL_FN bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || a[i];
  return r;
}
template <int N> MSL_FN bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && a[i];
  return r;
}

template <class T, int N> MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r = r + a[i] * b[i];
  return r;
}
template <class T, int N> MSL_FN T length_squared(vec<T, N> a) { return dot(a, a); }
template <class T, int N> MSL_FN T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> MSL_FN T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }
template <class T, int N> MSL_FN vec<T, N> normalize(vec<T, N> a) {
  return a * vec<T, N>(rsqrt(dot(a, a)));
}
template <class T> MSL_FN vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return vec<T, 3>(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x);
}

namespace fast {
using metal::clamp;
using metal::dot;
using metal::length;
using metal::normalize;
MSL_MATH_ALL()
} // namespace fast
namespace precise {
using metal::clamp;
using metal::dot;
using metal::length;
using metal::normalize;
MSL_MATH_ALL()
} // namespace precise
} // namespace metal
#undef MSL_MATH_ALL
#undef MSL_MATH1
#undef MSL_MATH2
#undef MSL_MATH3
