// Row states without their logits: merged, and finished.
#include "cpu/row_labels.h"
#include "cpu/rows.h"
#include "row_results.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialRows = 1 << 12;  // below this, waking threads costs more than the work

template <class A> void merge_states(const RowStatesMergeArgs& a) {
  const A *states = static_cast<const A*>(a.states), *targets = static_cast<const A*>(a.part_targets);
#pragma omp parallel for if (a.rows * a.parts > kSerialRows)
  for (int64_t row = 0; row < a.rows; ++row) merge_row_states(states, a.parts, a.rows, row, static_cast<A*>(a.state) + row * kStateWidth);
  if (!targets) return;
#pragma omp parallel for if (a.entries * a.parts > kSerialRows)
  for (int64_t i = 0; i < a.entries; ++i) put(a.target, i, merge_targets(targets, a.parts, a.entries, i));
}

template <class A> void finish_row(const RowStatesFinishArgs& a, int64_t row, const RowTransform<A>& f, const RowKernels<A>& kernels) {
  if (!is_scored(a, row)) {
    for (int64_t k = 0; k < a.targets; ++k) write_no_logprob<A>(a, row, k);
    write_no_statistics<A>(a, row);
    return;
  }
  const A *state = static_cast<const A*>(a.state) + row * kStateWidth, *target = static_cast<const A*>(a.target);
  PairState<A> s{load_state(state), load_ref(state)};
  if (has_bad_label(a, row)) spoil(s);
  for (int64_t k = 0; k < a.targets; ++k) {
    write_logprob(a, 0, row, k, s.p, target[row * a.targets + k], f, kernels.exp2);
    if (a.ref_logprob) write_logprob(a, 1, row, k, s.r, target[(a.rows + row) * a.targets + k], f, kernels.exp2);
  }
  write_statistics(a, row, s, f, kernels.exp2);
}

template <class A> void finish_states(const RowStatesFinishArgs& a) {
  const RowTransform<A> f{bits_per_unit<A>(a), A(0)};
  const RowKernels<A>& kernels = row_kernels<A>();
#pragma omp parallel for if (a.rows > kSerialRows)
  for (int64_t row = 0; row < a.rows; ++row) finish_row(a, row, f, kernels);
}

}  // namespace

void row_states_merge(const RowStatesMergeArgs& a) { a.dtype == kFloat64 ? merge_states<double>(a) : merge_states<float>(a); }
void row_states_finish(const RowStatesFinishArgs& a) { a.dtype == kFloat64 ? finish_states<double>(a) : finish_states<float>(a); }

}  // namespace cpu
}  // namespace fastalign
