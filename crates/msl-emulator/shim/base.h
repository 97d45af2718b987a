// Scalar types, type traits and address-space plumbing shared by every header of the shim.
//
// MSL_PASS_TYPES selects the type-check pass, in which the address spaces are real.
#pragma once

#define MSL_FN static inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;

#ifdef MSL_PASS_TYPES
#define MSL_DEVICE __attribute__((address_space(1)))
#define MSL_CONSTANT __attribute__((address_space(2)))
#define MSL_THREADGROUP __attribute__((address_space(3)))
// Expands X once per address space that a pointer parameter may have.
#define MSL_FOR_SPACES(X) X() X(MSL_DEVICE) X(MSL_CONSTANT) X(MSL_THREADGROUP)
#define MSL_FOR_NAMED_SPACES(X) X(MSL_DEVICE) X(MSL_CONSTANT) X(MSL_THREADGROUP)
#define MSL_FOR_WRITABLE_SPACES(X) X() X(MSL_DEVICE) X(MSL_THREADGROUP)
#else
#define MSL_DEVICE
#define MSL_CONSTANT
#define MSL_THREADGROUP
#define MSL_FOR_SPACES(X) X()
#define MSL_FOR_NAMED_SPACES(X)
#define MSL_FOR_WRITABLE_SPACES(X) X()
#endif

namespace metal {

template <class T, T V> struct integral_constant {
  static constexpr T value = V;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool B> using bool_constant = integral_constant<bool, B>;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;

template <bool C, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool C, class T = void> using enable_if_t = typename enable_if<C, T>::type;

template <bool C, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;

template <class T> struct remove_reference { typedef T type; };
template <class T> struct remove_reference<T &> { typedef T type; };
template <class T> struct remove_reference<T &&> { typedef T type; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;

template <class T> struct remove_const { typedef T type; };
template <class T> struct remove_const<const T> { typedef T type; };
template <class T> struct remove_volatile { typedef T type; };
template <class T> struct remove_volatile<volatile T> { typedef T type; };
template <class T> struct remove_cv {
  typedef typename remove_volatile<typename remove_const<T>::type>::type type;
};
#ifdef MSL_PASS_TYPES
template <class T> struct remove_cv<MSL_DEVICE T> : remove_cv<T> {};
template <class T> struct remove_cv<MSL_CONSTANT T> : remove_cv<T> {};
template <class T> struct remove_cv<MSL_THREADGROUP T> : remove_cv<T> {};
template <class T> struct remove_cv<MSL_CONSTANT const T> : remove_cv<T> {};
template <class T> struct remove_cv<MSL_DEVICE const T> : remove_cv<T> {};
template <class T> struct remove_cv<MSL_THREADGROUP const T> : remove_cv<T> {};
#endif
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T> struct decay { typedef decay_t<T> type; };

template <class T> struct is_const : false_type {};
template <class T> struct is_const<const T> : true_type {};
template <class T> struct is_pointer : false_type {};
template <class T> struct is_pointer<T *> : true_type {};
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> constexpr bool is_integral_v = is_integral<T>::value;
template <class T> struct is_signed : bool_constant<__is_signed(T)> {};
template <class T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class T> constexpr bool is_signed_v = is_signed<T>::value;
template <class T> constexpr bool is_unsigned_v = is_unsigned<T>::value;
template <class T> struct is_enum : bool_constant<__is_enum(T)> {};
template <class A, class B> struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class... T> struct msl_void { typedef void type; };
template <class... T> using void_t = typename msl_void<T...>::type;
template <class T> T &&declval() noexcept;

template <class T> struct msl_identity { typedef T type; };
template <class T> using msl_nodeduce = typename msl_identity<T>::type;

} // namespace metal
