// The row kernels, written once over a thin SIMD shim. Included by rows_<isa>.cpp after its `Simd` type, which lives in an unnamed namespace:
// every instantiation is then private to that file, and code for one instruction set cannot stand in for another's at link time.
//
// A shim S offers: A (scalar), F (vector of kWidth A), Bits (vector of int16_t), set, max_skip_nan, fma (one rounding), mul_add (any),
//   exp2     d, polynomial -> 2^d (times the polynomial's scale) for d up to a little above 0; exactly 0 for -inf; NaN stays NaN
//   kScales  whether exp2 takes a polynomial with a scale other than 1, at no cost
//   bounded  d -> d, or a finite number instead where exp2(d) is 0, so that their product is 0 too; may lose NaN, which exp2(d) carries
//   exp2_four  exp2 of four vectors, for the same bits; side by side where registers allow, so that none waits for its own results
//   tanh, sum, largest (over the lanes), and for every storage type load2 and store2: 2 * kWidth consecutive elements as two vectors, in a lane
//   order of the shim's choice. store2 takes NaN only with an empty low half, as x86 and common.h make them.
#pragma once
#include "cpu/rows.h"

#define FA_INLINE inline __attribute__((always_inline))

namespace fastalign {
namespace cpu {

// `scale` times a polynomial near 2^f on [0, 1]: minimax in the relative error with both ends exact, 9.2e-8 (1.6e-7 with fp32 rounding, -4e-9 on
// average). The ends matter: the largest logit of a row has an exponent of 0 or a rounding error on either side of it.
template <class S> struct Exp2Polynomial {
  using F = typename S::F;
  static constexpr int kDegree = 5;
  static constexpr float kTerms[kDegree + 1] = {1.0f, 0.69315173883f, 0.240159271464f, 0.055818675962f, 0.008990995096f, 0.001879318648f};
  F terms[kDegree + 1];

  FA_INLINE explicit Exp2Polynomial(typename S::A scale = 1) {
    for (int i = 0; i <= kDegree; ++i) terms[i] = S::set(kTerms[i] * scale);
  }
  // Of several vectors side by side.
  template <int n> FA_INLINE void apply(const F (&f)[n], F (&p)[n]) const {
    for (int k = 0; k < n; ++k) p[k] = S::mul_add(terms[kDegree], f[k], terms[kDegree - 1]);
    for (int i = kDegree - 2; i >= 0; --i)
      for (int k = 0; k < n; ++k) p[k] = S::mul_add(p[k], f[k], terms[i]);
  }
  FA_INLINE F of(F f) const {
    const F fraction[1] = {f};
    F p[1];
    apply(fraction, p);
    return p[0];
  }
};

// tanh in fp32 with full relative accuracy: odd polynomial near 0, 1 - 2e / (1 + e) with e = exp(-2|y|) elsewhere.
template <class S> FA_INLINE typename S::F tanh_float(typename S::F y) {
  using F = typename S::F;
  F z = y * y, size = y < S::set(0.0f) ? -y : y;
  F p = S::mul_add(S::set(-0.00570499f), z, S::set(0.02063909f));
  p = S::mul_add(p, z, S::set(-0.05373972f));
  p = S::mul_add(p, z, S::set(0.13331442f));
  p = S::mul_add(p, z, S::set(-0.33333282f));
  F near_zero = S::mul_add(p * z, y, y);
  F e = S::exp2(size * S::set(-2.885390082f), Exp2Polynomial<S>());
  F far = S::set(1.0f) - (e + e) / (S::set(1.0f) + e);
  return size < S::set(0.625f) ? near_zero : (y < S::set(0.0f) ? -far : far);
}

// The last elements of a row, fewer than load2 takes: `x` filled up with zeros, `hide` 0 for a real element and -inf for a filling.
// u + hide of a filling is neutral in the exponential sums, and u itself in the plain sum, with or without tanh.
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

template <class S> typename S::A one_u(typename S::A x, const RowTransform<typename S::A>& f) {
  return f.cap_scale != 0 ? to_u<S, true>(S::set(x), f)[0] : x;
}
template <class S> typename S::A one_exp2(typename S::A d) { return S::exp2(S::set(d), Exp2Polynomial<S>())[0]; }

// The largest raw logit of a block, a step (four vectors of F) at a time. A NaN may be skipped or returned: it reaches the sums either way.
template <class S, class T> struct BlockMax {
  using A = typename S::A;
  using F = typename S::F;
  static constexpr int64_t kStep = 4 * S::kWidth;
  F high[4];

  FA_INLINE BlockMax() {
    for (F& h : high) h = S::set(A(-INFINITY));
  }
  FA_INLINE void take(const T* x) {
    F a, b;
    for (int k = 0; k < 4; k += 2) {
      S::load2(x + k * S::kWidth, a, b);
      high[k] = S::max_skip_nan(a, high[k]);
      high[k + 1] = S::max_skip_nan(b, high[k + 1]);
    }
  }
  // Of the steps taken, and of x[done, n), which no step took.
  FA_INLINE A result(const T* x, int64_t done, int64_t n) const {
    A best = S::largest(S::max_skip_nan(S::max_skip_nan(high[0], high[1]), S::max_skip_nan(high[2], high[3])));
    for (int64_t i = done; i < n; ++i) best = to_acc(x[i]) > best ? to_acc(x[i]) : best;
    return best;
  }
};

// The extreme of 16-bit patterns read as signed integers; kSign -1: the smallest, as -1 - (largest complement).
template <class S, int kSign> struct Extreme16 {
  using V = typename S::Bits;
  static constexpr int64_t kLanes = sizeof(V) / sizeof(int16_t), kStep = 4 * S::kWidth;
  static constexpr int16_t kFlip = kSign < 0 ? -1 : 0;
  V high[kStep / kLanes];

  FA_INLINE Extreme16() {
    for (V& h : high) h = V{} + int16_t(-32768);
  }
  FA_INLINE void take(const int16_t* x) {
    V v;
    for (int k = 0; k < kStep / kLanes; ++k) {
      memcpy(&v, x + k * kLanes, sizeof(V));
      v ^= kFlip;
      high[k] = v > high[k] ? v : high[k];
    }
  }
  FA_INLINE int16_t result(const int16_t* x, int64_t done, int64_t n) const {
    int16_t best = -32768;
    for (const V& h : high)
      for (int64_t k = 0; k < kLanes; ++k) best = h[k] > best ? h[k] : best;
    for (int64_t i = done; i < n; ++i) best = int16_t(x[i] ^ kFlip) > best ? int16_t(x[i] ^ kFlip) : best;
    return int16_t(best ^ kFlip);
  }
};

// 16-bit floats need no conversion: read as signed integers they are ordered alike while positive, and in reverse among the negative ones,
// where the block is looked at once more.
template <class S, class T> struct BlockMax16 {
  static constexpr int64_t kStep = Extreme16<S, 1>::kStep;
  Extreme16<S, 1> largest;

  FA_INLINE void take(const T* x) { largest.take(reinterpret_cast<const int16_t*>(x)); }
  FA_INLINE float result(const T* x, int64_t done, int64_t n) const {
    const int16_t* bits = reinterpret_cast<const int16_t*>(x);
    int16_t best = largest.result(bits, done, n);
    if (best < 0) {
      Extreme16<S, -1> smallest;
      int64_t i = 0;
      for (; i + kStep <= n; i += kStep) smallest.take(bits + i);
      best = smallest.result(bits, i, n);
    }
    return to_acc(T{uint16_t(best)});
  }
};
template <class S> struct BlockMax<S, bf16> : BlockMax16<S, bf16> {};
template <class S> struct BlockMax<S, fp16> : BlockMax16<S, fp16> {};

template <class S, class T> FA_INLINE typename S::A block_max(const T* x, int64_t n) {
  BlockMax<S, T> max;
  int64_t i = 0;
  for (; i + max.kStep <= n; i += max.kStep) max.take(x + i);
  return max.result(x, i, n);
}

// Partial sums of a chunk, in four chains.
template <class S, class T, bool kCapped, int kSums> struct Sums {
  using A = typename S::A;
  using F = typename S::F;
  static constexpr bool kS1 = (kSums & kSumS1) != 0, kS2Sz = (kSums & kSumS2Sz) != 0, kGuarded = kS2Sz;
  const RowTransform<A>& f;
  const F c;
  const Exp2Polynomial<S> exp2;
  F minus_m, s0[4], s1[4], s2[4], sz[4];

  FA_INLINE explicit Sums(const RowTransform<A>& transform) : f(transform), c(S::set(transform.c)) {
    minus_m = S::set(A(0));
    for (int k = 0; k < 4; ++k) s0[k] = s1[k] = s2[k] = sz[k] = S::set(A(0));
  }
  // Four vectors.
  FA_INLINE void take_step(const T* x) {
    F u[4], d[4], e[4];
    S::load2(x, u[0], u[1]);
    S::load2(x + 2 * S::kWidth, u[2], u[3]);
    for (F& v : u) v = to_u<S, kCapped>(v, f);
    for (int k = 0; k < 4; ++k) e[k] = d[k] = S::fma(u[k], c, minus_m);
    S::exp2_four(e, exp2);
    for (int k = 0; k < 4; ++k) add(k, u[k], d[k], e[k]);
  }
  // Two vectors, into chains k and k + 1.
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
    const F d = S::fma(u, c, minus_m);
    add(k, u_or_zero, d, S::exp2(d, exp2));
  }
  FA_INLINE void add(int k, F u_or_zero, F d, F e) {
    s0[k] = s0[k] + e;
    if constexpr (kS1) s1[k] = S::mul_add(e, kGuarded ? S::bounded(d) : d, s1[k]);
    if constexpr (kS2Sz) {
      s2[k] = S::mul_add(e, e, s2[k]);
      sz[k] = S::mul_add(u_or_zero, S::set(A(kSumShare)), sz[k]);
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

// Into the second-level cache, far enough ahead that memory answers in time.
FA_INLINE void fetch(const char* p) { __builtin_prefetch(p + 4096, 0, 2); }

template <class S, class T, bool kCapped, int kSums>
RowState<typename S::A> forward_chunk(const T* x, int64_t n, const RowTransform<typename S::A>& f) {
  using A = typename S::A;
  constexpr int64_t kPair = 2 * S::kWidth, kStep = 2 * kPair;
  const int64_t whole = n - n % kPair;
  const Rest<S, T> rest(x + whole, n - whole);

  auto state = RowState<A>::empty();
  state.top = 0;
  Sums<S, T, kCapped, kSums> sums(f);
  A largest = block_max<S>(x, n < kBlock ? n : kBlock);
  for (int64_t start = 0; start < n; start += kBlock) {
    if (largest > state.umax) {
      const A m = reference_point(f.u(largest), f);
      // Without mass so far there is nothing to count from: 0 serves, where entries without mass have none either.
      if (m > A(-INFINITY)) sums.move(state.m, m);
      state.m = m;
      state.umax = largest;
      state.top = int32_t(start);
    }
    const int64_t next = start + kBlock, end = next < whole ? next : whole;
    int64_t i = start;
    if (next + kBlock <= n) {
      // The next block's largest logit on the way: its loads hide behind this block's arithmetic, and memory is asked for what comes after it.
      BlockMax<S, T> max;
      for (; i < next; i += kStep) {
        for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64) fetch(reinterpret_cast<const char*>(x + i + kBlock) + byte);
        max.take(x + i + kBlock);
        sums.take_step(x + i);
      }
      largest = max.result(x + next, kBlock, kBlock);
      continue;
    }
    for (; i + kStep <= end; i += kStep) {
      for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64) fetch(reinterpret_cast<const char*>(x + i + kBlock) + byte);
      sums.take_step(x + i);
    }
    if (i < end) sums.template take<0>(x + i);
    if (next >= n && whole < n) sums.template take<2>(rest);
    if (next < n) largest = block_max<S>(x + next, n - next);
  }
  state.s0 = sums.total(sums.s0);
  if constexpr ((kSums & kSumS1) != 0) state.s1 = sums.total(sums.s1);
  if constexpr ((kSums & kSumS2Sz) != 0) {
    state.s2 = sums.total(sums.s2);
    state.sz = sums.total(sums.sz);
  }
  return state;
}

// dx of GradientRow, in place of the logits. Its constants are copies: a store to the gradient could be to the arguments, for all the compiler knows.
// Without b the polynomial may carry the factor a.
template <class S, bool kCapped, bool kWithB> struct Gradient {
  using A = typename S::A;
  using F = typename S::F;
  static constexpr bool kFolded = !kWithB && S::kScales;
  const RowTransform<A> f;
  const F c, minus_m, a, b;
  const Exp2Polynomial<S> exp2;

  FA_INLINE Gradient(const RowTransform<A>& transform, const GradientRow<A>& g)
      : f(transform), c(S::set(f.c)), minus_m(S::set(-g.m)), a(S::set(g.a)), b(S::set(g.b)), exp2(kFolded ? g.a : A(1)) {}
  FA_INLINE F distance(F u) const { return S::fma(u, c, minus_m); }
  FA_INLINE F finish(F u, F d, F e) const {
    F y = kFolded ? e : e * (kWithB ? S::mul_add(b, S::bounded(d), a) : a);
    if constexpr (kCapped) y = y * S::mul_add(-u, u, S::set(A(1)));
    return y;
  }
  FA_INLINE void four(F (&x)[4]) const {
    F d[4], e[4];
    for (F& u : x) u = to_u<S, kCapped>(u, f);
    for (int k = 0; k < 4; ++k) e[k] = d[k] = distance(x[k]);
    S::exp2_four(e, exp2);
    for (int k = 0; k < 4; ++k) x[k] = finish(x[k], d[k], e[k]);
  }
  FA_INLINE F one(F x) const {
    const F u = to_u<S, kCapped>(x, f), d = distance(u);
    return finish(u, d, S::exp2(d, exp2));
  }
};

template <class S, class T, bool kCapped, bool kWithB>
void backward_chunk(const T* x, T* grad, int64_t n, const RowTransform<typename S::A>& f, const GradientRow<typename S::A>& g) {
  constexpr int64_t kPair = 2 * S::kWidth, kStep = 2 * kPair;
  const int64_t whole = n - n % kPair;
  const Gradient<S, kCapped, kWithB> gradient(f, g);
  int64_t i = 0;
  for (; i + kStep <= whole; i += kStep) {
    typename S::F v[4];
    S::load2(x + i, v[0], v[1]);
    S::load2(x + i + kPair, v[2], v[3]);
    gradient.four(v);
    S::store2(grad + i, v[0], v[1]);
    S::store2(grad + i + kPair, v[2], v[3]);
  }
  typename S::F a, b;
  if (i < whole) {
    S::load2(x + i, a, b);
    S::store2(grad + i, gradient.one(a), gradient.one(b));
  }
  if (whole < n) {
    Rest<S, T> rest(x + whole, n - whole);
    S::load2(rest.x, a, b);
    S::store2(rest.x, gradient.one(a), gradient.one(b));
    memcpy(grad + whole, rest.x, size_t(n - whole) * sizeof(T));
  }
}

template <class S, class T, bool kCapped>
RowState<typename S::A> forward_sums(const T* x, int64_t n, const RowTransform<typename S::A>& f, int sums) {
  switch (sums) {
    case 0: return forward_chunk<S, T, kCapped, 0>(x, n, f);
    case kSumS2Sz: return forward_chunk<S, T, kCapped, kSumS2Sz>(x, n, f);
    case kSumS1: {
      // Entropy alone is swept without a guard against 0 * -inf in s1, which would cost 6 %. Where one was met, the full sweep has the guard.
      auto s = forward_chunk<S, T, kCapped, kSumS1>(x, n, f);
      if (s.s1 == s.s1 || s.s0 != s.s0) return s;
      s = forward_chunk<S, T, kCapped, kSumS1 | kSumS2Sz>(x, n, f);
      s.s2 = s.sz = 0;
      return s;
    }
    default: return forward_chunk<S, T, kCapped, kSumS1 | kSumS2Sz>(x, n, f);
  }
}

template <class S, class T> RowState<typename S::A> forward_any(const void* x, int64_t n, const RowTransform<typename S::A>& f, int sums) {
  const T* p = static_cast<const T*>(x);
  return f.cap_scale != 0 ? forward_sums<S, T, true>(p, n, f, sums) : forward_sums<S, T, false>(p, n, f, sums);
}

template <class S, class T>
void backward_any(const void* x, void* grad, int64_t n, const RowTransform<typename S::A>& f, const GradientRow<typename S::A>& g) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(grad);
  // A folded factor is multiplied by up to 2 before it is made smaller, and must stay finite; one that does not goes with b, whatever b is.
  const bool capped = f.cap_scale != 0, with_b = g.b != 0 || !std::isfinite(2 * g.a);
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
