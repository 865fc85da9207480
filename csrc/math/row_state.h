// The row state: a monoid over the vocabulary. Tiles, SIMD lanes, warps, CTAs, vocabulary shards all merge with the same rule.
// Twins: fastalign/ops/math/rows.py, fastalign/ops/token_stats/reference.py.
//
// For raw logits x of one row:  u = x, or tanh(x * cap_scale) with a softcap;   w = u * c   (logits in bits, log2 units);
//   c = factor / temperature,  factor = log2(e) * logit_scale   (softcap: log2(e) * softcap, cap_scale = logit_scale / softcap)
//   m  = fl(max u * c)                the reference point of every sum
//   s0 = sum 2^(w - m)                s1 = sum 2^(w - m) (w - m)        s2 = sum 4^(w - m)        sz = sum u / 2^24
//   w - m is always fma(u, c, -m): a common offset of the logits cancels exactly there, whatever its size.
// A row is far where |max u * c| is 2^30 or more (fp64: 2^59), or overflows: what rounding m takes off would overflow the exponential. There the sums
// count from max u * c itself and w - m is (u - max u) c. Distinct logits near the maximum are then at least 32 bits apart, so that this loses
// nothing. Kernels sweep a row as if it were not far, and once more, out of their hot loops, where its maximum turns out to be.
//
// With reference logits, which the same transform turns into bits, the reference row's m and s0 and two sums over both rows stand beside the
// state. d = w - m of the policy row, dr = w - m of the reference row:
//   t  = sum 2^d (d - dr)             tr = sum 2^dr (d - dr)      a term without mass (2^d = 0, 2^dr = 0) is 0
//   KL(p || q) = ln2 t / s0 - log(s0 / r.s0)                      KL(q || p) = log(s0 / r.s0) - ln2 tr / r.s0
#pragma once
#include "math/scalar.h"

namespace fastalign {

// Columns of the saved state tensor [rows, kStateWidth]. The last five are 0 without reference logits. A row that is not scored has the empty state.
enum StateColumn : int {
  kColM,
  kColS0,
  kColS1,
  kColS2,
  kColSz,
  kColUmax,
  kColTop,
  kColLargest,
  kColValid,
  kColRefM,
  kColRefS0,
  kColT,
  kColTr,
  kColRefUmax,  // of a far reference row; 0 of others
  kStateWidth
};

// sz holds the sum divided by this power of two, at least the size of a vocabulary: no finite logits overflow it.
constexpr double kSumShrinksBy = 0x1p24, kSumShare = 1 / kSumShrinksBy;

// The outputs in the order of the results: their bits in the `outputs` argument, as in fastalign/ops/columns.py, and their pointers in
// RowResults (ops.h). From ref_logprob on they need reference logits.
#define FA_ROW_RESULTS(X)                                                                                                   \
  X(kOutLogprob, logprob) X(kOutEntropy, entropy) X(kOutLogsumexp, logsumexp) X(kOutLogSumSq, log_sum_sq)                   \
  X(kOutMeanLogit, mean_logit) X(kOutIsTop1, is_top1) X(kOutRefLogprob, ref_logprob) X(kOutKlPolicyRef, kl_policy_ref)      \
  X(kOutKlRefPolicy, kl_ref_policy)
#define FA_FIELD(bit, name) kPlace_##name,
enum RowPlace : int { FA_ROW_RESULTS(FA_FIELD) };
#undef FA_FIELD
#define FA_FIELD(bit, name) bit = 1 << kPlace_##name,
enum RowOutput : int { FA_ROW_RESULTS(FA_FIELD) };
#undef FA_FIELD

// Everything about a call that maps a raw logit to bits.
template <class T> struct RowTransform {
  T c;  // bits per unit of u
  T cap_scale;  // 0: no softcap
  FA_HD T u(T x) const { return cap_scale != T(0) ? tanh(x * cap_scale) : x; }
  FA_HD T bits(T u, T m) const { return fma(u, c, -m); }
  FA_HD bool is_far(T umax) const { return is_finite(umax) && !(fabs(umax * c) < far_limit()); }
  // (u - umax) c: halves first, so that no finite u overflows before it must.
  FA_HD T far_bits(T u, T umax) const { return (T(0.5) * u - T(0.5) * umax) * c * T(2); }
  FA_HD T far_nats(T u, T umax) const { return (T(0.5) * u - T(0.5) * umax) * (c * T(kLn2)) * T(2); }
  static FA_HD T far_limit() { return T(sizeof(T) == 8 ? 0x1p59 : 0x1p30); }
  // d (logit in nats) / d x, given u.
  FA_HD T slope(T u) const { return c * T(kLn2) * (cap_scale != T(0) ? cap_scale * (T(1) - u * u) : T(1)); }
};

// fl(umax * c), while a row is swept. Far below zero, at mask values like -1e30, its rounding error alone overflows exp2: there it is -inf, and nothing
// has mass, unless the row turns out to be far.
template <class T> FA_HD T reference_point(T umax, const RowTransform<T>& f) {
  const T m = umax * f.c;
  return m < -f.far_limit() ? T(-INFINITY) : m;
}

template <class T> struct RowState {
  T m, s0, s1, s2, sz, umax;
  int32_t top;  // first index that attains the largest raw logit; -1 in the empty state
  T largest;  // that logit, of a finished state: large ones are equal after tanh

  static FA_HD RowState empty() { return {T(-INFINITY), T(0), T(0), T(0), T(0), T(-INFINITY), -1, T(-INFINITY)}; }
};

// The reference row's part of the state.
template <class T> struct RefState {
  T m, s0, t, tr;
  T umax;  // of a far row, else 0

  static FA_HD RefState empty() { return {T(-INFINITY), T(0), T(0), T(0), T(0)}; }
};

// 2^(from - to), and 1 when both are -inf.
template <class T> FA_HD T rescale(T from, T to) { return from == to ? T(1) : exp2(from - to); }

// What sum e (w - m) gains per unit of mass when the reference point moves; 0 where no mass survives the move (avoids 0 * inf).
template <class T> FA_HD T s1_shift(T from, T to, T factor) { return from == to || factor == T(0) ? T(0) : from - to; }

// Whether the first maximum b, at place top_b, is that of both parts.
template <class T> FA_HD bool comes_first(T b, int32_t top_b, T a, int32_t top_a) {
  return b > a || (b == a && top_b >= 0 && (top_a < 0 || top_b < top_a));
}

// Order-independent up to rounding; kernels fix the order. While rows are swept umax is the raw logit, and `largest` is not kept. NaN in either side's s0 survives (0 * NaN is NaN).
template <class T> FA_HD RowState<T> merge(const RowState<T>& a, const RowState<T>& b) {
  RowState<T> r;
  r.m = a.m > b.m ? a.m : b.m;
  T fa = rescale(a.m, r.m), fb = rescale(b.m, r.m);
  r.s0 = multiply_add(a.s0, fa, b.s0 * fb);
  r.s1 = (a.s1 + s1_shift(a.m, r.m, fa) * a.s0) * fa + (b.s1 + s1_shift(b.m, r.m, fb) * b.s0) * fb;
  r.s2 = a.s2 * fa * fa + b.s2 * fb * fb;
  r.sz = a.sz + b.sz;
  const bool take_b = comes_first(b.umax, b.top, a.umax, a.top);
  r.umax = take_b ? b.umax : a.umax;
  r.top = take_b ? b.top : a.top;
  r.largest = T(-INFINITY);
  return r;
}

// from - to, and 0 when both are -inf.
template <class T> FA_HD T distance(T from, T to) { return from == to ? T(0) : from - to; }

// What t or tr becomes when every d - dr gains `shift` and the terms, which have `mass`, are scaled by `factor`. Mass that does not survive
// takes its terms along, even infinite ones.
template <class T> FA_HD T move_cross(T cross, T mass, T shift, T factor) {
  if (factor == T(0)) return T(0);
  return (mass == T(0) ? cross : fma(shift, mass, cross)) * factor;
}

// A policy row and a reference row. On the policy part merge is the one above.
template <class T> struct PairState {
  RowState<T> p;
  RefState<T> r;

  static FA_HD PairState empty() { return {RowState<T>::empty(), RefState<T>::empty()}; }
};
template <class T> FA_HD PairState<T> merge(const PairState<T>& a, const PairState<T>& b) {
  PairState<T> s{merge(a.p, b.p), {}};
  s.r.m = a.r.m > b.r.m ? a.r.m : b.r.m;
  const T fa = rescale(a.r.m, s.r.m), da = distance(a.p.m, s.p.m) - distance(a.r.m, s.r.m);
  const T fb = rescale(b.r.m, s.r.m), db = distance(b.p.m, s.p.m) - distance(b.r.m, s.r.m);
  s.r.s0 = multiply_add(a.r.s0, fa, b.r.s0 * fb);  // as s.p.s0: identical rows keep equal masses
  s.r.t = move_cross(a.r.t, a.p.s0, da, rescale(a.p.m, s.p.m)) + move_cross(b.r.t, b.p.s0, db, rescale(b.p.m, s.p.m));
  s.r.tr = move_cross(a.r.tr, a.r.s0, da, fa) + move_cross(b.r.tr, b.r.s0, db, fb);
  s.r.umax = s.r.m == a.r.m ? a.r.umax : b.r.umax;
  return s;
}

// Two stored reference points as `merge` may compare them. Those of two far rows differ by less than their rounding took off: in their place stands
// how far each lies below the larger. (umax: of u; 0 of a reference row that is not far.)
template <class T> FA_HD void set_apart(T& ma, T ua, T& mb, T ub) {
  const T limit = RowTransform<T>::far_limit();
  if (!is_finite(ua) || !is_finite(ub) || ua == T(0) || ub == T(0) || fabs(ma) < limit || fabs(mb) < limit) return;
  const T peak = ua > ub ? ua : ub;
  ma = ua == peak ? T(0) : (T(0.5) * ua - T(0.5) * peak) * (ma / ua) * T(2);
  mb = ub == peak ? T(0) : (T(0.5) * ub - T(0.5) * peak) * (mb / ub) * T(2);
}

// `top` and `largest` of both parts.
template <class T> FA_HD void keep_first(RowState<T>& s, const RowState<T>& a, const RowState<T>& b) {
  const bool take_b = comes_first(b.largest, b.top, a.largest, a.top);
  s.top = take_b ? b.top : a.top;
  s.largest = take_b ? b.largest : a.largest;
}

// merge for the finished states of parts of a row, each swept by itself, be they far or not. The empty state leaves no trace.
template <class T> FA_HD RowState<T> merge_stored(RowState<T> a, RowState<T> b) {
  const T m = a.m > b.m ? a.m : b.m;
  set_apart(a.m, a.umax, b.m, b.umax);
  RowState<T> s = merge(a, b);
  s.m = m;
  keep_first(s, a, b);
  return s;
}
template <class T> FA_HD PairState<T> merge_stored(PairState<T> a, PairState<T> b) {
  const T m = a.p.m > b.p.m ? a.p.m : b.p.m, ref_m = a.r.m > b.r.m ? a.r.m : b.r.m;
  set_apart(a.p.m, a.p.umax, b.p.m, b.p.umax);
  set_apart(a.r.m, a.r.umax, b.r.m, b.r.umax);
  PairState<T> s = merge(a, b);
  if (a.r.m == b.r.m && s.r.umax == T(0)) s.r.umax = b.r.umax;  // m is -inf of a far row's and an empty one's
  s.p.m = m, s.r.m = ref_m;
  keep_first(s.p, a.p, b.p);
  return s;
}

// Makes NaN of a row whose label is bad.
template <class T> FA_HD void spoil(RowState<T>& s) { s.s0 = T(NAN); }
template <class T> FA_HD void spoil(PairState<T>& s) { s.p.s0 = s.r.s0 = T(NAN); }

// merge_stored for labels' u, which one part at most holds; the others have -inf.
template <class T> FA_HD T found_target(T before, T here) { return here == T(-INFINITY) ? before : here; }

// What of a finished row exponents are formed from, in the sweep that made it, for its labels and in its gradient.
template <class T> struct RowOrigin {
  T m, umax;
  bool far;
  FA_HD T bits(T u, const RowTransform<T>& f) const { return far ? f.far_bits(u, umax) : f.bits(u, m); }
};
template <class State, class T> FA_HD RowOrigin<T> row_origin(const State& s, const RowTransform<T>& f) {
  return {s.m, s.umax, f.is_far(s.umax)};
}

// Finished quantities, in nats. Selections keep NaN: `x > 0 ? 0 : x`. `exp2` is the one that the sweep used: with it a single element that has all
// the mass (a vocabulary of one, the others at -inf) is known by its bits, and gives exactly 0. The log-prob is that of either row.
template <class State, class T, class Exp2> FA_HD T row_logprob(const State& s, T target_u, const RowTransform<T>& f, Exp2&& exp2) {
  if (s.s0 == T(0)) return T(NAN);
  T lp;
  if (f.is_far(s.umax)) {
    lp = f.far_nats(target_u, s.umax) - log(s.s0);
  } else {
    const T d = f.bits(target_u, s.m);
    lp = exp2(d) == s.s0 ? T(0) : fma(T(kLn2), d, -log(s.s0));
  }
  return lp > T(0) ? T(0) : lp;
}
// Whether the largest element has all the mass, to rounding.
template <class T, class Exp2> FA_HD bool is_peaked(const RowState<T>& s, const RowTransform<T>& f, Exp2&& exp2) {
  return s.s0 == exp2(row_origin(s, f).bits(s.umax, f));
}
// Whether it has, and every other one has none at all.
template <class T, class Exp2> FA_HD bool is_one_hot(const RowState<T>& s, const RowTransform<T>& f, Exp2&& exp2) {
  const T d = row_origin(s, f).bits(s.umax, f), e = exp2(d), product = e * d;
  return s.s0 == e && s.s1 == product;
}
template <class T, class Exp2> FA_HD T row_entropy(const RowState<T>& s, const RowTransform<T>& f, Exp2&& exp2) {
  const T h = fma(T(-kLn2), s.s1 / s.s0, log(s.s0));
  return h < T(0) || is_one_hot(s, f, exp2) ? T(0) : h;
}
template <class T> FA_HD T row_logsumexp(const RowState<T>& s, const RowTransform<T>& f) {
  return f.is_far(s.umax) ? fma(s.umax, f.c * T(kLn2), log(s.s0)) : fma(T(kLn2), s.m, log(s.s0));
}
template <class T> FA_HD T row_log_sum_sq(const RowState<T>& s) {
  T v = log(s.s2) - T(2) * log(s.s0);
  return v > T(0) ? T(0) : v;
}
template <class T> FA_HD T row_mean_logit(const RowState<T>& s, T vocab, const RowTransform<T>& f) {
  return s.sz / vocab * T(kSumShrinksBy) * (f.c * T(kLn2));
}
template <class T> FA_HD T row_is_top1(const RowState<T>& s, int64_t label) { return s.s0 != s.s0 ? s.s0 : T(s.top == label); }

// Identical rows have t = tr = 0 and s0 = r.s0 to the bit, hence exactly 0. +inf where one row has mass and the other one has none. Where a single
// element has all of the policy's mass, what is below the rounding of the logarithm is 0 as well: both rows are that one element.
template <class T> FA_HD T clamp_kl(T v, T log_ratio, bool peaked) {
  const T rounding = T(sizeof(T) == 8 ? 0x1p-51 : 0x1p-22) * (T(1) + fabs(log_ratio));
  return v < T(0) || (peaked && v < rounding) ? T(0) : v;
}
template <class T, class Exp2>
FA_HD T row_kl_policy_ref(const RowState<T>& s, const RefState<T>& r, const RowTransform<T>& f, Exp2&& exp2) {
  const T log_ratio = log(s.s0 / r.s0);
  return clamp_kl(fma(T(kLn2), r.t / s.s0, -log_ratio), log_ratio, is_peaked(s, f, exp2));
}
template <class T, class Exp2>
FA_HD T row_kl_ref_policy(const RowState<T>& s, const RefState<T>& r, const RowTransform<T>& f, Exp2&& exp2) {
  const T log_ratio = log(s.s0 / r.s0);
  return clamp_kl(fma(T(-kLn2), r.tr / r.s0, log_ratio), log_ratio, is_peaked(s, f, exp2));
}

template <class T> FA_HD void store_state(const RowState<T>& s, bool valid, T* out) {
  out[kColM] = s.m;
  out[kColS0] = s.s0;
  out[kColS1] = s.s1;
  out[kColS2] = s.s2;
  out[kColSz] = s.sz;
  out[kColUmax] = s.umax;
  out[kColTop] = T(s.top);
  out[kColLargest] = s.largest;
  out[kColValid] = T(valid);
  for (int i = kColRefM; i < kStateWidth; ++i) out[i] = T(0);
}
template <class T> FA_HD RowState<T> load_state(const T* in) {
  return {in[kColM], in[kColS0], in[kColS1], in[kColS2], in[kColSz], in[kColUmax], int32_t(in[kColTop]), in[kColLargest]};
}
template <class T> FA_HD void store_ref(const RefState<T>& r, T* out) {
  out[kColRefM] = r.m;
  out[kColRefS0] = r.s0;
  out[kColT] = r.t;
  out[kColTr] = r.tr;
  out[kColRefUmax] = r.umax;
}
// Whether there were reference logits: a row of them has mass where its m is 0.
template <class T> FA_HD bool has_ref(const T* in) { return in[kColRefM] != T(0) || in[kColRefS0] != T(0); }
template <class T> FA_HD RefState<T> load_ref(const T* in) { return {in[kColRefM], in[kColRefS0], in[kColT], in[kColTr], in[kColRefUmax]}; }

// The coefficient contract (one backward kernel for every loss):
//   dL/dz_v = p_v (A + B log p_v + C (log(p_v / q_v) - KL(p || q))) + D (p_v - q_v) + sum_k g_k 1[v = y_k],   dL/dx_v = dL/dz_v * slope(u_v)
// from the upstream gradients of logprob (sum over the K targets), entropy, logsumexp, and C, D of the two KLs. A term without mass is 0.
template <class T> struct RowCoefficients { T a, b; };
template <class T, class Exp2>
FA_HD RowCoefficients<T> row_coefficients(const RowState<T>& s, T g_logprob_sum, T g_entropy, T g_logsumexp, const RowTransform<T>& f,
                                          Exp2&& exp2) {
  const T a = g_logsumexp - g_logprob_sum;
  if (g_entropy == T(0)) return {a, T(0)};
  return {a - g_entropy * row_entropy(s, f, exp2), -g_entropy};
}

// The two KL terms, for an element with e = 2^d, er = 2^dr:  e c (d - dr - mean) + k (e - ratio er).  For identical rows both are exactly 0.
// An element whose logit is -inf gets 0, and so does e c (...) where e = 0. A term whose upstream gradient is 0 must be left out: it may be infinite.
template <class T> struct KlCoefficients { T c, mean, k, ratio; };
template <class T> FA_HD KlCoefficients<T> kl_coefficients(const RowState<T>& s, const RefState<T>& r, T g_kl_policy_ref,
                                                           T g_kl_ref_policy) {
  return {g_kl_policy_ref * T(kLn2) / s.s0, r.t / s.s0, g_kl_ref_policy / s.s0, s.s0 / r.s0};
}

// Whether the row has a gradient; if not it is NaN throughout. Without mass or with NaN it has none; with an upstream gradient of a KL, neither
// where the reference row is so, nor where KL(p || q) itself is infinite. (That of an infinite KL(q || p) is p - q as ever.)
template <class T> FA_HD bool has_gradient(const RowState<T>& s) { return s.s0 > T(0); }
template <class T> FA_HD bool has_gradient(const RowState<T>& s, const RefState<T>& r, T g_kl_policy_ref, T g_kl_ref_policy) {
  const bool with_kl = g_kl_policy_ref != T(0) || g_kl_ref_policy != T(0);
  return s.s0 > T(0) && (!with_kl || r.s0 > T(0)) && (g_kl_policy_ref == T(0) || is_finite(r.t));
}

}  // namespace fastalign
