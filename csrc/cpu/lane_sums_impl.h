// The sums of lane_sums.h, eight tokens at a time in two chains. Part of tokens_impl.h.
#pragma once
#include <cstring>
#include "cpu/tokens.h"

namespace fastalign {
namespace cpu {
namespace {
namespace lanes {

// Eight tokens: their values, the integers of the same size, and the doubles that they are summed in.
template <class T> struct Eight;
template <> struct Eight<float> {
  typedef float Value __attribute__((vector_size(32)));
  typedef int32_t Bits __attribute__((vector_size(32)));
};
template <> struct Eight<double> {
  typedef double Value __attribute__((vector_size(64)));
  typedef int64_t Bits __attribute__((vector_size(64)));
};
typedef double Sum __attribute__((vector_size(64)));
typedef uint8_t Mask __attribute__((vector_size(8)));

constexpr int kWidth = 8, kChains = 2, kStep = kWidth * kChains;
constexpr uint8_t kAllKept[kStep] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, kNoneKept[kStep] = {};

template <class V, class T> FA_HD V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// x, or +0 where the mask is zero: on the bits, so that it does not matter what x holds.
template <class T> FA_HD Sum widen(typename Eight<T>::Value x, typename Eight<T>::Bits kept) {
  return __builtin_convertvector(typename Eight<T>::Value(typename Eight<T>::Bits(x) & kept), Sum);
}

template <bool kMask, bool kPair, class T>
FA_HD LaneSums body(const T* x, const T* y, double y_scale, const uint8_t* mask, int64_t n) {
  using Value = typename Eight<T>::Value;
  using Bits = typename Eight<T>::Bits;
  Sum sum[kChains] = {}, difference[kChains] = {};
  Bits count[kChains] = {};
  const bool unit = y_scale == 1.0;
  auto add = [&](const T* px, const T* py, const uint8_t* pm) __attribute__((always_inline)) {
    for (int c = 0; c < kChains; ++c) {
      const Bits kept = pm ? Bits(__builtin_convertvector(load<Mask>(pm + c * kWidth), Bits) != 0) : ~Bits{};
      const Sum a = widen<T>(load<Value>(px + c * kWidth), kept);
      sum[c] += a;
      if (kPair) {
        const Sum b = widen<T>(load<Value>(py + c * kWidth), kept), d = a - y_scale * b;
        difference[c] += unit ? (a == b ? Sum{} : d) : d;
      }
      count[c] -= kept;
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const T* py = kPair ? y + i : nullptr;
    // Masks come in runs: most steps are kept or dropped as a whole.
    if (!kMask || !memcmp(mask + i, kAllKept, kStep)) add(x + i, py, nullptr);
    else if (memcmp(mask + i, kNoneKept, kStep)) add(x + i, py, mask + i);
  }
  if (i < n) {  // the rest, filled up with tokens that do not count
    T rest_x[kStep] = {}, rest_y[kStep] = {};
    uint8_t rest_mask[kStep] = {};
    memcpy(rest_x, x + i, size_t(n - i) * sizeof(T));
    if (kPair) memcpy(rest_y, y + i, size_t(n - i) * sizeof(T));
    if (kMask) memcpy(rest_mask, mask + i, size_t(n - i));
    else memset(rest_mask, 1, size_t(n - i));
    add(rest_x, rest_y, rest_mask);
  }
  LaneSums total{0.0, 0.0, 0};
  for (int c = 0; c < kChains; ++c) {
    for (int k = 0; k < kWidth; ++k) {
      total.x += sum[c][k];
      total.difference += difference[c][k];
      total.count += int64_t(count[c][k]);
    }
  }
  return total;
}

template <class T> LaneSums sum_lanes(const T* x, const T* y, double y_scale, const uint8_t* mask, int64_t n) {
  if (y) return mask ? body<true, true>(x, y, y_scale, mask, n) : body<false, true>(x, y, y_scale, mask, n);
  LaneSums s = mask ? body<true, false>(x, y, y_scale, mask, n) : body<false, false>(x, y, y_scale, mask, n);
  s.difference = s.x;
  return s;
}

}  // namespace lanes
}  // namespace
}  // namespace cpu
}  // namespace fastalign
