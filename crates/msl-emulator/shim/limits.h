// numeric_limits for the scalar types.
#pragma once

namespace metal {

template <class T> struct numeric_limits { static constexpr bool is_specialized = false; };

#define MSL_LIMITS_INT(T, lo, hi)                                                                  \
  template <> struct numeric_limits<T> {                                                           \
    static constexpr bool is_specialized = true;                                                   \
    static constexpr bool is_signed = __is_signed(T);                                              \
    static constexpr bool is_integer = true;                                                       \
    static constexpr bool has_infinity = false;                                                    \
    static constexpr int digits = static_cast<int>(sizeof(T) * 8) - (__is_signed(T) ? 1 : 0);      \
    static constexpr T min() { return lo; }                                                        \
    static constexpr T max() { return hi; }                                                        \
    static constexpr T lowest() { return lo; }                                                     \
  };
MSL_LIMITS_INT(bool, false, true)
MSL_LIMITS_INT(char, -128, 127)
MSL_LIMITS_INT(signed char, -128, 127)
MSL_LIMITS_INT(uchar, 0, 255)
MSL_LIMITS_INT(short, -32768, 32767)
MSL_LIMITS_INT(ushort, 0, 65535)
MSL_LIMITS_INT(int, -2147483647 - 1, 2147483647)
MSL_LIMITS_INT(uint, 0, 4294967295u)
MSL_LIMITS_INT(long, -9223372036854775807L - 1, 9223372036854775807L)
MSL_LIMITS_INT(ulong, 0, 18446744073709551615ul)
#undef MSL_LIMITS_INT

#define MSL_LIMITS_FLOAT(T, U, lo, hi, eps, den, inf, nan, dig)                                    \
  template <> struct numeric_limits<T> {                                                           \
    static constexpr bool is_specialized = true;                                                   \
    static constexpr bool is_signed = true;                                                        \
    static constexpr bool is_integer = false;                                                      \
    static constexpr bool has_infinity = true;                                                     \
    static constexpr bool has_quiet_NaN = true;                                                    \
    static constexpr int digits = dig;                                                             \
    static constexpr T min() { return __builtin_bit_cast(T, static_cast<U>(lo)); }                 \
    static constexpr T max() { return __builtin_bit_cast(T, static_cast<U>(hi)); }                 \
    static constexpr T lowest() {                                                                  \
      return __builtin_bit_cast(T, static_cast<U>((hi) | (U(1) << (sizeof(U) * 8 - 1))));          \
    }                                                                                              \
    static constexpr T epsilon() { return __builtin_bit_cast(T, static_cast<U>(eps)); }            \
    static constexpr T denorm_min() { return __builtin_bit_cast(T, static_cast<U>(den)); }         \
    static constexpr T infinity() { return __builtin_bit_cast(T, static_cast<U>(inf)); }           \
    static constexpr T quiet_NaN() { return __builtin_bit_cast(T, static_cast<U>(nan)); }          \
    static constexpr T signaling_NaN() { return quiet_NaN(); }                                     \
  };
MSL_LIMITS_FLOAT(half, ushort, 0x0400, 0x7bff, 0x1400, 1, 0x7c00, 0x7e00, 11)
MSL_LIMITS_FLOAT(bfloat, ushort, 0x0080, 0x7f7f, 0x3c00, 1, 0x7f80, 0x7fc0, 8)
MSL_LIMITS_FLOAT(float, uint, 0x00800000, 0x7f7fffff, 0x34000000, 1, 0x7f800000, 0x7fc00000, 24)
#undef MSL_LIMITS_FLOAT

} // namespace metal
