// Scalar functions with their numerically safe forms. Host and device, fp32 and fp64. Twin: fastalign/ops/math/scalar.py.
#pragma once
#include <type_traits>
#include "common.h"

namespace fastalign {

// Formulas that CPU kernels evaluate on many tokens at once take T = a vector of scalar_t<T>: comparisons are then masks, a selection takes every
// lane from its side, and both sides are evaluated.
template <class T> struct ScalarOf { using type = T; };
template <class T> using scalar_t = typename ScalarOf<T>::type;
template <class T> FA_HD T splat(scalar_t<T> x) {
  if constexpr (std::is_same_v<T, scalar_t<T>>) return x;
  else return x - T{};
}

constexpr double kLn2 = 0.69314718055994530942;

// x y + z, rounded once on a GPU, so that every kernel there rounds alike. On the CPU the fused form may be a function call.
template <class T> FA_HD T multiply_add(T x, T y, T z) {
#ifdef __CUDA_ARCH__
  return fma(x, y, z);
#else
  return x * y + z;
#endif
}

template <class T> FA_HD T relu(T x) { return x > T(0) ? x : (x != x ? x : T(0)); }

// log(1 + e^x) without overflow or cancellation.
template <class T> FA_HD T softplus(T x) {
  T tail = log1p(exp(-fabs(x)));
  return relu(x) + tail;
}

// The exponentials that such a formula uses: the library's, or by another struct of the same shape ones for vectors.
struct StdMath {
  template <class T> static FA_HD T exp(T x) { return fastalign::exp(x); }
  template <class T> static FA_HD T expm1(T x) { return fastalign::expm1(x); }
};

// 1 / (1 + e^-x), by the branch that cannot overflow.
template <class T, class M = StdMath> FA_HD T sigmoid(T x) {
  const T one = splat<T>(1), e = M::exp(x < T{} ? x : -x);
  return (x < T{} ? e : one) / (one + e);
}

// log(1 - e^x) for x < 0 (Maechler 2012: the branch at -ln 2 keeps full relative accuracy).
template <class T> FA_HD T log1mexp(T x) { return x < T(-kLn2) ? log1p(-exp(x)) : log(-expm1(x)); }

template <class T> FA_HD T clamp(T x, scalar_t<T> lo, scalar_t<T> hi) { return x < lo ? splat<T>(lo) : (x > hi ? splat<T>(hi) : x); }

template <class T> FA_HD T finite_limit();
template <> FA_HD float finite_limit<float>() { return 3.402823466e38f; }
template <> FA_HD double finite_limit<double>() { return 1.7976931348623157e308; }
template <class T> FA_HD bool is_finite(T x) { return fabs(x) <= finite_limit<T>(); }

template <class T> struct ValueSlope { T value, slope; };

// What an upstream gradient makes of a slope. A slope of exactly 0 (of a token that is not scored, a clipped one, a dropped pair) passes nothing on,
// not even an infinite gradient.
template <class T> FA_HD T times_slope(T gradient, T slope) { return slope == T(0) ? T(0) : gradient * slope; }

// KL estimators per token on d = logprob - ref_logprob (http://joschu.net/blog/kl-approx.html): value and d value / d logprob.
//   k1 = d    k2 = d^2/2    k3 = e^-d - 1 + d    abs = |d|
// k3 cancels near 0 (a series is used for |d| < 0.05). In its value -d is clamped at 20, in the exponent and outside of it, so that the value is
// never negative and finite down to d = -inf; beyond the clamp the slope keeps the value it has there. d = inf - inf counts as 0.
enum KlKind : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };
template <class T, class M = StdMath> FA_HD ValueSlope<T> kl_estimate(int kind, T logprob, T ref_logprob) {
  using S = scalar_t<T>;
  const T d = logprob == ref_logprob ? T{} : logprob - ref_logprob;
  switch (kind) {
    case kK1: return {d, splat<T>(1)};
    case kK2: return {d * d / S(2), d};
    case kAbs: return {d < T{} ? -d : d, d > T{} ? splat<T>(1) : (d < T{} ? splat<T>(-1) : d)};
    default: {
      const T series = d * d * (S(1) / 2 - d * (S(1) / 6 - d * (S(1) / 24 - d * (S(1) / 120 - d * (S(1) / 720)))));
      const T x = -d > S(20) ? splat<T>(20) : -d, e = M::expm1(x), far = e - x;
      return {(d < S(0.05)) & (d > S(-0.05)) ? series : far, -e};
    }
  }
}

}  // namespace fastalign
