// The forward half of the row kernels: a row's vectors go into a row state, and a finished state into the outputs.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/vector.cuh"
#include "row_results.h"

namespace fastalign {
namespace cuda {

// Adds one bundle of vectors, of the policy row and with kRefRow of the reference row, to the thread's state.
template <class T, int kSums, bool kCap, int N>
__device__ __forceinline__ void push(State<kSums>& state, const uint4 (&v)[kRows<kSums>][N], int vocab, int i, int limit,
                                     const RowTransform<float>& f) {
  constexpr int L = kLanes<T>, R = kRows<kSums>;
  RowState<float>& s = policy(state);
  const auto lanes = [&](int k) { return i + k * int(kWarp) < limit ? vocab - (i + k * int(kWarp)) * L : 0; };
  float largest_u[R];
#pragma unroll
  for (int r = 0; r < R; ++r) largest_u[r] = largest(v[r], T{});
  // Bundles come in rising order: only a strictly larger maximum moves the first place where it was seen. While a row is streamed and merged, umax
  // is the raw logit: large ones are equal after tanh.
  const float largest_x = largest_u[0];
  const bool moves = largest_x > s.umax || s.top < 0;
  int top = vocab;
  s.umax = fmaxf(s.umax, largest_x);
  if (kCap) {
#pragma unroll
    for (int r = 0; r < R; ++r) largest_u[r] = tanhf(largest_u[r] * f.cap_scale);  // tanh keeps the order
  }

  // Everything so far moves to the new reference points. They may still be -inf (a masked stretch of the vocabulary): count from 0 then.
  const float m = fmaxf(s.m, reference_point(largest_u[0], f)), origin = m == -INFINITY ? 0.0f : m, by = s.m - origin,
              scale = fast_exp2(by);
  float ref_origin = 0, ref_scale = 0;
  if constexpr ((kSums & kRefRow) != 0) {
    RefState<float>& r = state.r;
    const float ref_m = fmaxf(r.m, reference_point(largest_u[1], f));
    ref_origin = ref_m == -INFINITY ? 0.0f : ref_m;
    const float ref_by = r.m - ref_origin;
    ref_scale = fast_exp2(ref_by);
    if (kSums & kSumT) r.t = move_cross(r.t, s.s0, by - ref_by, scale);
    if (kSums & kSumTr) r.tr = move_cross(r.tr, r.s0, by - ref_by, ref_scale);
    r.m = ref_m;
  }
  if (kSums & kSum1) s.s1 = fmaf(fmaxf(by, -finite_limit<float>()), s.s0, s.s1) * scale;  // the bound: no 0 * inf before the first mass
  if (kSums & kSum2) s.s2 *= scale * scale;
  s.m = m;

#pragma unroll
  for (int k = 0; k < N; ++k) {
    float u[R][L];
#pragma unroll
    for (int r = 0; r < R; ++r) unpack(v[r][k], u[r], T{});
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if ((kSums & kTop) && u[0][l] >= largest_x) top = min(top, (i + k * int(kWarp)) * L + l);
      if (kCap) {
#pragma unroll
        for (int r = 0; r < R; ++r) u[r][l] = l < lanes(k) ? tanhf(u[r][l] * f.cap_scale) : -INFINITY;
      }
      if (kSums & kSumZ) s.sz = fmaf(l < lanes(k) ? u[0][l] : 0.0f, float(kSumShare), s.sz);
      const float d = f.bits(u[0][l], origin), e = fast_exp2(d);
      if (kSums & kSum1) s.s1 = fmaf(e, fmaxf(d, -200.0f), s.s1);  // e is 0 down there, and 0 * -inf would be NaN
      if (kSums & kSum2) s.s2 = fmaf(e, e, s.s2);
      u[0][l] = e;
      if constexpr ((kSums & kRefRow) != 0) {
        const float dr = f.bits(u[1][l], ref_origin), er = fast_exp2(dr), difference = d - dr;
        if (kSums & kSumT) state.r.t = fmaf(e, e == 0 ? 0.0f : difference, state.r.t);
        if (kSums & kSumTr) state.r.tr = fmaf(er, er == 0 ? 0.0f : difference, state.r.tr);
        u[1][l] = er;
      }
    }
    // Pairwise: shorter chains and a smaller error than one running sum. Both rows round alike: identical ones keep equal masses.
    const auto add = [&](float& s0, float (&e)[L], float factor) {
#pragma unroll
      for (int width = L / 2; width; width /= 2)
#pragma unroll
        for (int l = 0; l < width; ++l) e[l] += e[l + width];
      s0 = k == 0 ? fmaf(s0, factor, e[0]) : s0 + e[0];
    };
    add(s.s0, u[0], scale);
    if constexpr ((kSums & kRefRow) != 0) add(state.r.s0, u[1], ref_scale);
  }
  if ((kSums & kTop) && moves && top < vocab) s.top = top;  // not found: nothing but NaN
}

// Whether a swept row (umax: of u) or its reference row is far (math/row_state.h), or may be: the latter's maximum is not known.
__device__ inline bool may_be_far(const RowState<float>& s, const RowTransform<float>& f) { return f.is_far(s.umax); }
__device__ inline bool may_be_far(const PairState<float>& s, const RowTransform<float>& f) {
  return f.is_far(s.p.umax) || !(fabsf(s.r.m) < f.far_limit());
}

// Such a row once more, element by element, by one warp, whose lane 0 has the swept state and gets the true one.
template <class T, int kSums>
__device__ State<kSums> far_state(State<kSums> s, const T* const* x, int vocab, const RowTransform<float>& f) {
  constexpr int R = kRows<kSums>;
  const int lane = int(threadIdx.x % kWarp), top = __shfl_sync(kFullMask, policy(s).top, 0);
  RowOrigin<float> origin[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float largest = -INFINITY;
#pragma unroll 1
    for (int v = lane; v < vocab; v += int(kWarp)) largest = fmaxf(largest, to_acc(x[r][v]));
    for (unsigned distance = kWarp / 2; distance; distance /= 2) largest = fmaxf(largest, __shfl_down_sync(kFullMask, largest, distance));
    const float umax = f.u(__shfl_sync(kFullMask, largest, 0)), m = reference_point(umax, f);
    // Without mass there is nothing to count from: 0 serves.
    origin[r] = {f.is_far(umax) ? umax * f.c : m, umax, f.is_far(umax)};
  }
  s = State<kSums>::empty();
  RowState<float>& p = policy(s);
  p.m = origin[0].m, p.umax = origin[0].umax, p.top = top;
  if constexpr ((kSums & kRefRow) != 0) s.r.m = origin[R - 1].m;
  const auto bits = [&](const RowOrigin<float>& o, float u) { return o.far || o.m > -INFINITY ? o.bits(u, f) : f.bits(u, 0.0f); };
#pragma unroll 1
  for (int v = lane; v < vocab; v += int(kWarp)) {
    const float u = f.u(to_acc(x[0][v])), d = bits(origin[0], u), e = fast_exp2(d);
    p.s0 += e;
    if (kSums & kSum1) p.s1 = fmaf(e, e == 0 ? 0.0f : d, p.s1);
    if (kSums & kSum2) p.s2 = fmaf(e, e, p.s2);
    if (kSums & kSumZ) p.sz = fmaf(u, float(kSumShare), p.sz);
    if constexpr ((kSums & kRefRow) != 0) {
      const float dr = bits(origin[R - 1], f.u(to_acc(x[R - 1][v]))), er = fast_exp2(dr);
      s.r.s0 += er;
      if (kSums & kSumT) s.r.t = fmaf(e, e == 0 ? 0.0f : d - dr, s.r.t);
      if (kSums & kSumTr) s.r.tr = fmaf(er, er == 0 ? 0.0f : d - dr, s.r.tr);
    }
  }
  s = merge_warp<kSums>(s);
  if constexpr ((kSums & kRefRow) != 0) s.r.umax = origin[R - 1].far ? origin[R - 1].umax : 0.0f;
  return s;
}

// u of label k in the policy (which = 0) or the reference row x, where this shard of the vocabulary or one before it holds the label; -inf
// where none did.
template <class T>
__device__ float target_u(const TokenStatsArgs& a, int which, int64_t row, int64_t k, const T* x, const RowTransform<float>& f) {
  const int column = local_column(a, a.labels[row * a.targets + k]);
  if (column >= 0) return f.u(to_acc(x[column]));
  return a.target_in ? static_cast<const float*>(a.target_in)[(which * a.logits.rows + row) * a.targets + k] : -INFINITY;
}

template <int kSums> __device__ void write_unscored(const TokenStatsArgs& a, int64_t row, unsigned lane) {
  constexpr bool kRef = (kSums & kRefRow) != 0;
  for (int64_t k = lane; k < a.targets; k += kWarp) {
    write_no_logprob<float>(a, row, k);
    for (int which = 0; which <= int(kRef); ++which) put(a.target, (which * a.logits.rows + row) * a.targets + k, -INFINITY);
  }
  if (lane) return;
  write_no_statistics<float>(a, row);
  if (a.state) store_empty(kRef, static_cast<float*>(a.state) + row * kStateWidth);
}

// The log-probs of the labels in one of the rows: lane k finishes labels k, k + 32, ... Lane 0 has the state; `first` is lane k's first
// target, fetched before the row was streamed.
template <class T, class RowPart>
__device__ void write_targets(const TokenStatsArgs& a, int which, int64_t row, unsigned lane, RowPart s, float first, const T* x,
                              const RowTransform<float>& f) {
  s.m = __shfl_sync(kFullMask, s.m, 0);  // all that row_logprob reads
  s.s0 = __shfl_sync(kFullMask, s.s0, 0);
  s.umax = __shfl_sync(kFullMask, s.umax, 0);
  for (int64_t k = lane; k < a.targets; k += kWarp) {
    const float u = k < kWarp ? first : target_u(a, which, row, k, x, f);
    write_logprob(a, which, row, k, s, u, f, RowExp2{});
    put(a.target, (which * a.logits.rows + row) * a.targets + k, u);
  }
}

// What one warp writes of a scored row.
template <class T, class State>
__device__ void write_row(const TokenStatsArgs& a, int64_t row, unsigned lane, State s, const float* first, const T* const* x,
                          const RowTransform<float>& f) {
  constexpr bool kRef = std::is_same_v<State, PairState<float>>;
  write_targets(a, 0, row, lane, policy(s), first[0], x[0], f);
  if constexpr (kRef) write_targets(a, 1, row, lane, s.r, first[1], x[1], f);
  if (lane) return;
  write_statistics(a, row, s, f, RowExp2{});
  if (!a.state) return;
  float* out = static_cast<float*>(a.state) + row * kStateWidth;
  store_state(policy(s), true, out);
  if constexpr (kRef) store_ref(s.r, out);
}

}  // namespace cuda
}  // namespace fastalign
