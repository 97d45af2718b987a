// bfloat: 16-bit brain float, rounded to nearest even as the hardware does.
#pragma once

struct bfloat {
  ushort bits;

  bfloat() = default;
  constexpr bfloat(const bfloat &) = default;
  bfloat &operator=(const bfloat &) = default;

  template <class T, class = metal::enable_if_t<__is_arithmetic(T)>>
  constexpr bfloat(T v) : bits(round(static_cast<float>(v))) {}

  constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<uint>(bits) << 16);
  }

// Templates, so that they are no copy constructors and bfloat stays trivially copyable.
#define MSL_AS(space)                                                                              \
  template <class = void> constexpr bfloat(const space bfloat &o) : bits(o.bits) {}
  MSL_FOR_NAMED_SPACES(MSL_AS)
#undef MSL_AS

  static constexpr ushort round(float f) {
    uint u = __builtin_bit_cast(uint, f);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      return static_cast<ushort>((u >> 16) | 0x40u);
    }
    return static_cast<ushort>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

namespace msl_rt {
// The type of `bfloat op T`: integers keep bfloat, wider floats win.
template <class T> struct bf_result {
  typedef metal::conditional_t<__is_floating_point(T), float, bfloat> type;
};
} // namespace msl_rt

#define MSL_BF(op)                                                                                 \
  MSL_FN constexpr bfloat operator op(bfloat a, bfloat b) {                                        \
    return bfloat(static_cast<float>(a) op static_cast<float>(b));                                 \
  }                                                                                                \
  template <class T, class = metal::enable_if_t<__is_arithmetic(T)>>                               \
  MSL_FN constexpr typename msl_rt::bf_result<T>::type operator op(bfloat a, T b) {                \
    typedef typename msl_rt::bf_result<T>::type R;                                                 \
    return R(static_cast<float>(a) op static_cast<float>(R(b)));                                   \
  }                                                                                                \
  template <class T, class = metal::enable_if_t<__is_arithmetic(T)>>                               \
  MSL_FN constexpr typename msl_rt::bf_result<T>::type operator op(T a, bfloat b) {                \
    typedef typename msl_rt::bf_result<T>::type R;                                                 \
    return R(static_cast<float>(R(a)) op static_cast<float>(b));                                   \
  }
MSL_BF(+)
MSL_BF(-)
MSL_BF(*)
MSL_BF(/)
#undef MSL_BF

#define MSL_BF_SPACE(op, space)                                                                    \
  template <class T> MSL_FN space bfloat &operator op##=(space bfloat &a, T b) {                   \
    a.bits = bfloat(bfloat(a) op b).bits;                                                          \
    return a;                                                                                      \
  }
#define MSL_AS(space)                                                                              \
  MSL_BF_SPACE(+, space) MSL_BF_SPACE(-, space) MSL_BF_SPACE(*, space) MSL_BF_SPACE(/, space)
MSL_FOR_WRITABLE_SPACES(MSL_AS)
#undef MSL_AS
#undef MSL_BF_SPACE

#define MSL_BF(op)                                                                                 \
  MSL_FN constexpr bool operator op(bfloat a, bfloat b) {                                          \
    return static_cast<float>(a) op static_cast<float>(b);                                         \
  }                                                                                                \
  template <class T, class = metal::enable_if_t<__is_arithmetic(T)>>                               \
  MSL_FN constexpr bool operator op(bfloat a, T b) {                                               \
    return static_cast<float>(a) op static_cast<float>(b);                                         \
  }                                                                                                \
  template <class T, class = metal::enable_if_t<__is_arithmetic(T)>>                               \
  MSL_FN constexpr bool operator op(T a, bfloat b) {                                               \
    return static_cast<float>(a) op static_cast<float>(b);                                         \
  }
MSL_BF(==)
MSL_BF(!=)
MSL_BF(<)
MSL_BF(>)
MSL_BF(<=)
MSL_BF(>=)
#undef MSL_BF

MSL_FN constexpr bfloat operator-(bfloat a) { return bfloat(-static_cast<float>(a)); }
MSL_FN constexpr bfloat operator+(bfloat a) { return a; }

typedef bfloat bfloat16_t;

namespace metal {
template <class T> struct is_floating_point : bool_constant<__is_floating_point(T)> {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};
template <class T> constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T> constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
} // namespace metal
