// The inner loops over vocabulary rows: one table of functions per instruction set, filled from rows_impl.h.
#pragma once
#include "math/row_state.h"

namespace fastalign {
namespace cpu {

// A row is cut into chunks, each swept from the empty state, and the chunk states are merged from left to right: the same tree whether one
// thread walks the row or several share it. Inside a chunk, blocks fit the L1 cache and are swept twice (largest logit, then exponentials).
constexpr int64_t kBlock = 2048, kChunk = 8 * kBlock;

// Optional sums of a chunk: s1 (entropy); s2 and sz (log_sum_sq, mean_logit); over both rows t (kl_policy_ref) and tr (kl_ref_policy).
enum ChunkSums : int { kSumS1 = 1, kSumS2Sz = 2, kSumT = 4, kSumTr = 8 };

// Coefficients of one row's gradient: dx = e (a + b d) [* (1 - u^2) with a softcap], where d = fma(u, c, -m) and e = 2^d.
template <class A> struct GradientRow { A m, a, b; };

// With reference logits: the same and the terms of `kl` (math/row_state.h), all scaled by the slope at 0.
template <class A> struct PairGradientRow {
  A m, a, b, ref_m;
  KlCoefficients<A> kl;
};

template <class A> struct RowKernels {
  // State of x[0, n), except that `umax` is the largest raw logit and `top` the start of the block that holds it first: comparing raw logits
  // breaks no ties that tanh makes, and the exact index costs another look at one block, by those who want it (see exact_top).
  RowState<A> (*forward)(int dtype, const void* x, int64_t n, const RowTransform<A>& f, int sums);
  // grad[0, n) from x[0, n); may be the same memory.
  void (*backward)(int dtype, const void* x, void* grad, int64_t n, const RowTransform<A>& f, const GradientRow<A>& g);
  // The same over policy and reference logits x, y; `sums` holds kSumT or kSumTr or both.
  PairState<A> (*forward_pair)(int dtype, const void* x, const void* y, int64_t n, const RowTransform<A>& f, int sums);
  void (*backward_pair)(int dtype, const void* x, const void* y, void* grad, int64_t n, const RowTransform<A>& f,
                        const PairGradientRow<A>& g);
  // What the sweeps make of one logit and of one exponent, to the bit.
  A (*u)(A x, const RowTransform<A>& f);
  A (*exp2)(A d);
};

extern const RowKernels<float> generic_rows, avx2_rows, avx512_rows, avx512bf16_rows;
extern const RowKernels<double> generic_rows64;

// The table in force (isa.h); fp64 has one.
template <class A> const RowKernels<A>& row_kernels();
template <> const RowKernels<float>& row_kernels<float>();
template <> const RowKernels<double>& row_kernels<double>();

}  // namespace cpu
}  // namespace fastalign
