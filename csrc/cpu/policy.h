// The inner loops of the policy and value losses and of the KL estimators, which the policy loss has a term of: one table of functions per instruction set, filled from policy_impl.h.
#pragma once
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

// measure_...: adds a span's scored tokens, and the sum of their log-ratio terms. run_...: writes a span's slopes and adds its sums to stats.
// scale: out = grad * slopes / items.
template <class T> struct PolicyKernels {
  void (*measure_policy)(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* length, double* total);
  void (*run_policy)(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* stats);
  void (*measure_value)(const ValueArgs& a, const Span& s, double* length);
  void (*run_value)(const ValueArgs& a, const Span& s, double* stats);
  void (*scale)(const T* slopes, T grad, T items, int64_t n, T* out);
  void (*estimate_kl)(int kind, const T* logprobs, const T* ref_logprobs, int64_t n, T* value, T* slope);
};

extern const PolicyKernels<float> generic_policy, avx2_policy, avx512_policy;
extern const PolicyKernels<double> generic_policy64;

// The table in force (isa.h); fp64 has one.
template <class T> const PolicyKernels<T>& policy_kernels();
template <> const PolicyKernels<float>& policy_kernels<float>();
template <> const PolicyKernels<double>& policy_kernels<double>();

}  // namespace cpu
}  // namespace fastalign
