// The backward half of the row kernels: from the row state and a few upstream numbers, every element by itself.
//
// dx = e (a + b d) plus its label's share, with d = u c - m in bits and e = 2^d: two fused multiply-adds and one exp2; with upstream
// gradients of the KLs plus e c (d - dr - mean) + k (e - ratio er) of math/row_state.h, where dr and er are the reference row's.
#pragma once
#include "cuda/row.cuh"
#include "cuda/vector.cuh"

namespace fastalign {
namespace cuda {

// Of every element of a row:  dx = (e (a + b d) + KL terms + extra) slope(u) / slope(0), `extra` being g times `label_scale` where a label
// with upstream gradient g sits. slope(0) is in a, b, kl.c, kl.k and label_scale, so only a softcap leaves a factor per element.
struct RowGradient {
  float m, a, b, label_scale;
  enum Kind : int { kZero, kNan, kRegular, kWithKl, kFar } kind;  // kWithKl: the reference row is read; kFar: see write_far
  float ref_m;
  KlCoefficients<float> kl;  // the mean is in a

  static __device__ RowGradient without_terms(Kind kind) { return {0, 0, 0, 0, kind, 0, {0, 0, 0, 0}}; }
};

__device__ inline float at(const void* p, int64_t i) { return p ? static_cast<const float*>(p)[i] : 0.0f; }

// kRef: there are upstream gradients of KLs, and r is the reference row's part of the state.
template <bool kRef>
__device__ RowGradient row_gradient(const TokenStatsBackwardArgs& a, int64_t row, const RowTransform<float>& f, const RowState<float>& s,
                                    const RefState<float>& r) {
  const float g_kl_policy_ref = kRef ? at(a.g_kl_policy_ref, row) : 0.0f, g_kl_ref_policy = kRef ? at(a.g_kl_ref_policy, row) : 0.0f;
  if (kRef ? !has_gradient(s, r, g_kl_policy_ref, g_kl_ref_policy) : !has_gradient(s)) return RowGradient::without_terms(RowGradient::kNan);
  const bool with_kl = g_kl_policy_ref != 0 || g_kl_ref_policy != 0;
  float g_labels = 0;
  bool any = with_kl;
  for (int64_t k = 0; a.g_logprob && k < a.targets; ++k) {
    if (a.labels[row * a.targets + k] == a.ignore_index) continue;
    const float g = at(a.g_logprob, row * a.targets + k);
    g_labels += g;
    any |= g != 0;
  }
  const float g_entropy = at(a.g_entropy, row), g_logsumexp = at(a.g_logsumexp, row);
  if (!any && g_entropy == 0 && g_logsumexp == 0) return RowGradient::without_terms(RowGradient::kZero);
  // p (A + B log p) with p = e / s0 and log p = ln2 d - log s0.
  const RowCoefficients<float> k = row_coefficients(s, g_labels, g_entropy, g_logsumexp, f, RowExp2{});
  const float slope = f.slope(0), scale = slope / s.s0, log_s0 = k.b != 0 ? log(s.s0) : 0.0f;
  RowGradient g{s.m, (k.a - k.b * log_s0) * scale, k.b * float(kLn2) * scale, slope, RowGradient::kRegular, 0, {0, 0, 0, 0}};
  if (with_kl) {
    g.kind = RowGradient::kWithKl, g.ref_m = r.m, g.kl = kl_coefficients(s, r, g_kl_policy_ref, g_kl_ref_policy);
    g.kl.c *= slope, g.kl.k *= slope;
    if (g.kl.c != 0) g.a = fmaf(-g.kl.c, g.kl.mean, g.a);  // both are factors of e
  }
  if (f.is_far(s.umax) || (with_kl && f.is_far(r.umax))) g.kind = RowGradient::kFar;
  return g;
}

// Which KL terms a loop evaluates.
enum KlTerm : int { kPolicyRef = 1, kRefPolicy = 2 };

// One element: x and y are the raw logits of the policy and of the reference. Written with explicit fmaf, so that every place this is
// inlined into rounds alike.
template <bool kCap, bool kLabelled, int kKl>
__device__ float gradient(const RowGradient& g, const RowTransform<float>& f, float x, float y, float extra) {
  const float u = kCap ? tanhf(x * f.cap_scale) : x, d = f.bits(u, g.m), e = fast_exp2(d);
  const float dr = kKl ? f.bits(kCap ? tanhf(y * f.cap_scale) : y, g.ref_m) : 0.0f;
  float inner = fmaf(g.b, fmaxf(d, -200.0f), g.a);  // e is 0 below -200, and 0 * -inf would be NaN
  if (kKl & kPolicyRef) inner = fmaf(g.kl.c, e == 0 || (kKl != kPolicyRef && g.kl.c == 0) ? 0.0f : d - dr, inner);
  float dz;
  if (kKl & kRefPolicy) {
    const float forward = fmaf(-g.kl.ratio, fast_exp2(dr), e);
    dz = fmaf(e, inner, kLabelled ? fmaf(g.kl.k, forward, extra) : g.kl.k * forward);
    dz = u == -INFINITY ? 0.0f : dz;
  } else {
    dz = kLabelled ? fmaf(e, inner, u == -INFINITY ? 0.0f : extra) : e * inner;
  }
  return kCap ? dz * fmaf(-u, u, 1.0f) : dz;
}

// What the labels add to the elements: `own` at element `label`; with several labels per row extra[e] at element label + e, if there are
// any.
template <bool kMany> struct LabelShare {
  int label;
  float own;
  const float* extra;

  // Whether any of the `count` elements from `first` on has a share.
  __device__ bool touches(int first, int count) const { return kMany ? extra != nullptr : unsigned(label - first) < unsigned(count); }
  __device__ float operator()(int element) const { return kMany ? extra[element - label] : (label == element ? own : 0.0f); }
};
constexpr int kNoLabel = -(1 << 30);  // before every element
// Of a row with one label, for the stretch of it that starts at column `start`.
template <class Args> __device__ LabelShare<false> label_share(const Args& a, int64_t row, const RowGradient& g, int start) {
  const int column = local_column(a, a.labels[row]);
  return {column < 0 ? kNoLabel : column - start, at(a.g_logprob, row) * g.label_scale, nullptr};
}

// Gradients of vectors [begin, end) of the row, all of them wide in every row that is read. `rows` may be in shared memory; vectors are
// counted from where `out` is aligned, so that stores are always 16 bytes. Each element is read and written by one thread: `out` may be the
// policy row.
template <class T, bool kCap, int kKl, bool kMany>
__device__ void write_vectors(const RowGradient& g, const RowTransform<float>& f, const RowVectors<T> (&rows)[kKl ? 2 : 1], T* out,
                              int begin, int end, const LabelShare<kMany>& share) {
  constexpr int L = kLanes<T>, R = kKl ? 2 : 1, N = kUnroll / R;
  for (int i = begin + bundle_start<N>(threadIdx.x); i < end; i += N * int(blockDim.x)) {
    uint4 v[R][N];
    unsigned loaded = rows[0].fetch(i, end, v[0]);
    if (kKl) rows[R - 1].fetch(i, end, v[R - 1]);
    rows[0].align(i, loaded, v[0]);
    if (kKl) rows[R - 1].align(i, loaded, v[R - 1]);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!(loaded >> k & 1)) continue;
      const int element = rows[0].element(i + k * int(kWarp));
      float x[L], y[L];
      unpack(v[0][k], x, T{});
      if (kKl) unpack(v[R - 1][k], y, T{});
      if (share.touches(element, L)) {  // with one label per row: one vector of the row
#pragma unroll
        for (int l = 0; l < L; ++l) x[l] = gradient<kCap, true, kKl>(g, f, x[l], kKl ? y[l] : 0.0f, share(element + l));
      } else {
#pragma unroll
        for (int l = 0; l < L; ++l) x[l] = gradient<kCap, false, kKl>(g, f, x[l], kKl ? y[l] : 0.0f, 0.0f);
      }
      store16(out + element, pack(x, T{}));
    }
  }
}

// Gradients of elements [begin, end) of a row that is far (math/row_state.h) or whose reference row is, one by one. x, y and out start at column
// `start` of the row.
template <class T, bool kRef>
__device__ void write_far(const TokenStatsBackwardArgs& a, int64_t row, const RowGradient& g, const RowTransform<float>& f, const T* x,
                          const T* y, T* out, int start, int begin, int end) {
  const float* state = static_cast<const float*>(a.state) + row * kStateWidth;
  const RowOrigin<float> p = row_origin(load_state(state), f), r = row_origin(load_ref(state), f);
#pragma unroll 1
  for (int i = begin + int(threadIdx.x); i < end; i += int(blockDim.x)) {
    float own = 0;
    for (int64_t k = 0; a.g_logprob && k < a.targets; ++k)
      if (local_column(a, a.labels[row * a.targets + k]) == start + i) own += at(a.g_logprob, row * a.targets + k);
    const float u = f.u(to_acc(x[i])), d = p.bits(u, f), e = fast_exp2(d);
    float inner = e == 0 ? 0.0f : fmaf(g.b, d, g.a), kl = 0;
    if (kRef && (g.kl.c != 0 || g.kl.k != 0)) {
      const float dr = r.bits(f.u(to_acc(y[i])), f);
      if (g.kl.c != 0 && e != 0) inner = fmaf(g.kl.c, d - dr, inner);
      if (g.kl.k != 0) kl = g.kl.k * fmaf(-g.kl.ratio, fast_exp2(dr), e);
    }
    const float dz = fmaf(e, inner, fmaf(own, g.label_scale, kl));
    from_acc(u == -INFINITY ? 0.0f : (f.cap_scale != 0 ? dz * fmaf(-u, u, 1.0f) : dz), out + i);
  }
}

// The same value throughout vectors [begin, end), without reading.
template <class T> __device__ void fill_vectors(float value, const RowVectors<T>& row, T* out, int begin, int end) {
  float lanes[kLanes<T>];
#pragma unroll
  for (int l = 0; l < kLanes<T>; ++l) lanes[l] = value;
  const uint4 filled = pack(lanes, T{});
  for (int i = begin + int(threadIdx.x); i < end; i += int(blockDim.x)) store16(out + row.element(i), filled);
}

}  // namespace cuda
}  // namespace fastalign
