// The row kernels over a policy row and a reference row at once, over the same SIMD shim as rows_impl.h, whose parts they use.
#pragma once
#include <type_traits>
#include "cpu/rows_impl.h"

namespace fastalign {
namespace cpu {

// Partial sums of a chunk of both rows, in two chains per row.
template <class S, class T, bool kCapped, int kSums> struct PairSums {
  using A = typename S::A;
  using F = typename S::F;
  static constexpr bool kS1 = (kSums & kSumS1) != 0, kS2Sz = (kSums & kSumS2Sz) != 0, kT = (kSums & kSumT) != 0,
                        kTr = (kSums & kSumTr) != 0;
  const RowTransform<A>& f;
  const F c, zero;
  const Exp2Polynomial<S> exp2;
  F minus_m, minus_ref_m, s0[2], s1[2], s2[2], sz[2], ref_s0[2], t[2], tr[2];

  FA_INLINE explicit PairSums(const RowTransform<A>& transform) : f(transform), c(S::set(transform.c)), zero(S::set(A(0))) {
    minus_m = minus_ref_m = zero;
    for (int k = 0; k < 2; ++k) s0[k] = s1[k] = s2[k] = sz[k] = ref_s0[k] = t[k] = tr[k] = zero;
  }
  FA_INLINE void take(const T* x, const T* y) {
    F u[2], ref_u[2];
    S::load2(x, u[0], u[1]);
    S::load2(y, ref_u[0], ref_u[1]);
    for (int k = 0; k < 2; ++k) u[k] = to_u<S, kCapped>(u[k], f), ref_u[k] = to_u<S, kCapped>(ref_u[k], f);
    push(u, u, ref_u);
  }
  FA_INLINE void take(const Rest<S, T>& x, const Rest<S, T>& y) {
    F u[2], ref_u[2], hide[2], hidden[2];
    S::load2(x.x, u[0], u[1]);
    S::load2(y.x, ref_u[0], ref_u[1]);
    S::load2(x.hide, hide[0], hide[1]);
    for (int k = 0; k < 2; ++k) {
      u[k] = to_u<S, kCapped>(u[k], f), hidden[k] = u[k] + hide[k];
      ref_u[k] = to_u<S, kCapped>(ref_u[k], f) + hide[k];
    }
    push(hidden, u, ref_u);
  }
  // A vector into each of the two chains.
  FA_INLINE void push(const F (&u)[2], const F (&u_or_zero)[2], const F (&ref_u)[2]) {
    F d[4], e[4];  // of the policy, then of the reference
    for (int k = 0; k < 2; ++k) {
      e[k] = d[k] = S::fma(u[k], c, minus_m);
      e[2 + k] = d[2 + k] = S::fma(ref_u[k], c, minus_ref_m);
    }
    S::exp2_four(e, exp2);
    for (int k = 0; k < 2; ++k) {
      const F er = e[2 + k], by = d[k] - d[2 + k];
      s0[k] = s0[k] + e[k];
      ref_s0[k] = ref_s0[k] + er;
      // Where there is no mass the difference may be infinite or NaN, and counts nothing.
      if constexpr (kT) t[k] = S::mul_add(e[k], e[k] == zero ? zero : by, t[k]);
      if constexpr (kTr) tr[k] = S::mul_add(er, er == zero ? zero : by, tr[k]);
      if constexpr (kS1) s1[k] = S::mul_add(e[k], S::bounded(d[k]), s1[k]);
      if constexpr (kS2Sz) {
        s2[k] = S::mul_add(e[k], e[k], s2[k]);
        sz[k] = S::mul_add(u_or_zero[k], S::set(A(kSumShare)), sz[k]);
      }
    }
  }
  // `merge` of row_state.h with a state without mass at (to, ref_to), lane by lane.
  FA_INLINE void move(A from, A to, A ref_from, A ref_to) {
    const A factor = rescale(from, to), ref_factor = rescale(ref_from, ref_to);
    const F by = S::set(factor), ref_by = S::set(ref_factor), s1_by = S::set(s1_shift(from, to, factor));
    const F cross = S::set(distance(from, to) - distance(ref_from, ref_to));
    for (int k = 0; k < 2; ++k) {
      if constexpr (kT) t[k] = factor == A(0) ? zero : (s0[k] == zero ? t[k] : S::mul_add(cross, s0[k], t[k])) * by;
      if constexpr (kTr) tr[k] = ref_factor == A(0) ? zero : (ref_s0[k] == zero ? tr[k] : S::mul_add(cross, ref_s0[k], tr[k])) * ref_by;
      if constexpr (kS1) s1[k] = S::mul_add(s0[k], s1_by, s1[k]) * by;
      if constexpr (kS2Sz) s2[k] = s2[k] * (by * by);
      s0[k] = s0[k] * by;
      ref_s0[k] = ref_s0[k] * ref_by;
    }
    // Without mass so far there is nothing to count from: 0 serves, where entries without mass have none either.
    minus_m = to > A(-INFINITY) ? S::set(-to) : zero;
    minus_ref_m = ref_to > A(-INFINITY) ? S::set(-ref_to) : zero;
  }
  static FA_INLINE A total(const F (&v)[2]) { return S::sum(v[0] + v[1]); }
};

template <class S, class T, bool kCapped, int kSums>
PairState<typename S::A> forward_pair_chunk(const T* x, const T* y, int64_t n, const RowTransform<typename S::A>& f) {
  using A = typename S::A;
  constexpr int64_t kPair = 2 * S::kWidth;
  const int64_t whole = n - n % kPair;
  const Rest<S, T> rest(x + whole, n - whole), ref_rest(y + whole, n - whole);

  auto p = RowState<A>::empty();
  auto r = RefState<A>::empty();
  p.top = 0;
  A ref_max = A(-INFINITY);
  PairSums<S, T, kCapped, kSums> sums(f);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < whole ? start + kBlock : whole, stop = n < start + kBlock ? n : start + kBlock;
    const A largest = block_max<S>(x + start, stop - start), ref_largest = block_max<S>(y + start, stop - start);
    if (largest > p.umax || ref_largest > ref_max) {
      if (largest > p.umax) p.umax = largest, p.top = int32_t(start);
      if (ref_largest > ref_max) ref_max = ref_largest;
      const A m = reference_point(f.u(p.umax), f), ref_m = reference_point(f.u(ref_max), f);
      sums.move(p.m, m, r.m, ref_m);
      p.m = m, r.m = ref_m;
    }
    for (int64_t i = start; i < end; i += kPair) {
      for (size_t byte = 0; byte < kPair * sizeof(T); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i + kBlock) + byte);
        __builtin_prefetch(reinterpret_cast<const char*>(y + i + kBlock) + byte);
      }
      sums.take(x + i, y + i);
    }
    if (whole < n && start + kBlock >= n) sums.take(rest, ref_rest);
  }
  p.s0 = sums.total(sums.s0);
  r.s0 = sums.total(sums.ref_s0);
  if constexpr ((kSums & kSumT) != 0) r.t = sums.total(sums.t);
  if constexpr ((kSums & kSumTr) != 0) r.tr = sums.total(sums.tr);
  if constexpr ((kSums & kSumS1) != 0) p.s1 = sums.total(sums.s1);
  if constexpr ((kSums & kSumS2Sz) != 0) {
    p.s2 = sums.total(sums.s2);
    p.sz = sums.total(sums.sz);
  }
  return {p, r};
}

// The two KL terms of math/row_state.h beside those of GradientRow. kKls: which of them (kSumT: the one with c, kSumTr: the one with k). Constants
// are copies, as in Gradient.
template <class S, bool kCapped, bool kWithB, int kKls> struct PairGradient {
  using A = typename S::A;
  using F = typename S::F;
  static constexpr bool kT = (kKls & kSumT) != 0, kTr = (kKls & kSumTr) != 0;
  static constexpr int kVectors = kTr ? 2 : 4;  // at a time: with four exponentials
  const RowTransform<A> f;
  const F zero, c, minus_m, minus_ref_m, a, b, kl_c, kl_mean, kl_k, minus_ratio;
  const Exp2Polynomial<S> exp2;

  FA_INLINE PairGradient(const RowTransform<A>& transform, const PairGradientRow<A>& g)
      : f(transform),
        zero(S::set(A(0))),
        c(S::set(f.c)),
        minus_m(S::set(-g.m)),
        minus_ref_m(S::set(-g.ref_m)),
        a(S::set(g.a)),
        b(S::set(g.b)),
        kl_c(S::set(g.kl.c)),
        kl_mean(S::set(g.kl.mean)),
        kl_k(S::set(g.kl.k)),
        minus_ratio(S::set(-g.kl.ratio)) {}

  // dx in place of the policy's logits x; y: the reference's.
  FA_INLINE void apply(F (&x)[kVectors], const F (&y)[kVectors]) const {
    F d[kVectors], dr[kVectors], e[4];
    for (int k = 0; k < kVectors; ++k) {
      x[k] = to_u<S, kCapped>(x[k], f);
      e[k] = d[k] = S::fma(x[k], c, minus_m);
      dr[k] = S::fma(to_u<S, kCapped>(y[k], f), c, minus_ref_m);
      if constexpr (kTr) e[2 + k] = dr[k];
    }
    S::exp2_four(e, exp2);
    for (int k = 0; k < kVectors; ++k) {
      const F u = x[k];
      F inner = a;
      if constexpr (kWithB) inner = S::mul_add(b, S::bounded(d[k]), inner);
      if constexpr (kT) inner = S::mul_add(kl_c, e[k] == zero ? zero : d[k] - dr[k] - kl_mean, inner);
      F dx = e[k] * inner;
      if constexpr (kTr) {
        const F er = u == S::set(A(-INFINITY)) ? zero : e[2 + k];
        dx = S::mul_add(kl_k, S::fma(minus_ratio, er, e[k]), dx);
      }
      if constexpr (kCapped) dx = dx * S::mul_add(-u, u, S::set(A(1)));
      x[k] = dx;
    }
  }
};

template <class S, class T, bool kCapped, bool kWithB, int kKls>
void backward_pair_chunk(const T* x, const T* y, T* grad, int64_t n, const RowTransform<typename S::A>& f,
                         const PairGradientRow<typename S::A>& g) {
  using Both = PairGradient<S, kCapped, kWithB, kKls>;
  constexpr int64_t kStep = Both::kVectors * S::kWidth;
  const Both gradient(f, g);
  const auto step = [&](const T* from, const T* ref, T* to) __attribute__((always_inline)) {
    typename S::F v[Both::kVectors], w[Both::kVectors];
    for (int k = 0; k < Both::kVectors; k += 2) {
      S::load2(from + k * S::kWidth, v[k], v[k + 1]);
      S::load2(ref + k * S::kWidth, w[k], w[k + 1]);
    }
    gradient.apply(v, w);
    for (int k = 0; k < Both::kVectors; k += 2) S::store2(to + k * S::kWidth, v[k], v[k + 1]);
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) step(x + i, y + i, grad + i);
  if (i < n) {  // the rest, filled up with zeros
    const int64_t left = n - i;
    alignas(64) T from[kStep] = {}, ref[kStep] = {};
    memcpy(from, x + i, size_t(left) * sizeof(T));
    memcpy(ref, y + i, size_t(left) * sizeof(T));
    step(from, ref, from);
    memcpy(grad + i, from, size_t(left) * sizeof(T));
  }
}

// Three sets of sums: one KL, the other one, everything.
template <class S, class T, bool kCapped>
PairState<typename S::A> forward_pair_sums(const T* x, const T* y, int64_t n, const RowTransform<typename S::A>& f, int sums) {
  constexpr int kAll = kSumS1 | kSumS2Sz | kSumT | kSumTr;
  if (sums == kSumT) return forward_pair_chunk<S, T, kCapped, kSumT>(x, y, n, f);
  if (sums == kSumTr) return forward_pair_chunk<S, T, kCapped, kSumTr>(x, y, n, f);
  return forward_pair_chunk<S, T, kCapped, kAll>(x, y, n, f);
}

template <class S, class T>
PairState<typename S::A> forward_pair_any(const void* x, const void* y, int64_t n, const RowTransform<typename S::A>& f, int sums) {
  const T *p = static_cast<const T*>(x), *q = static_cast<const T*>(y);
  return f.cap_scale != 0 ? forward_pair_sums<S, T, true>(p, q, n, f, sums) : forward_pair_sums<S, T, false>(p, q, n, f, sums);
}

template <class S, class T>
void backward_pair_any(const void* x, const void* y, void* grad, int64_t n, const RowTransform<typename S::A>& f,
                       const PairGradientRow<typename S::A>& g) {
  const auto run = [&](auto kernel) { kernel(static_cast<const T*>(x), static_cast<const T*>(y), static_cast<T*>(grad), n, f, g); };
  const auto by_cap = [&](auto with_b, auto kls) {
    constexpr bool kWithB = decltype(with_b)::value;
    constexpr int kKls = decltype(kls)::value;
    run(f.cap_scale != 0 ? backward_pair_chunk<S, T, true, kWithB, kKls> : backward_pair_chunk<S, T, false, kWithB, kKls>);
  };
  using One = std::integral_constant<int, kSumT>;
  using Other = std::integral_constant<int, kSumTr>;
  using Both = std::integral_constant<int, kSumT | kSumTr>;
  // The term with c is left out where c is 0, for it may be infinite then.
  if (g.kl.c == 0) g.b == 0 ? by_cap(std::false_type{}, Other{}) : by_cap(std::true_type{}, Other{});
  else if (g.b == 0 && g.kl.k == 0) by_cap(std::false_type{}, One{});
  else by_cap(std::true_type{}, Both{});
}

template <class S>
PairState<float> forward_pair_rows(int dtype, const void* x, const void* y, int64_t n, const RowTransform<float>& f, int sums) {
  if (dtype == kBFloat16) return forward_pair_any<S, bf16>(x, y, n, f, sums);
  if (dtype == kFloat16) return forward_pair_any<S, fp16>(x, y, n, f, sums);
  return forward_pair_any<S, float>(x, y, n, f, sums);
}
template <class S>
void backward_pair_rows(int dtype, const void* x, const void* y, void* grad, int64_t n, const RowTransform<float>& f,
                        const PairGradientRow<float>& g) {
  if (dtype == kBFloat16) return backward_pair_any<S, bf16>(x, y, grad, n, f, g);
  if (dtype == kFloat16) return backward_pair_any<S, fp16>(x, y, grad, n, f, g);
  backward_pair_any<S, float>(x, y, grad, n, f, g);
}

}  // namespace cpu
}  // namespace fastalign
