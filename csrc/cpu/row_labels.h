// What the mask and the labels say about a row, for every op that has them (Args: RowArgs, RowStatesFinishArgs), and its scale.
#pragma once
#include "common.h"
#include "math/row_state.h"

namespace fastalign {
namespace cpu {

template <class Args> int64_t label(const Args& a, int64_t row, int64_t k) { return a.labels[row * a.targets + k]; }
template <class Args> bool is_ignored(const Args& a, int64_t row, int64_t k) { return label(a, row, k) == a.ignore_index; }

template <class Args> bool is_scored(const Args& a, int64_t row) {
  if (a.mask && !a.mask[row]) return false;
  if (!a.labels) return true;
  for (int64_t k = 0; k < a.targets; ++k)
    if (!is_ignored(a, row, k)) return true;
  return false;
}

// Whether some label is neither ignored nor in the vocabulary: the row becomes NaN.
template <class Args> bool has_bad_label(const Args& a, int64_t row) {
  for (int64_t k = 0; k < a.targets; ++k)
    if (!is_ignored(a, row, k) && (label(a, row, k) < 0 || label(a, row, k) >= a.vocab_total)) return true;
  return false;
}

// c of math/row_state.h.
template <class A, class Args> A bits_per_unit(const Args& a) {
  return A(a.factor) / (a.temperature_ptr ? *static_cast<const A*>(a.temperature_ptr) : A(a.temperature));
}

}  // namespace cpu
}  // namespace fastalign
