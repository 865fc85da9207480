// Sums over packed sequences. A sequence is summed by one thread, in a fixed order, in double: the result does not depend on the thread count.
#include <algorithm>
#include <limits>
#include "cpu/tokens.h"
#include "math/scalar.h"
#include "segment.h"

namespace fastalign {
namespace cpu {
namespace {

template <class T> void forward(const SequenceSumArgs& a) {
  const T *x = static_cast<const T*>(a.x), *weights = static_cast<const T*>(a.weights);
  T *sums = static_cast<T*>(a.sums), *counts = static_cast<T*>(a.counts);
  const auto sum_lanes = token_kernels<T>().sum_lanes;
#pragma omp parallel for schedule(guided) if (a.tokens > (weights ? kSerialTokens : kSerialUniform))
  for (int64_t s = 0; s < a.sequences; ++s) {
    if (!weights) {
      const int64_t start = a.cu_seqlens[s];
      const LaneSums r = sum_lanes(x + start, nullptr, 0.0, a.mask ? a.mask + start : nullptr, a.cu_seqlens[s + 1] - start);
      sums[s] = T(r.x);
      counts[s] = T(r.count);
      continue;
    }
    double sum = 0;
    int64_t count = 0;
    for (int64_t n = a.cu_seqlens[s]; n < a.cu_seqlens[s + 1]; ++n) {
      if (a.mask && !a.mask[n]) continue;
      sum += double(weights[n]) * double(x[n]);
      ++count;
    }
    sums[s] = T(sum);
    counts[s] = T(count);
  }
}

template <class T> void backward(const SequenceSumBackwardArgs& a) {
  const T *grad = static_cast<const T*>(a.grad), *weights = static_cast<const T*>(a.weights);
  T* grad_x = static_cast<T*>(a.grad_x);
#pragma omp parallel for schedule(guided) if (a.tokens > (weights ? kSerialTokens : kSerialUniform))
  for (int64_t s = 0; s < a.sequences; ++s) {
    const Segment own = segment(a.cu_seqlens, a.sequences, a.tokens, s);
    const Share mine = share(a.cu_seqlens, a.sequences, a.tokens, s);
    if (own.begin != mine.begin || own.end != mine.end)
      std::fill(grad_x + mine.begin, grad_x + std::max(mine.begin, mine.end), std::numeric_limits<T>::quiet_NaN());
    for (int64_t n = own.begin; n < own.end; ++n) {
      const bool scored = !a.mask || a.mask[n];
      grad_x[n] = !scored ? T(0) : (weights ? times_slope(grad[s], weights[n]) : grad[s]);
    }
  }
}

}  // namespace

void sequence_sum_fwd(const SequenceSumArgs& a) { a.dtype == kFloat64 ? forward<double>(a) : forward<float>(a); }
void sequence_sum_bwd(const SequenceSumBackwardArgs& a) { a.dtype == kFloat64 ? backward<double>(a) : backward<float>(a); }

}  // namespace cpu
}  // namespace fastalign
