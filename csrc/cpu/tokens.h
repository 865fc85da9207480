// The inner loops over per-token scalars: one table of functions per instruction set, filled from tokens_impl.h.
#pragma once
#include "cpu/lane_sums.h"
#include "math/affine.h"
#include "math/moments.h"
#include "math/policy.h"
#include "ops.h"

namespace fastalign {
namespace cpu {

// Tokens [begin, begin + n) of one sequence.
struct Span {
  int64_t begin;
  int n;
  double log_rho, length;  // the sequence's log-ratio, where it has one; its scored tokens
  int64_t sequence;
};

// measure_...: adds a span's scored tokens, and the sum of their log-ratio terms. run_...: writes a span's slopes and adds its sums to stats, and to
// `seen` the moments of what has any (kPolicyMoments, kValueMoments).
// scale: out = grad * slopes / items. walk: GAE of sequence s. sum_lanes: see lane_sums.h.
template <class T> struct TokenKernels {
  void (*measure_policy)(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* length, double* total);
  void (*run_policy)(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* stats, MomentSums<double>* seen);
  void (*measure_value)(const ValueArgs& a, const Span& s, double* length);
  void (*run_value)(const ValueArgs& a, const Span& s, double* stats, MomentSums<double>* seen);
  void (*scale)(const T* slopes, T grad, T items, int64_t n, T* out);
  void (*estimate_kl)(int kind, const T* logprobs, const T* ref_logprobs, int64_t n, T* value, T* slope);
  Moments<double> (*walk)(const GaeArgs& a, const GaeStep<double>& step, int64_t s);
  LaneSums (*sum_lanes)(const T* x, const T* y, double y_scale, const uint8_t* mask, int64_t n);
};

extern const TokenKernels<float> generic_tokens, avx2_tokens, avx512_tokens;
extern const TokenKernels<double> generic_tokens64;

// The table in force (isa.h); fp64 has one.
template <class T> const TokenKernels<T>& token_kernels();
template <> const TokenKernels<float>& token_kernels<float>();
template <> const TokenKernels<double>& token_kernels<double>();

}  // namespace cpu
}  // namespace fastalign
