// What a finished row state is turned into, on either side: by the sweeps over logits (Args = TokenStatsArgs) and from stored states
// (RowStatesFinishArgs). `exp2` as in math/row_state.h.
#pragma once
#include "math/row_state.h"
#include "ops.h"

namespace fastalign {

template <class T> FA_HD void put(void* out, int64_t i, T value) {
  if (out) static_cast<T*>(out)[i] = value;
}

// All but the log-probs.
template <class T, class Args, class Exp2>
FA_HD void write_statistics(const Args& a, int64_t row, const RowState<T>& s, const RowTransform<T>& f, Exp2&& exp2) {
  if (a.entropy) put(a.entropy, row, row_entropy(s, f, exp2));
  if (a.logsumexp) put(a.logsumexp, row, row_logsumexp(s, f));
  if (a.log_sum_sq) put(a.log_sum_sq, row, row_log_sum_sq(s));
  if (a.mean_logit) put(a.mean_logit, row, row_mean_logit(s, T(a.vocab_total), f));
  if (a.is_top1) put(a.is_top1, row, row_is_top1(s, a.labels[row * a.targets]));
}
template <class T, class Args, class Exp2>
FA_HD void write_statistics(const Args& a, int64_t row, const PairState<T>& s, const RowTransform<T>& f, Exp2&& exp2) {
  write_statistics(a, row, s.p, f, exp2);
  if (a.kl_policy_ref) put(a.kl_policy_ref, row, row_kl_policy_ref(s.p, s.r, f, exp2));
  if (a.kl_ref_policy) put(a.kl_ref_policy, row, row_kl_ref_policy(s.p, s.r, f, exp2));
}

// Of one of the rows (which = 0: the policy's, 1: the reference's): the log-prob of label k, whose logit is u.
template <class T, class Args, class Row, class Exp2>
FA_HD void write_logprob(const Args& a, int which, int64_t row, int64_t k, const Row& s, T u, const RowTransform<T>& f, Exp2&& exp2) {
  void* out = which ? a.ref_logprob : a.logprob;
  if (!out) return;
  const bool ignored = a.labels[row * a.targets + k] == a.ignore_index;
  put(out, row * a.targets + k, ignored ? T(0) : row_logprob(s, u, f, exp2));
}

// Of a row that is not scored: 0 in every output.
template <class T, class Args> FA_HD void write_no_statistics(const Args& a, int64_t row) {
  void* const results[] = {a.entropy, a.logsumexp, a.log_sum_sq, a.mean_logit, a.is_top1, a.kl_policy_ref, a.kl_ref_policy};
  for (void* out : results) put(out, row, T(0));
}
template <class T, class Args> FA_HD void write_no_logprob(const Args& a, int64_t row, int64_t k) {
  put(a.logprob, row * a.targets + k, T(0));
  put(a.ref_logprob, row * a.targets + k, T(0));
}

// The empty state, with the reference row's part where there is one.
template <class T> FA_HD void store_empty(bool with_ref, T* out) {
  store_state(RowState<T>::empty(), false, out);
  if (with_ref) store_ref(RefState<T>::empty(), out);
}

// Part i of `parts` states of row `row`, merged in index order into `out`. A single part is copied to the bit.
template <class T> FA_HD void merge_row_states(const T* states, int64_t parts, int64_t rows, int64_t row, T* out) {
  const T* first = states + row * kStateWidth;
  if (parts == 1) {
    for (int i = 0; i < kStateWidth; ++i) out[i] = first[i];
    return;
  }
  const bool with_ref = has_ref(first);
  PairState<T> s{load_state(first), load_ref(first)};
  bool valid = first[kColValid] != T(0);
  for (int64_t i = 1; i < parts; ++i) {
    const T* part = states + (i * rows + row) * kStateWidth;
    s = merge_stored(s, PairState<T>{load_state(part), load_ref(part)});
    valid |= part[kColValid] != T(0);
  }
  store_state(s.p, valid, out);
  if (with_ref) store_ref(s.r, out);
}

template <class T> FA_HD T merge_targets(const T* targets, int64_t parts, int64_t entries, int64_t entry) {
  T u = targets[entry];
  for (int64_t i = 1; i < parts; ++i) u = found_target(u, targets[i * entries + entry]);
  return u;
}

}  // namespace fastalign
