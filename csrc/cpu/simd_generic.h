// Vectors of 32 bytes that the compiler maps to what the CPU has; in fp64 exp2 and tanh are libm's, lane by lane. Included by the two files of
// generic row kernels, one for each arithmetic: together they would be the build's longest compilation by far.
#pragma once
#include "cpu/pair_rows_impl.h"

// On x86-64 these serve machines older than AVX2, and code that is long there is one copy, not one in each of a hundred kernels: half the time to
// compile. Elsewhere they are the kernels.
#if defined(__x86_64__)
#define FA_APART __attribute__((noinline))
#else
#define FA_APART FA_INLINE
#endif

namespace fastalign {
namespace cpu {
namespace {

template <class Scalar> struct Simd {
  using A = Scalar;
  typedef A F __attribute__((vector_size(32)));
  typedef int16_t Bits __attribute__((vector_size(32)));
  static constexpr bool kDouble = sizeof(A) == 8;
  static constexpr int kWidth = 32 / sizeof(A);

  static FA_INLINE F set(A x) { return x - F{}; }
  static FA_INLINE F max_skip_nan(F x, F high) { return x > high ? x : high; }
  // One rounding also where the CPU has no fused multiply-add: the product of two floats is exact in double.
  static FA_INLINE F fma(F a, F b, F c) {
    F r{};
    for (int i = 0; i < kWidth; ++i) r[i] = kDouble ? std::fma(a[i], b[i], c[i]) : A(double(a[i]) * double(b[i]) + double(c[i]));
    return r;
  }
  static FA_INLINE F mul_add(F a, F b, F c) { return a * b + c; }
  static constexpr bool kScales = false;
  template <class P> static FA_INLINE F inline_exp2(F d, [[maybe_unused]] const P& polynomial) {
    if constexpr (kDouble) {
      F r{};
      for (int i = 0; i < kWidth; ++i) r[i] = std::exp2(d[i]);
      return r;
    } else {
      // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. At -127 the factor 2^n is an exact 0.
      typedef uint32_t U __attribute__((vector_size(32)));
      const F magic = set(12582912.0f);
      d = bounded(d);
      F shifted = d + magic, n = shifted - magic;
      n = n > d ? n - set(1.0f) : n;
      F scale = F((U(n + magic) - U(magic) + 127u) << 23);
      return polynomial.of(d - n) * scale;
    }
  }
  template <class P> static FA_APART F exp2(F d, const P& polynomial) { return inline_exp2(d, polynomial); }
  template <class P> static FA_APART void exp2_four(F (&d)[4], const P& polynomial) {
    for (F& v : d) v = inline_exp2(v, polynomial);
  }
  static FA_INLINE F bounded(F d) {
    const F lowest = set(kDouble ? A(-1100) : A(-127));
    return d < lowest ? lowest : d;
  }
  static FA_APART F tanh(F y) {
    if constexpr (kDouble) {
      F r{};
      for (int i = 0; i < kWidth; ++i) r[i] = std::tanh(y[i]);
      return r;
    } else {
      return tanh_float<Simd>(y);
    }
  }
  static FA_INLINE A sum(F v) {
    A r = v[0];
    for (int i = 1; i < kWidth; ++i) r += v[i];
    return r;
  }
  static FA_INLINE A largest(F v) {
    A r = v[0];
    for (int i = 1; i < kWidth; ++i) r = v[i] > r ? v[i] : r;
    return r;
  }

  static FA_INLINE void load2(const A* p, F& a, F& b) {
    memcpy(&a, p, sizeof(F));
    memcpy(&b, p + kWidth, sizeof(F));
  }
  static FA_INLINE void store2(A* p, F a, F b) {
    memcpy(p, &a, sizeof(F));
    memcpy(p + kWidth, &b, sizeof(F));
  }
  template <class T> static FA_APART void load2(const T* p, F& a, F& b) {
    A lanes[2 * kWidth];
    for (int i = 0; i < 2 * kWidth; ++i) lanes[i] = to_acc(p[i]);
    load2(lanes, a, b);
  }
  template <class T> static FA_APART void store2(T* p, F a, F b) {
    A lanes[2 * kWidth];
    store2(lanes, a, b);
    for (int i = 0; i < 2 * kWidth; ++i) from_acc(lanes[i], p + i);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace fastalign
