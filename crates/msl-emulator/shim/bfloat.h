// bfloat: 16-bit brain float, rounded to nearest even as the hardware does.
#pragma once

#ifdef MSL_PASS_TYPES
// Only types count here, and a class in a named address space would need members for each space:
// clang's other 16-bit float stands in, a type of its own like Metal's.
typedef __fp16 bfloat;
static_assert(sizeof(bfloat) == 2, "bfloat has two bytes");
#else
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

#define MSL_BF(op)                                                                                 \
  template <class T> MSL_FN bfloat &operator op##=(bfloat &a, T b) {                               \
    a.bits = bfloat(a op b).bits;                                                                  \
    return a;                                                                                      \
  }
MSL_BF(+)
MSL_BF(-)
MSL_BF(*)
MSL_BF(/)
#undef MSL_BF

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
#endif

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
