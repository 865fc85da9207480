// Count, mean and centred sum of squares (m2 = sum of (x - mean)^2), and how parts of them merge. Twin: fastalign/ops/math/moments.py.
#pragma once
#include "math/scalar.h"

namespace fastalign {

template <class T> struct Moments { T count, mean, m2; };

// x / n of a count n >= 1. In double by Newton's steps from a float's reciprocal, the last one on the quotient itself, so that it is exact where it can be:
// a GPU divides doubles by a call, which takes a stack.
template <class T> FA_HD T over_count(T x, T n) {
  if constexpr (sizeof(T) == 4) {
    return x / n;
  } else {
    T r = T(1.0f / float(n));
    r = r * (T(2) - n * r);
    r = r * (T(2) - n * r);
    const T q = x * r;
    return is_finite(q) ? fma(fma(-n, q, x), r, q) : q;
  }
}

// Values pushed one by one, as sums of x - shift with the first value as the shift: since that is one of the values, the sum of squares is at
// most count + 1 times m2, and equal values give 0 exactly.
template <class T> struct MomentSums {
  T count = 0, shift = 0, sum = 0, square = 0;
  FA_HD void push(T x) {
    if (count == T(0)) shift = x;
    const T d = x - shift;
    count += T(1);
    sum += d;
    square += d * d;
  }
  // Sums over n more values, of x - from and of its square.
  FA_HD void add(T n, T from, T differences, T squares) {
    const T move = from - shift;
    count += n;
    sum += differences + n * move;
    square += squares + move * (T(2) * differences + n * move);
  }
  // In R, which may be wider: the mean of values that lie far from 0 needs more digits than they have.
  template <class R = T> FA_HD Moments<R> moments() const {
    if (count == T(0)) return {R(0), R(0), R(0)};
    const R mean = over_count(R(sum), R(count)), m2 = R(square) - mean * R(sum);
    return {R(count), R(shift) + mean, m2 < R(0) ? R(0) : m2};
  }
};

// Parts merge in two sweeps (Chan, Golub, LeVeque 1979, for any number of parts): mean = sum of count mean / sum of count, then
// m2 = sum of moved_m2(part, mean). An empty part holds zeros; no parts at all have mean 0.
template <class T> FA_HD T merged_mean(T count, T weighted) { return count == T(0) ? T(0) : over_count(weighted, count); }
template <class T> FA_HD T moved_m2(const Moments<T>& part, T mean) {
  return part.m2 + part.count * (part.mean - mean) * (part.mean - mean);
}

}  // namespace fastalign
