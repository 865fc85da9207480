// The row state: a monoid over the vocabulary. Tiles, SIMD lanes, warps, CTAs, vocabulary shards all merge with the same rule.
// Twins: fastalign/triton_math.py, fastalign/ops/token_stats/reference.py.
//
// For raw logits x of one row:  u = x, or tanh(x * cap_scale) with a softcap;   w = u * c   (logits in bits, log2 units);
//   c = factor / temperature,  factor = log2(e) * logit_scale   (softcap: log2(e) * softcap, cap_scale = logit_scale / softcap)
//   m  = fl(max u * c)                the reference point of every sum
//   s0 = sum 2^(w - m)                s1 = sum 2^(w - m) (w - m)        s2 = sum 4^(w - m)        sz = sum u
//   w - m is always fma(u, c, -m): a common offset of the logits cancels exactly there, whatever its size (pitfalls E6).
#pragma once
#include "math/scalar.h"

namespace fastalign {

// Columns of the saved state tensor [rows, kStateWidth]. 8..11 are the second row's, used when reference logits are given.
enum StateColumn : int { kColM, kColS0, kColS1, kColS2, kColSz, kColUmax, kColTop, kColValid, kStateWidth = 12 };

// Bits of the `outputs` argument; the same numbers stand in ops/token_stats/api.py.
enum RowOutput : int { kOutLogprob = 1, kOutEntropy = 2, kOutLogsumexp = 4, kOutLogSumSq = 8, kOutMeanLogit = 16, kOutIsTop1 = 32 };

// Everything about a call that maps a raw logit to bits.
template <class T> struct RowTransform {
  T c;          // bits per unit of u
  T cap_scale;  // 0: no softcap
  FA_HD T u(T x) const { return cap_scale != T(0) ? tanh(x * cap_scale) : x; }
  FA_HD T bits(T u, T m) const { return fma(u, c, -m); }
  // d (logit in nats) / d x, given u.
  FA_HD T slope(T u) const { return c * T(kLn2) * (cap_scale != T(0) ? cap_scale * (T(1) - u * u) : T(1)); }
};

// fl(umax * c). Far below zero, at mask values like -1e30, its rounding error alone overflows exp2: there it is -inf, and nothing has mass.
template <class T> FA_HD T reference_point(T umax, const RowTransform<T>& f) {
  const T m = umax * f.c;
  return m < T(sizeof(T) == 8 ? -0x1p59 : -0x1p30) ? T(-INFINITY) : m;
}

template <class T> struct RowState {
  T m, s0, s1, s2, sz, umax;
  int32_t top;  // first index that attains umax; -1 in the empty state

  static FA_HD RowState empty() { return {T(-INFINITY), T(0), T(0), T(0), T(0), T(-INFINITY), -1}; }
};

// 2^(from - to), and 1 when both are -inf.
template <class T> FA_HD T rescale(T from, T to) { return from == to ? T(1) : exp2(from - to); }

// What sum e (w - m) gains per unit of mass when the reference point moves; 0 where no mass survives the move (avoids 0 * inf).
template <class T> FA_HD T s1_shift(T from, T to, T factor) { return from == to || factor == T(0) ? T(0) : from - to; }

// Order-independent up to rounding; kernels fix the order. NaN in either side's s0 survives (0 * NaN is NaN).
template <class T> FA_HD RowState<T> merge(const RowState<T>& a, const RowState<T>& b) {
  RowState<T> r;
  r.m = a.m > b.m ? a.m : b.m;
  T fa = rescale(a.m, r.m), fb = rescale(b.m, r.m);
  r.s0 = a.s0 * fa + b.s0 * fb;
  r.s1 = (a.s1 + s1_shift(a.m, r.m, fa) * a.s0) * fa + (b.s1 + s1_shift(b.m, r.m, fb) * b.s0) * fb;
  r.s2 = a.s2 * fa * fa + b.s2 * fb * fb;
  r.sz = a.sz + b.sz;
  bool take_b = b.umax > a.umax || (b.umax == a.umax && b.top >= 0 && (a.top < 0 || b.top < a.top));
  r.umax = take_b ? b.umax : a.umax;
  r.top = take_b ? b.top : a.top;
  return r;
}

// Finished quantities, in nats. Selections keep NaN: `x > 0 ? 0 : x`.
template <class T> FA_HD T row_logprob(const RowState<T>& s, T target_u, const RowTransform<T>& f) {
  if (s.s0 == T(0)) return T(NAN);
  T lp = fma(T(kLn2), f.bits(target_u, s.m), -log(s.s0));
  return lp > T(0) ? T(0) : lp;
}
template <class T> FA_HD T row_entropy(const RowState<T>& s) {
  T h = fma(T(-kLn2), s.s1 / s.s0, log(s.s0));
  return h < T(0) ? T(0) : h;
}
template <class T> FA_HD T row_logsumexp(const RowState<T>& s) { return fma(T(kLn2), s.m, log(s.s0)); }
template <class T> FA_HD T row_log_sum_sq(const RowState<T>& s) {
  T v = log(s.s2) - T(2) * log(s.s0);
  return v > T(0) ? T(0) : v;
}
template <class T> FA_HD T row_mean_logit(const RowState<T>& s, T vocab, const RowTransform<T>& f) {
  return s.sz / vocab * (f.c * T(kLn2));
}
template <class T> FA_HD T row_is_top1(const RowState<T>& s, int64_t label) { return s.s0 != s.s0 ? s.s0 : T(s.top == label); }

template <class T> FA_HD void store_state(const RowState<T>& s, bool valid, T* out) {
  out[kColM] = s.m;
  out[kColS0] = s.s0;
  out[kColS1] = s.s1;
  out[kColS2] = s.s2;
  out[kColSz] = s.sz;
  out[kColUmax] = s.umax;
  out[kColTop] = T(s.top);
  out[kColValid] = T(valid);
  for (int i = kColValid + 1; i < kStateWidth; ++i) out[i] = T(0);
}
template <class T> FA_HD RowState<T> load_state(const T* in) {
  return {in[kColM], in[kColS0], in[kColS1], in[kColS2], in[kColSz], in[kColUmax], int32_t(in[kColTop])};
}

// The coefficient contract (design.md section 1), logits-only part:
//   dL/dz_v = p_v (A + B log p_v) + sum_k g_k 1[v = y_k],   dL/dx_v = dL/dz_v * slope(u_v)
// from the upstream gradients of logprob (sum over the K targets), entropy and logsumexp. B = 0 switches the log off: p log p is 0 at p = 0.
template <class T> struct RowCoefficients { T a, b; };
template <class T> FA_HD RowCoefficients<T> row_coefficients(const RowState<T>& s, T g_logprob_sum, T g_entropy, T g_logsumexp) {
  T a = g_logsumexp - g_logprob_sum;
  if (g_entropy != T(0)) a -= g_entropy * row_entropy(s);
  return {a, -g_entropy};
}

}  // namespace fastalign
