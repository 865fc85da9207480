// The row kernels, written once over a thin SIMD shim. Included by rows_<isa>.cpp after its `Simd` type, which lives in an unnamed namespace:
// every instantiation is then private to that file, and code for one instruction set cannot stand in for another's at link time.
//
// A shim S offers: A (scalar), F (vector of kWidth A), set, max_skip_nan, at_least, fma (one rounding), mul_add (any), exp2, tanh, sum, largest,
// and load2/store2 for every storage type: 2 * kWidth consecutive elements as two vectors, in a lane order of the shim's choice.
#pragma once
#include "cpu/rows.h"

#define FA_INLINE inline __attribute__((always_inline))

namespace fastalign {
namespace cpu {

// 2^f on [-1/2, 1/2] with p(0) = 1 exact: minimax in the relative error, 1.1e-7 (1.6e-7 with fp32 rounding).
template <class S> FA_INLINE typename S::F exp2_fraction(typename S::F f) {
  auto p = S::mul_add(S::set(0x1.5bba14p-10f), f, S::set(0x1.3cea88p-7f));
  p = S::mul_add(p, f, S::set(0x1.c6b752p-5f));
  p = S::mul_add(p, f, S::set(0x1.ebf9bcp-3f));
  p = S::mul_add(p, f, S::set(0x1.62e42ap-1f));
  return S::mul_add(p, f, S::set(1.0f));
}

// tanh in fp32 with full relative accuracy: odd polynomial near 0, 1 - 2e / (1 + e) with e = exp(-2|y|) elsewhere.
template <class S> FA_INLINE typename S::F tanh_float(typename S::F y) {
  using F = typename S::F;
  F z = y * y, size = y < S::set(0.0f) ? -y : y;
  F p = S::mul_add(S::set(-0.00570499f), z, S::set(0.02063909f));
  p = S::mul_add(p, z, S::set(-0.05373972f));
  p = S::mul_add(p, z, S::set(0.13331442f));
  p = S::mul_add(p, z, S::set(-0.33333282f));
  F near_zero = S::mul_add(p * z, y, y);
  F e = S::exp2(S::at_least(-126.0f, size * S::set(-2.885390082f)));
  F far = S::set(1.0f) - (e + e) / (S::set(1.0f) + e);
  return size < S::set(0.625f) ? near_zero : (y < S::set(0.0f) ? -far : far);
}

// The last elements of a row, fewer than load2 takes: `x` filled up with zeros, `hide` 0 for a real element and -inf for a filling.
// u + hide is then the neutral element of max and of the exponential sums, and u itself that of the plain sum, with or without tanh.
template <class S, class T> struct Rest {
  static constexpr int kPair = 2 * S::kWidth;
  alignas(64) T x[kPair], hide[kPair];
  FA_INLINE Rest(const T* from, int64_t n) {
    for (int i = 0; i < kPair; ++i) {
      x[i] = i < n ? from[i] : T{};
      from_acc(i < n ? typename S::A(0) : typename S::A(-INFINITY), &hide[i]);
    }
  }
};

template <class S, bool kCapped> FA_INLINE typename S::F to_u(typename S::F x, const RowTransform<typename S::A>& f) {
  if constexpr (kCapped) return S::tanh(x * S::set(f.cap_scale));
  else return x;
}

// The largest raw logit of a block, NaN skipped, in four chains.
template <class S, class T> struct Peak {
  using F = typename S::F;
  F high[4];

  FA_INLINE Peak() {
    for (F& h : high) h = S::set(typename S::A(-INFINITY));
  }
  template <int k> FA_INLINE void take(const T* x) {
    F a, b;
    S::load2(x, a, b);
    push<k>(a, b);
  }
  template <int k> FA_INLINE void take(const Rest<S, T>& rest) {
    F a, b, hide_a, hide_b;
    S::load2(rest.x, a, b);
    S::load2(rest.hide, hide_a, hide_b);
    push<k>(a + hide_a, b + hide_b);
  }
  template <int k> FA_INLINE void push(F a, F b) {
    high[k] = S::max_skip_nan(a, high[k]);
    high[k + 1] = S::max_skip_nan(b, high[k + 1]);
  }
  FA_INLINE typename S::A value() const { return S::largest(S::max_skip_nan(S::max_skip_nan(high[0], high[1]), S::max_skip_nan(high[2], high[3]))); }
};

// Partial sums of a chunk, in four chains.
template <class S, class T, bool kCapped, int kSums> struct Sums {
  using A = typename S::A;
  using F = typename S::F;
  static constexpr bool kS1 = (kSums & kSumS1) != 0, kS2Sz = (kSums & kSumS2Sz) != 0;
  const RowTransform<A>& f;
  const F c;
  F minus_m, s0[4], s1[4], s2[4], sz[4];

  FA_INLINE explicit Sums(const RowTransform<A>& transform) : f(transform), c(S::set(transform.c)) {
    minus_m = S::set(A(0));
    for (int k = 0; k < 4; ++k) s0[k] = s1[k] = s2[k] = sz[k] = S::set(A(0));
  }
  template <int k> FA_INLINE void take(const T* x) {
    F a, b;
    S::load2(x, a, b);
    a = to_u<S, kCapped>(a, f);
    b = to_u<S, kCapped>(b, f);
    push<k>(a, a);
    push<k + 1>(b, b);
  }
  template <int k> FA_INLINE void take(const Rest<S, T>& rest) {
    F a, b, hide_a, hide_b;
    S::load2(rest.x, a, b);
    S::load2(rest.hide, hide_a, hide_b);
    a = to_u<S, kCapped>(a, f);
    b = to_u<S, kCapped>(b, f);
    push<k>(a + hide_a, a);
    push<k + 1>(b + hide_b, b);
  }
  template <int k> FA_INLINE void push(F u, F u_or_zero) {
    F d = S::at_least(S::kLowest, S::fma(u, c, minus_m)), e = S::exp2(d);
    s0[k] = s0[k] + e;
    if constexpr (kS1) s1[k] = S::mul_add(e, d, s1[k]);
    if constexpr (kS2Sz) {
      s2[k] = S::mul_add(e, e, s2[k]);
      sz[k] = sz[k] + u_or_zero;
    }
  }
  // `merge` of row_state.h with a state without mass at `to`, lane by lane.
  FA_INLINE void move(A from, A to) {
    const A factor = rescale(from, to);
    const F by = S::set(factor), shift = S::set(s1_shift(from, to, factor));
    for (int k = 0; k < 4; ++k) {
      if constexpr (kS1) s1[k] = S::mul_add(s0[k], shift, s1[k]) * by;
      if constexpr (kS2Sz) s2[k] = s2[k] * (by * by);
      s0[k] = s0[k] * by;
    }
    minus_m = S::set(-to);
  }
  static FA_INLINE A total(const F (&v)[4]) { return S::sum((v[0] + v[1]) + (v[2] + v[3])); }
};

template <class S, class T, bool kCapped, int kSums>
RowState<typename S::A> forward_chunk(const T* x, int64_t n, const RowTransform<typename S::A>& f) {
  using A = typename S::A;
  constexpr int64_t kPair = 2 * S::kWidth, kStep = 2 * kPair;
  const int64_t whole = n - n % kPair;
  const Rest<S, T> rest(x + whole, n - whole);

  auto state = RowState<A>::empty();
  state.top = 0;
  Sums<S, T, kCapped, kSums> sums(f);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < whole ? start + kBlock : whole;
    const bool with_rest = whole < n && start + kBlock >= n;

    Peak<S, T> peak;
    int64_t i = start;
    for (; i + kStep <= end; i += kStep) {
      peak.template take<0>(x + i);
      peak.template take<2>(x + i + kPair);
    }
    if (i < end) peak.template take<0>(x + i);
    if (with_rest) peak.template take<2>(rest);
    const A block_max = peak.value();
    if (block_max > state.umax) {
      const A m = f.u(block_max) * f.c;
      // -inf (a mask value that overflows in bits) is no reference point: stay at 0, where such entries have no mass either.
      if (m > A(-INFINITY)) sums.move(state.m, m);
      state.m = m;
      state.umax = block_max;
      state.top = int32_t(start);
    }

    i = start;
    for (; i + kStep <= end; i += kStep) {
      for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(x + i + kBlock) + byte);
      sums.template take<0>(x + i);
      sums.template take<2>(x + i + kPair);
    }
    if (i < end) sums.template take<0>(x + i);
    if (with_rest) sums.template take<2>(rest);
  }
  state.s0 = sums.total(sums.s0);
  if constexpr ((kSums & kSumS1) != 0) state.s1 = sums.total(sums.s1);
  if constexpr ((kSums & kSumS2Sz) != 0) {
    state.s2 = sums.total(sums.s2);
    state.sz = sums.total(sums.sz);
  }
  return state;
}

template <class S, bool kCapped, bool kWithB>
FA_INLINE typename S::F gradient(typename S::F x, const RowTransform<typename S::A>& f, const GradientRow<typename S::A>& g) {
  using F = typename S::F;
  F u = to_u<S, kCapped>(x, f);
  F d = S::at_least(S::kLowest, S::fma(u, S::set(f.c), S::set(-g.m)));
  F y = S::exp2(d) * (kWithB ? S::mul_add(S::set(g.b), d, S::set(g.a)) : S::set(g.a));
  if constexpr (kCapped) y = y * S::mul_add(-u, u, S::set(typename S::A(1)));
  return y;
}

template <class S, class T, bool kCapped, bool kWithB>
void backward_chunk(const T* x, T* grad, int64_t n, const RowTransform<typename S::A>& f, const GradientRow<typename S::A>& g) {
  constexpr int64_t kPair = 2 * S::kWidth;
  const int64_t whole = n - n % kPair;
  typename S::F a, b;
  for (int64_t i = 0; i < whole; i += kPair) {
    S::load2(x + i, a, b);
    S::store2(grad + i, gradient<S, kCapped, kWithB>(a, f, g), gradient<S, kCapped, kWithB>(b, f, g));
  }
  if (whole < n) {
    Rest<S, T> rest(x + whole, n - whole);
    S::load2(rest.x, a, b);
    S::store2(rest.x, gradient<S, kCapped, kWithB>(a, f, g), gradient<S, kCapped, kWithB>(b, f, g));
    memcpy(grad + whole, rest.x, size_t(n - whole) * sizeof(T));
  }
}

template <class S, class T> RowState<typename S::A> forward_any(const void* x, int64_t n, const RowTransform<typename S::A>& f, int sums) {
  const T* p = static_cast<const T*>(x);
  const bool capped = f.cap_scale != 0;
  switch (sums) {
    case kSumS1: return capped ? forward_chunk<S, T, true, kSumS1>(p, n, f) : forward_chunk<S, T, false, kSumS1>(p, n, f);
    case kSumS2Sz: return capped ? forward_chunk<S, T, true, kSumS2Sz>(p, n, f) : forward_chunk<S, T, false, kSumS2Sz>(p, n, f);
    case kSumS1 | kSumS2Sz:
      return capped ? forward_chunk<S, T, true, kSumS1 | kSumS2Sz>(p, n, f) : forward_chunk<S, T, false, kSumS1 | kSumS2Sz>(p, n, f);
    default: return capped ? forward_chunk<S, T, true, 0>(p, n, f) : forward_chunk<S, T, false, 0>(p, n, f);
  }
}

template <class S, class T>
void backward_any(const void* x, void* grad, int64_t n, const RowTransform<typename S::A>& f, const GradientRow<typename S::A>& g) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(grad);
  const bool capped = f.cap_scale != 0, with_b = g.b != 0;
  if (capped) (with_b ? backward_chunk<S, T, true, true> : backward_chunk<S, T, true, false>)(from, to, n, f, g);
  else (with_b ? backward_chunk<S, T, false, true> : backward_chunk<S, T, false, false>)(from, to, n, f, g);
}

template <class S> RowState<float> forward_rows(int dtype, const void* x, int64_t n, const RowTransform<float>& f, int sums) {
  if (dtype == kBFloat16) return forward_any<S, bf16>(x, n, f, sums);
  if (dtype == kFloat16) return forward_any<S, fp16>(x, n, f, sums);
  return forward_any<S, float>(x, n, f, sums);
}
template <class S>
void backward_rows(int dtype, const void* x, void* grad, int64_t n, const RowTransform<float>& f, const GradientRow<float>& g) {
  if (dtype == kBFloat16) return backward_any<S, bf16>(x, grad, n, f, g);
  if (dtype == kFloat16) return backward_any<S, fp16>(x, grad, n, f, g);
  backward_any<S, float>(x, grad, n, f, g);
}

}  // namespace cpu
}  // namespace fastalign
