// Sums over packed sequences: forward one block per sequence, backward one thread per token.
#include "cuda/sequence.cuh"
#include "math/scalar.h"
#include "ops.h"

namespace fastalign {
namespace cuda {
namespace {

// The tree counts positions from the sequence's own start, so the sum does not depend on where the sequence lies in the pack.
__global__ void __launch_bounds__(kSequenceThreads) sequence_sum_fwd_kernel(SequenceSumArgs a) {
  FA_DYNAMIC_SHARED(float, partial);
  const auto *x = static_cast<const float*>(a.x), *weights = static_cast<const float*>(a.weights);
  const Segment s = segment(a.cu_seqlens, a.sequences, a.tokens, blockIdx.x);
  float sums[2] = {0, 0};   // of w x, of scored tokens
#pragma unroll 4
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += blockDim.x) {
    const bool scored = !a.mask || a.mask[t];
    const float term = weights ? x[t] * weights[t] : x[t];
    sums[0] += scored ? term : 0.0f;
    sums[1] += scored ? 1.0f : 0.0f;
  }
  sum_block(sums, partial);
  if (threadIdx.x) return;
  static_cast<float*>(a.sums)[blockIdx.x] = s.ok ? sums[0] : NAN;
  static_cast<float*>(a.counts)[blockIdx.x] = s.ok ? sums[1] : NAN;
}

__global__ void __launch_bounds__(kSequenceThreads) sequence_sum_bwd_kernel(SequenceSumBackwardArgs a) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= a.tokens) return;
  int64_t low = 0, high = a.sequences;   // the first sequence that ends beyond t
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.cu_seqlens[middle + 1] > t) high = middle;
    else low = middle + 1;
  }
  const auto *grad = static_cast<const float*>(a.grad), *weights = static_cast<const float*>(a.weights);
  const bool scored = !a.mask || a.mask[t];
  const bool held = low < a.sequences && a.cu_seqlens[low] <= t;
  const float g = held ? (weights ? times_slope(grad[low], weights[t]) : grad[low]) : NAN;
  static_cast<float*>(a.grad_x)[t] = held && !scored ? 0.0f : g;
}

}  // namespace

void sequence_sum_fwd(const SequenceSumArgs& a, int device, void* stream) {
  require_float32(a.dtype, "sequence_sum");
  if (a.sequences == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(sequence_sum_fwd_kernel, dim3(grid_size(a.sequences, "sequence_sum")), dim3(kSequenceThreads),
            2 * kSequenceThreads / kWarp * sizeof(float), stream, a);
}

void sequence_sum_bwd(const SequenceSumBackwardArgs& a, int device, void* stream) {
  require_float32(a.dtype, "sequence_sum");
  if (a.tokens == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(sequence_sum_bwd_kernel, dim3(grid_size(ceil_div(a.tokens, kSequenceThreads), "sequence_sum")), dim3(kSequenceThreads), 0,
            stream, a);
}

}  // namespace cuda
}  // namespace fastalign
